"""What every process that runs a task does first. Importing it silences datatrove's console where ours speaks."""

from __future__ import annotations

import os

import multiprocess
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from meditron_train.corpus.pipeline.plan import Plan
from meditron_train.corpus.pipeline.work import WorkDirectory
from meditron_train.processes import end_with

if "SLURM_ARRAY_TASK_ID" not in os.environ:
    # On one machine we show progress ourselves, and errors come back as exceptions. Here, as datatrove speaks before
    # the first step of a pipeline runs; in a Slurm array its output is the log of the task.
    logger.disable("datatrove")


def prepare_worker() -> None:
    """In a child process: end when the parent is gone, however it ended, instead of working beside its successor."""
    parent = multiprocess.parent_process()
    if parent is not None:
        end_with(parent.sentinel)


class CorpusStep(PipelineStep):
    """A step of a build: every task of a stage works on its share of the plan."""

    type = "corpus"

    def __init__(self, plan: Plan, work: WorkDirectory) -> None:
        super().__init__()
        self._plan, self._work = plan, work
