"""Traces every distinct rank of a run, each in a process of its own, and judges what they saw."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from meditron_train.config.model_config import ModelConfig
from meditron_train.config.schema import Config
from meditron_train.errors import MeditronError, UserError
from meditron_train.flows.trace.findings import problems_of
from meditron_train.flows.trace.results import Coverage, RankTrace
from meditron_train.layout import ParallelLayout


@dataclass(frozen=True)
class Trace:
    """The steps of the distinct ranks, by stage, and what is wrong with them, one sentence each.

    Attributes:
        coverage: which ranks own what; None where not all stages were traced.
    """

    ranks: list[RankTrace]
    coverage: Coverage | None
    problems: list[str]

    def as_json(self) -> dict[str, Any]:
        return {
            "ranks": [rank.as_json() for rank in self.ranks],
            "coverage": None if self.coverage is None else self.coverage.as_json(),
            "problems": self.problems,
        }


def trace(
    config: Config, model: ModelConfig, layout: ParallelLayout, *, stages: Sequence[int] | None = None
) -> Trace:
    """Take the step of one rank of each stage: tensor-, context- and data-parallel peers do alike.

    Args:
        stages: which pipeline stages; None for all of them and the coverage of the checkpoint.

    Raises:
        UserError: a stage that the layout does not have, a run that wants the CPU, or adapters.
        MeditronError: a process died.
    """
    if config.train.device == "cpu":
        raise UserError("train.device is cpu, and a trace is of the step on a GPU: write train.device=auto")
    if config.lora is not None:
        raise UserError("--trace does not know what adapters hold and send yet: trace the run without lora")
    chosen = list(range(layout.pipeline)) if stages is None else sorted(set(stages))
    if wrong := [stage for stage in chosen if not 0 <= stage < layout.pipeline]:
        raise UserError(f"there is no stage {wrong[0]}: parallel.pipeline is {layout.pipeline}")
    with ProcessPoolExecutor(
        min(len(os.sched_getaffinity(0)), len(chosen)),
        mp_context=get_context("spawn"),
        initializer=_without_gpu,
        max_tasks_per_child=1,
    ) as pool:
        jobs = [pool.submit(_trace_stage, config, model, layout, stage) for stage in chosen]
        audit = pool.submit(_audit, config, model, layout) if stages is None else None
        try:
            ranks = [job.result() for job in jobs]
            coverage = None if audit is None else audit.result()
        except BrokenProcessPool:
            raise MeditronError(
                "a process of the trace was killed, perhaps for its memory (about 0.5 GiB each)"
            ) from None
    return Trace(ranks, coverage, problems_of(ranks, coverage, config, model, layout))


def _without_gpu() -> None:
    """Before torch is imported: a GPU that is there would be used instead of the pretended one."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["OMP_NUM_THREADS"] = "1"


def _trace_stage(config: Config, model: ModelConfig, layout: ParallelLayout, stage: int) -> RankTrace:
    from meditron_train.flows.trace.rank import trace_rank

    return trace_rank(config, model, layout, first_rank(layout, stage))


def _audit(config: Config, model: ModelConfig, layout: ParallelLayout) -> Coverage:
    from meditron_train.flows.trace.coverage import audit_ownership

    return audit_ownership(config, model, layout)


def first_rank(layout: ParallelLayout, stage: int) -> int:
    """The rank of a stage with coordinate 0 in every other dimension."""
    return stage * layout.world_size // layout.pipeline
