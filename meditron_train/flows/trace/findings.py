"""What is wrong in a trace, in words: judged by what the layout says should be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from meditron_train.config.model_config import ModelConfig
from meditron_train.config.schema import Config
from meditron_train.flows.trace.expected import expected_collectives, expected_parameters
from meditron_train.flows.trace.results import Coverage, RankTrace
from meditron_train.layout import ParallelLayout

LOOP = "forward and backward"


def problems_of(
    ranks: Sequence[RankTrace],
    coverage: Coverage | None,
    config: Config,
    model: ModelConfig,
    layout: ParallelLayout,
) -> list[str]:
    """One sentence each; empty where nothing is wrong."""
    problems = []
    for rank in ranks:
        found = [
            *_failure(rank),
            *_misplaced(rank),
            *_waits(rank),
            *_parameters(rank, model, layout),
            *([] if rank.failure else _collectives(rank, config, model, layout)),
        ]
        problems += [f"stage {rank.stage}: {problem}" for problem in found]
    if coverage is not None:
        problems += coverage.wrong
        problems += [] if coverage.failure is None else [f"who owns what is not known: {coverage.failure}"]
    return problems


def _failure(rank: RankTrace) -> list[str]:
    return [f"the step fails: {rank.failure}"] if rank.failure else []


def _misplaced(rank: RankTrace) -> list[str]:
    return [
        f"a tensor is on the wrong device: {place.what}, at {place.where}"
        for place in rank.misplaced
        if place.phase != "build"
    ]


def _waits(rank: RankTrace) -> list[str]:
    return [
        f"the host waits in every micro-batch: {place.what}, at {place.where}"
        for place in rank.synchronizations
        if rank.num_micro_batches > 1 and place.phase == LOOP and place.count >= rank.num_micro_batches
    ]


def _parameters(rank: RankTrace, model: ModelConfig, layout: ParallelLayout) -> list[str]:
    found, expected = Counter(rank.parameters), Counter(expected_parameters(model, layout, rank.stage))
    strange, missing = list((found - expected).elements()), list((expected - found).elements())
    problems = []
    if strange:
        problems.append(f"{_few(strange)} should be on another stage, or once only")
    if missing and not rank.failure:
        problems.append(f"{_few(missing)} should be on this stage and is not")
    return problems


def _collectives(rank: RankTrace, config: Config, model: ModelConfig, layout: ParallelLayout) -> list[str]:
    found: Counter[tuple[str, str]] = Counter()
    for collective in rank.collectives:
        if collective.phase != "build":
            # Between two interleaved stages, one direction has the world's group, so that both overlap.
            is_between_stages = collective.kind in ("send", "receive")
            found[collective.kind, "pipeline" if is_between_stages else collective.group] += collective.count
    expected = expected_collectives(config, model, layout, rank.stage, rank.num_micro_batches)
    return [
        f"{found[kind, group]} calls of {kind} in the {group} group; the layout needs {expected[kind, group]}"
        for kind, group in sorted(found.keys() | expected.keys())
        if group in ("tensor", "pipeline", "context") and found[kind, group] != expected[kind, group]
    ]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
