"""YAML files that may come from anyone."""

from __future__ import annotations

from itertools import pairwise

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from meditron_train.config.load import load_config
from meditron_train.config.yaml_file import dump_yaml, parse_yaml, read_yaml
from meditron_train.errors import UserError
from tests.refusal import refused


def test_a_few_lines_of_aliases_are_not_a_billion_values(tmp_path):
    lines = ["a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in pairwise("abcdefghij")]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(UserError, match="more than 100,000 values with its aliases written out"):
        load_config(tmp_path / "bomb.yaml")
    (tmp_path / "large.yaml").write_bytes(b"# " * (3 << 20))
    with pytest.raises(UserError, match="it is not a configuration file"):
        load_config(tmp_path / "large.yaml")


def test_numbers_of_base_60_are_text(tmp_path):
    (tmp_path / "c.yaml").write_text("train: {steps: 1:30, seq_len: 0x40}\nmodel: {from: x}")
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "c.yaml")
    assert "train.steps" in str(caught.value) and "1:30" in str(caught.value)
    assert "seq_len" not in str(caught.value)


def test_brackets_in_a_row_are_refused_before_they_are_parsed(tmp_path, monkeypatch):
    """PyYAML's scanner takes quadratic time for them: 2,000 are seconds."""
    (tmp_path / "deep.yaml").write_text("a: " + "[\n {" * 1000 + "\n")
    monkeypatch.setattr(yaml, "load", lambda *_: pytest.fail("parsed"))
    with refused("deep.yaml is nested too deeply"):
        read_yaml(tmp_path / "deep.yaml")


def test_nesting_that_people_write_is_read(tmp_path):
    (tmp_path / "deep.yaml").write_text("a: " + "[" * 40 + "1" + "]" * 40 + "\n")
    value = read_yaml(tmp_path / "deep.yaml")["a"]
    for _ in range(40):
        (value,) = value
    assert value == 1


_PLAIN = st.one_of(
    st.text(alphabet="0123456789eE+-._:xob", max_size=8),
    st.floats(allow_nan=False),
    st.integers(),
    st.booleans(),
    st.none(),
)


_VALUES = st.dictionaries(st.text(alphabet="3e-4:x", max_size=5), st.one_of(_PLAIN, st.lists(_PLAIN)))


def dump_and_read(values):
    found = parse_yaml(dump_yaml(values))
    assert found == values and repr(found) == repr(values)  # 1 == 1.0 == True
    assert yaml.safe_load(dump_yaml(values)) == values  # other programs read YAML 1.1


@given(values=_VALUES)
@settings(max_examples=75, deadline=None)
def test_what_is_dumped_is_read_as_it_was(values):
    dump_and_read(values)


@pytest.mark.long
@given(values=_VALUES)
@settings(max_examples=1000, deadline=None)
def test_what_is_dumped_is_read_as_it_was_1000_times(values):
    dump_and_read(values)
