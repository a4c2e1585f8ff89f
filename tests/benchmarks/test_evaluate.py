"""The evaluation benchmark runs, and both tools compute the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_both_tools_compute_the_same(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    words = ["--tiny", "--rounds", "1", "--questions", "4", "--json", str(result)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.evaluate", *words], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(result.read_text())
    kinds = [entry["answers"] for entry in found[::2]]
    assert kinds == [entry["answers"] for entry in found[1::2]] == ["texts", "letters", "generated"]
    assert all(entry["difference"] <= 1e-4 and min(entry["questions_per_second"]) > 0 for entry in found)
