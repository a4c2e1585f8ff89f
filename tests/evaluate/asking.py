"""A benchmark from its files to its score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from meditron_train.evaluate.harness.lm_task import Protocol
from meditron_train.evaluate.harness.run import Score, read_questions, run_benchmark
from meditron_train.tasks.catalogue import Benchmark


def ask(model: Any, benchmark: Benchmark, data: Path, protocol: Protocol, limit: int | None = None) -> Score:
    """Ask an lm_eval `LM` the questions of a benchmark whose files lie in `data`."""
    return run_benchmark(model, read_questions(benchmark, data, protocol, limit=limit))
