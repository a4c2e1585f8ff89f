"""The benchmark runs and measures both ways of saving; what it finds is not judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_both_ways_of_saving_are_measured(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.checkpoint_pause", "--rounds", "1", "--ranks", "2"]
    command += ["--dir", str(tmp_path), "--json", str(tmp_path / "result.json")]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "result.json").read_text())
    assert len(found["times"]["sync"]) == len(found["times"]["async"]) == 1
    assert found["times"]["step while writing"], "no step was taken while the copies saved"
    assert found["num_bytes"] > 1e6
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"], "what was written is removed"
    assert "| saved in the background | " in run.stdout
