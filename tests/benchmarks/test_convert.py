"""The conversion benchmark runs, compares the same bytes, and leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(directory: Path, *options: str) -> list[dict]:
    command = [sys.executable, "-m", "benchmarks.convert", "--model", "tiny", "--directory", str(directory)]
    result = directory.parent / "result.json"
    done = subprocess.run(
        [*command, *options, "--json", str(result)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| | wall s | MB/s | CPU s | peak memory GiB |")
    assert list(directory.iterdir()) == []
    return json.loads(result.read_text())


@pytest.mark.long
def test_both_directions_beside_cp(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    results = run(tmp_path / "work", "--tools", "cp-hf,to,cp-checkpoint,from")
    cp, to, _, back = results
    assert cp["num_bytes"] == to["num_bytes"] > 500_000
    assert cp["peak_num_bytes"] < 100e6 < to["peak_num_bytes"] < 2 * 2**30  # torch alone takes more than cp
    assert back["peak_num_bytes"] < 2 * 2**30


@pytest.mark.long
def test_dry(tmp_path: Path) -> None:
    """The same program on a model of holes: hashes, manifest and export hold, though no file keeps its content."""
    (tmp_path / "work").mkdir()
    to, back = run(tmp_path / "work", "--dry")
    assert to["num_bytes"] > 500_000 and back["num_bytes"] > 500_000
