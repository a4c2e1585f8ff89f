"""`meditron-train plan --trace`: what the real step did on a pretended GPU, in lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from meditron_train.units import format_num_bytes

if TYPE_CHECKING:
    from meditron_train.flows.trace.results import Coverage, Peak, Place, RankTrace
    from meditron_train.flows.trace.trace import Trace

_MAX_KERNELS = 6


def trace_lines(trace: Trace) -> list[str]:
    lines = [line for rank in trace.ranks for line in _rank_lines(rank)]
    if trace.coverage is not None:
        lines += _coverage_lines(trace.coverage)
    if trace.problems:
        return [*lines, *(f"PROBLEM   {problem}" for problem in trace.problems)]
    return [*lines, "problems  none"]


def _coverage_lines(coverage: Coverage) -> Iterator[str]:
    asked = f"{coverage.num_ranks} ranks, {coverage.num_layers} layers"
    if coverage.failure is not None:
        yield "coverage  not known"
        return
    if coverage.wrong:
        yield f"coverage  {len(coverage.wrong)} tensors are not owned exactly once ({asked})"
    else:
        yield f"coverage  each element of the weights and of the optimizer's state has one owner ({asked})"
    size = format_num_bytes(coverage.checkpoint_bytes)
    yield f"          a checkpoint has {size} in at most {coverage.num_checkpoint_files} files"


def _rank_lines(rank: RankTrace) -> Iterator[str]:
    yield (
        f"stage {rank.stage:<3} rank {rank.rank}: {rank.num_micro_batches} of {rank.real_micro_batches} micro-batches "
        f"traced, attention by {rank.attention} ({rank.cpu_seconds:.0f} s of a core, "
        f"{format_num_bytes(rank.resident_bytes)} resident)"
    )
    yield f"  memory  {format_num_bytes(rank.peak.num_bytes)} at most, in {rank.peak.phase}: {_parts(rank.peak)}"
    yield "          " + ", ".join(f"{peak.phase} {format_num_bytes(peak.num_bytes)}" for peak in rank.peaks)
    yield f"  kernels {rank.num_kernels():,} in a step, {rank.flops():.3g} FLOPs: {_most_launched(rank)}"
    for line in _collective_lines(rank):
        yield f"  sends   {line}"
    yield f"  waits   {rank.num_synchronizations()} times the host waits for the GPU in a step"
    yield from _place_lines(place for place in rank.synchronizations if place.phase != "build")
    yield from (f"  WRONG DEVICE {line.strip()}" for line in _place_lines(rank.misplaced))


def _parts(peak: Peak) -> str:
    parts = sorted(peak.by_part.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {format_num_bytes(num_bytes)}" for name, num_bytes in parts if num_bytes)


def _most_launched(rank: RankTrace) -> str:
    counts: Counter[str] = Counter()
    for kernel in rank.kernels:
        if kernel.phase != "build":
            counts[kernel.operator] += rank.in_real_step(kernel.count, kernel.phase)
    return ", ".join(f"{operator} {count:,}" for operator, count in counts.most_common(_MAX_KERNELS))


def _collective_lines(rank: RankTrace) -> Iterator[str]:
    calls: Counter[tuple[str, str]] = Counter()
    num_bytes: Counter[tuple[str, str]] = Counter()
    for collective in rank.collectives:
        if collective.phase != "build":
            count = rank.in_real_step(collective.count, collective.phase, collective.group)
            calls[collective.kind, collective.group] += count
            num_bytes[collective.kind, collective.group] += count * collective.num_bytes
    for (kind, group), count in sorted(calls.items(), key=lambda item: -num_bytes[item[0]]):
        yield f"{count:>8,} x {kind} in the {group} group, {format_num_bytes(num_bytes[kind, group])}"


def _place_lines(places: Iterable[Place]) -> Iterator[str]:
    for place in places:
        yield f"          {place.count:>3} x {place.what}, in {place.phase}: {place.where}"
