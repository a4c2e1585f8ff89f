"""Which ranks keep the others waiting: their own work, before they meet the others, takes longer than their peers'.

Own work is waiting for data plus forward and backward until gradients are added up. Ranks that share one model replica
(tensor, context, pipeline parallel) wait for each other inside it, so a slow one among them shows as a slow replica.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from meditron_train.parallel import Mesh


@dataclass(frozen=True)
class SlowRank:
    """A rank, its host, its seconds of own work per step, and the median of its peers'."""

    rank: int
    host: str
    seconds: float
    median_seconds: float

    def __str__(self) -> str:
        return (
            f"rank {self.rank} on host {self.host} is slow: {self.seconds:.3g} s of its own work per step, "
            f"{self.seconds / self.median_seconds:.1f} times the median of its peers ({self.median_seconds:.3g} s)"
        )


class SlowRankDetector:
    """Averages a rank's own seconds over `window` steps, then compares those of all ranks."""

    def __init__(self, mesh: Mesh, hosts: Sequence[str], *, factor: float, window: int) -> None:
        self._mesh, self._hosts, self._factor, self._window = mesh, hosts, factor, window
        self._seconds: list[float] = []

    def add(self, own_seconds: float) -> list[SlowRank] | None:
        """Count a step. At the end of a window, the slow ranks (collective, the same on all ranks); else None."""
        if self._factor == 0 or self._mesh.layout.world_size == 1:
            return None
        self._seconds.append(own_seconds)
        if len(self._seconds) < self._window:
            return None
        seconds_of_ranks = self._mesh.gather_objects(statistics.fmean(self._seconds))
        self._seconds.clear()
        stages = [self._mesh.layout.coordinates(rank).pipeline for rank in range(len(seconds_of_ranks))]
        return slow_ranks(seconds_of_ranks, stages, self._hosts, self._factor)


def slow_ranks(
    seconds_of_ranks: Sequence[float], stages: Sequence[int], hosts: Sequence[str], factor: float
) -> list[SlowRank]:
    """Ranks above `factor` times the median of the ranks of their pipeline stage (stages have different work)."""
    found = []
    for rank, seconds in enumerate(seconds_of_ranks):
        peers = [s for s, stage in zip(seconds_of_ranks, stages, strict=True) if stage == stages[rank]]
        median = statistics.median_low(peers)  # of two peers the faster one says what is usual
        if seconds > factor * median:
            found.append(SlowRank(rank, hosts[rank], seconds, median))
    return found
