from __future__ import annotations

import json
import math

import numpy
import pytest
import torch

from meditron_train.report.json_lines import decode_line, encode_line, read_json_lines


def test_every_line_is_strict_json_and_reads_back():
    record = {
        "step": 3,
        "loss": math.nan,
        "up": [math.inf, {"down": -math.inf}],
        "name": "Zürich\n",
        "none": None,
    }
    line = encode_line(record)
    assert "\n" not in line

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    strict = json.loads(line, parse_constant=refuse)
    assert strict["loss"] == "NaN"
    assert strict["up"] == ["Infinity", {"down": "-Infinity"}]
    back = decode_line(line)
    assert math.isnan(back["loss"])
    assert back["up"] == [math.inf, {"down": -math.inf}]
    assert back["name"] == "Zürich\n"
    assert back["none"] is None
    assert back["step"] == 3


def test_floats_survive_to_the_last_bit():
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, float(numpy.float32(0.1))]
    assert decode_line(encode_line({"values": values}))["values"] == values


@pytest.mark.parametrize(
    "number", [numpy.float32(1.5), torch.tensor(1.5), numpy.array(1.5), torch.tensor(1.5).double()]
)
def test_numbers_of_numpy_and_torch(number):
    assert encode_line({"x": number}) == '{"x": 1.5}'


def test_what_is_not_json_is_refused_not_stringified():
    with pytest.raises(TypeError):
        encode_line({"x": object()})


@pytest.mark.parametrize("line", ["", "[1]", "3", "{", '{"a": 1} x'])
def test_a_line_that_is_no_object_is_refused(line):
    with pytest.raises(ValueError):
        decode_line(line)


def test_torn_last_line_is_ignored_and_a_bad_one_inside_is_left_out(tmp_path, caplog):
    file = tmp_path / "m.jsonl"
    assert read_json_lines(file) == []
    file.write_bytes(b'{"a": 1}\n{"a": \n{"a": 2}\n{"a": 3}')
    with caplog.at_level("WARNING", logger="meditron_train"):
        assert read_json_lines(file) == [{"a": 1}, {"a": 2}]
