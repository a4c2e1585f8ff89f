"""A conversion killed at any moment leaves nothing that looks finished, and running it again completes it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from meditron_train.checkpoint.export import export_hf
from meditron_train.convert.hf_to_megatron import hf_to_megatron
from meditron_train.convert.verify import verify
from tests.checkpoint.tiny_llama import write_tiny_llama

KILLED_AT_A_TENSOR = """
import os, signal, sys
from meditron_train.checkpoint.export import export_hf
from meditron_train.convert.hf_to_megatron import hf_to_megatron

direction, source, target, number = sys.argv[1:]
seen = []

def progress(name, num_bytes):
    seen.append(name)
    if len(seen) == int(number):
        os.kill(os.getpid(), signal.SIGKILL)

{"to": hf_to_megatron, "from": export_hf}[direction](source, target, progress=progress)
"""


@pytest.mark.parametrize(("direction", "number"), [("to", 1), ("to", 15), ("from", 9)])
def test_killed_and_run_again(tmp_path: Path, direction: str, number: int) -> None:
    convert = {"to": hf_to_megatron, "from": export_hf}[direction]
    source = write_tiny_llama(tmp_path / "hf")
    if direction == "from":
        hf_to_megatron(source, tmp_path / "checkpoint")
        source = tmp_path / "checkpoint"
    before, target = {path.name for path in tmp_path.iterdir()}, tmp_path / "target"
    command = [sys.executable, "-c", KILLED_AT_A_TENSOR, direction, str(source), str(target), str(number)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert {path.name for path in tmp_path.iterdir()} == {*before, "target.tmp"}
    convert(source, target)
    assert {path.name for path in tmp_path.iterdir()} == {*before, "target"}
    assert verify(source, target).differences == ()
