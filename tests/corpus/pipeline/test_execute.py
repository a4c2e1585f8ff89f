"""How stages are watched: workers that die, and a Slurm that does not answer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datatrove")

from meditron_train.corpus.declaration import SlurmSection
from meditron_train.corpus.json_files import read_json
from meditron_train.corpus.pipeline import execute, near
from meditron_train.corpus.pipeline.execute import Execution, Stage
from meditron_train.corpus.pipeline.near import PairBuckets
from meditron_train.corpus.pipeline.plan import make_plan
from meditron_train.corpus.pipeline.work import WorkDirectory
from meditron_train.errors import MeditronError
from tests.corpus.pipeline.corpora import corpus, source


def test_every_task_of_the_stage_pair_can_be_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies in a bucket has left its id, so that nobody waits for it."""
    work = WorkDirectory(tmp_path)
    plan = make_plan(corpus(tmp_path / "out", [source("absent", None)]), work)
    state = work.progress("pair") / "00001.json"
    seen: list[dict[str, Any]] = []

    class Buckets:
        def __init__(self, *args: object, **more: object) -> None:
            pass

        def run(self, *args: object) -> None:
            seen.append(read_json(state))

    monkeypatch.setattr(near, "MinhashDedupBuckets", Buckets)
    list(PairBuckets(plan, work).run(rank=1, world_size=7))
    assert [(one["pid"], one["ended"]) for one in seen] == [(os.getpid(), False)] * 2
    assert read_json(state)["ended"]


class Array:
    """datatrove's executor for Slurm, with a task that is missing so many times."""

    missing = 0
    job_id = 7

    def __init__(self, **options: object) -> None:
        pass

    def run(self) -> None:
        pass

    def get_incomplete_ranks(self) -> list[int]:
        type(self).missing -= 1
        return [0] if type(self).missing >= 0 else []


def run_on_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, squeue: str, missing: int) -> None:
    """Wait for the task of an array with this script for a squeue."""
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n{squeue}\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(execute, "_SlurmExecutor", Array)
    Array.missing = missing
    execution = Execution("slurm", slurm=SlurmSection(poll_interval_s=0.01))
    execute._run_on_slurm(Stage("read", "read", [], 1), execution, tmp_path, 1)


@pytest.mark.parametrize(
    "squeue", ["exit 1", "echo 6; echo 7", 'case "$*" in *--jobs*) exit 1;; esac; echo 7']
)
def test_a_job_that_may_still_run_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, squeue: str
) -> None:
    run_on_slurm(tmp_path, monkeypatch, squeue, missing=5)
    assert caplog.text.count("squeue fails") == (squeue == "exit 1")


@pytest.mark.parametrize("squeue", ["exit 0", 'case "$*" in *--jobs*) exit 1;; esac; echo 6'])
def test_a_job_that_is_gone_with_its_tasks_unfinished_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, squeue: str
) -> None:
    with pytest.raises(MeditronError, match="1 of 1 tasks failed in Slurm job 7"):
        run_on_slurm(tmp_path, monkeypatch, squeue, missing=5)
    run_on_slurm(tmp_path, monkeypatch, squeue, missing=1)  # its last mark was late
