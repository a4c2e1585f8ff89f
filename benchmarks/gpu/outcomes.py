"""A pytest plugin that writes each test's outcome as it ends: what is killed keeps what it has found.

    python -m pytest -p benchmarks.gpu.outcomes --outcomes FILE ...

FILE gets lines of JSON: how many tests were collected, each test as it starts, and how it ended.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import IO, Any

import pytest

STARTED = "started"
ENDS = ("passed", "failed", "error", "skipped")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="file of the outcomes")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--outcomes"):
        config.pluginmanager.register(_Writer(path.open("w")))


class _Writer:
    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def write(self, line: dict[str, Any]) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.write({"collected": len(session.items)})

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write({"test": report.nodeid, "outcome": "error"})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write({"test": nodeid, "outcome": STARTED})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            # What fails around a test is an error, as pytest counts.
            outcome = "error" if report.failed and report.when != "call" else report.outcome
            self.write({"test": report.nodeid, "outcome": outcome})


def summary(path: Path) -> dict[str, Any]:
    """What the file says by now.

    Args:
        path: the file of `--outcomes`; its last line may have been cut off.

    Returns:
        The number collected, that of each end, and the names of tests that failed and that did not end.

    Raises:
        ValueError: pytest has not collected yet.
    """
    collected, outcomes = None, dict[str, str]()
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        entry = json.loads(line)
        collected = entry.get("collected", collected)
        if "test" in entry:
            outcomes[entry["test"]] = entry["outcome"]
    if collected is None and not outcomes:
        raise ValueError("no test was collected")
    counts = Counter(outcomes.values())
    return {
        "tests": collected or 0,
        **{end: counts[end] for end in ENDS},
        "names_failed": [name for name, outcome in outcomes.items() if outcome in ("failed", "error")],
        "names_unfinished": [name for name, outcome in outcomes.items() if outcome == STARTED],
    }
