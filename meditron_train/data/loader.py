"""Micro-batches of one data-parallel rank, step by step, prepared ahead in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from types import TracebackType

from meditron_train.data.batch_schedule import BatchSchedule
from meditron_train.data.packed import PackedBatch, PackedDataset
from meditron_train.errors import UserError

Step = tuple[int, list[PackedBatch]]


class StepLoader(Iterator[Step]):
    """Endless iterator of (step, micro-batches of this rank), from `start_step` (the first one given) on.

    Micro-batch j of rank r holds the samples first + (j * dp_size + r) * micro_batch_size …, where first is
    `schedule.samples_before(step)`: all ranks together take the samples of the step once, and which samples
    a step takes does not depend on dp_size or micro_batch_size. A thread prepares up to `num_prefetch_steps`
    steps ahead (0: none); an error there is raised by `next`. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        schedule: BatchSchedule,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        start_step: int = 1,
        num_prefetch_steps: int = 2,
    ) -> None:
        if micro_batch_size < 1 or not 0 <= dp_rank < dp_size or start_step < 1 or num_prefetch_steps < 0:
            raise ValueError(
                f"micro_batch_size {micro_batch_size}, dp_rank {dp_rank} of {dp_size}, start_step "
                f"{start_step}, "
                f"num_prefetch_steps {num_prefetch_steps} do not describe a rank's loader"
            )
        uneven = [size for size in schedule.batch_sizes if size % (micro_batch_size * dp_size)]
        if uneven:
            raise UserError(
                f"The global batch of {uneven[0]} samples cannot be divided among {dp_size} data-parallel "
                "ranks in "
                f"micro-batches of {micro_batch_size}: make it a multiple of {micro_batch_size * dp_size}."
            )
        self._dataset, self._schedule = dataset, schedule
        self._micro_batch_size, self._dp_rank, self._dp_size = micro_batch_size, dp_rank, dp_size
        self._next_step = start_step
        self._closed = threading.Event()
        self._queue: queue.Queue[Step | BaseException] = queue.Queue(maxsize=max(1, num_prefetch_steps))
        self._thread: threading.Thread | None = None
        if num_prefetch_steps > 0:
            self._thread = threading.Thread(
                target=self._prefetch, args=(start_step,), name="data-prefetch", daemon=True
            )
            self._thread.start()

    def __next__(self) -> Step:
        if self._closed.is_set():
            raise StopIteration
        if self._thread is None:
            step = self._next_step
            self._next_step += 1
            return step, self._prepare(step)
        item = self._queue.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        return item

    def sample_numbers(self, step: int) -> list[list[int]]:
        """The samples of each micro-batch of this rank in a step."""
        first = self._schedule.samples_before(step)
        num_micro_batches = self._schedule.batch_size(step) // (self._micro_batch_size * self._dp_size)
        size = self._micro_batch_size
        starts = (first + (j * self._dp_size + self._dp_rank) * size for j in range(num_micro_batches))
        return [list(range(start, start + size)) for start in starts]

    def _prepare(self, step: int) -> list[PackedBatch]:
        return [self._dataset.microbatch(numbers) for numbers in self.sample_numbers(step)]

    def _prefetch(self, step: int) -> None:
        while not self._closed.is_set():
            item: Step | BaseException
            try:
                item = (step, self._prepare(step))
            except BaseException as error:  # handed over to the consumer, who raises it
                item = error
            while not self._closed.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            step += 1

    def close(self) -> None:
        """Stop preparing; iteration ends."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
