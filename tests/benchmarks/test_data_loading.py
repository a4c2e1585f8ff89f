"""The benchmark of data loading runs, and has a rate for every row."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_all_rows_are_measured(tmp_path: Path) -> None:
    result_file = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.data_loading", "--tiny", "--rounds", "1"]
    command += ["--json", str(result_file)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr
    rows = json.loads(result_file.read_text())
    assert len({row["table"] for row in rows}) == 7
    for row in rows:
        assert 0 < row["median"] <= row["best"]
        assert f"| {row['name']} | " in run.stdout
        assert (row["ratio"] is None) == (row["baseline"] is None)
