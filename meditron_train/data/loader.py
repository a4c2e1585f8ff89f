"""Micro-batches of one data-parallel rank, step by step, gathered ahead by threads in C++."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from meditron_train.data.packed import GatherJob, PackedBatch, PackedDataset
from meditron_train.data.packing.batch_schedule import BatchSchedule
from meditron_train.native.packing import Prefetcher

Step = tuple[int, list[PackedBatch]]

_NUM_THREADS = 4  # they wait for the disk more than they work: one gathers faster than any device trains


class StepLoader(Iterator[Step]):
    """Endless iterator of (step, micro-batches of this rank), from `start_step` (the first one given) on.

    Micro-batch j of rank r holds the samples first + (j * dp_size + r) * micro_batch_size …, where first is
    `schedule.samples_before(step)`: all ranks together take the samples of the step once, and which samples a
    step takes does not depend on dp_size or micro_batch_size. An error ends the iteration; it comes from the
    `next` that asks for its step. Close it, or use it as a context manager.

    Args:
        prefetch: steps gathered ahead while the caller works on another (0: none).
        pin_memory: batches lie in pinned memory, from which a GPU copies while it computes.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        schedule: BatchSchedule,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        start_step: int = 1,
        prefetch: int = 2,
        *,
        pin_memory: bool = False,
    ) -> None:
        self._dataset, self._schedule = dataset, schedule
        self._micro_batch_size, self._dp_rank, self._dp_size = micro_batch_size, dp_rank, dp_size
        self._prefetch, self._pin_memory = prefetch, pin_memory
        self._next_step = start_step  # the next to be given
        self._closed = False
        self._prefetcher = Prefetcher(_NUM_THREADS) if prefetch > 0 else None
        self._under_way: deque[GatherJob | Exception] = deque()  # of the steps from _next_step on
        self._last_planned: GatherJob | Exception | None = None

    def __next__(self) -> Step:
        if self._closed:
            raise StopIteration
        try:
            batches = self._take() if self._prefetcher else self._job(self._next_step).gather()
        except BaseException:
            self.close()
            raise
        self._next_step += 1
        return self._next_step - 1, batches

    def _take(self) -> list[PackedBatch]:
        """The micro-batches of the next step, after the steps to come were handed to the threads."""
        assert self._prefetcher is not None
        while len(self._under_way) <= self._prefetch and not isinstance(self._last_planned, Exception):
            self._plan_ahead(self._prefetcher)
        job = self._under_way.popleft()
        if isinstance(job, Exception):
            raise job
        return job.finish(self._prefetcher.take)

    def _plan_ahead(self, prefetcher: Prefetcher) -> None:
        try:
            job = self._job(self._next_step + len(self._under_way))
            prefetcher.submit(*job.arguments)
            self._last_planned = job
        except Exception as error:  # belongs to a later step, which raises it
            self._last_planned = error
        self._under_way.append(self._last_planned)

    def sample_numbers(self, step: int) -> NDArray[np.int64]:
        """The samples of each micro-batch of this rank in a step, int64 [micro-batches, micro_batch_size]."""
        size = self._micro_batch_size
        stride = self._dp_size * size
        num_micro_batches = self._schedule.batch_size(step) // stride
        first = self._schedule.samples_before(step) + self._dp_rank * size
        return first + stride * np.arange(num_micro_batches)[:, None] + np.arange(size)

    def _job(self, step: int) -> GatherJob:
        return self._dataset.job(self.sample_numbers(step), pin_memory=self._pin_memory)

    def close(self) -> None:
        """Stop gathering; iteration ends."""
        self._closed = True
        if self._prefetcher is not None:
            self._prefetcher.close()
        self._under_way.clear()
        self._last_planned = None

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
