from __future__ import annotations

import pytest

from meditron_train.errors import UserError
from meditron_train.planner.hardware import HARDWARE, find_hardware, read_hardware


def test_a_file_adds_hardware(tmp_path):
    file = tmp_path / "hardware.yaml"
    file.write_text(
        "ours: {like: a100-80gb, network_bytes_per_second: 2.5e+10}\nslow: {like: ours, power_w: 300}\n"
    )
    assert find_hardware("ours", file).network_bytes_per_second == 25e9
    slow = find_hardware("slow", file)
    assert (slow.name, slow.power_w, slow.network_bytes_per_second) == ("slow", 300, 25e9)
    assert slow.bf16_flops == HARDWARE["a100-80gb"].bf16_flops


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "expected keys and their values, as in `my-a100"),
        ("x: {like: cpu, power_w: .inf}", "must be a positive number"),
        ("x: {like: cpu, memory_bytes: 1" + 400 * "0" + "}", "must be a positive number"),
        ("x: {like: [cpu]}", "needs `like:`"),
        ("x: {like: cpu}\nx: {like: cpu}", "given twice"),
        (
            "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]\n"
            "c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b]\nd: &d [*c, *c, *c, *c, *c, *c, *c, *c, *c]\n"
            "e: &e [*d, *d, *d, *d, *d, *d, *d, *d, *d]\nf: [*e, *e, *e, *e, *e, *e, *e, *e, *e]",
            "aliases",
        ),
        ("x: {power_w: 1}", "needs `like:`"),
        ("x: {like: b200}", "needs `like:`"),
        ("x: {like: cpu, powr_w: 1}", "did you mean power_w"),
        ("x: {like: cpu, power_w: -1}", "must be a positive number"),
        ("x: {like: cpu, power_w: yes}", "must be a positive number"),
        ("x: {like: cpu, power_w: .nan}", "must be a positive number"),
        ("x: [", "not valid YAML"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    file = tmp_path / "hardware.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        read_hardware(file)


def test_an_unknown_gpu_gets_the_nearest_name():
    with pytest.raises(UserError, match="h1000.*Did you mean h100-80gb.*--hardware"):
        find_hardware("h1000")
