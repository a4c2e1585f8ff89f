"""Which lines of a run's metrics.jsonl can be compared with one prediction."""

from __future__ import annotations

from collections.abc import Sequence

from meditron_train.data.packing.batch_schedule import BatchSchedule

FIRST_LINES = 5
"""Of a start, left out: allocation, compilation and the page cache make them slow."""


def comparable_lines(
    steps: Sequence[int], schedule: BatchSchedule, resumed_after_step: int
) -> tuple[int, list[int]]:
    """Lines of the last start, without its first ones, whose steps all had one batch size: the last such size.

    A line has the means of the steps since the line before it: one at a change of the batch size has both.

    Args:
        steps: of the lines that have a time, ascending.
        schedule: batch size of each step.
        resumed_after_step: the step that the last start continued after; 0 where it began the run.

    Returns:
        The batch size in samples, and the indices of the lines in `steps`; none where there are too few.
    """
    own = [index for index, step in enumerate(steps) if step > resumed_after_step]
    sizes: dict[int, int] = {}
    for before, index in zip(own[FIRST_LINES - 1 :], own[FIRST_LINES:], strict=False):
        size = schedule.batch_size(steps[index])
        if schedule.batch_size(steps[before] + 1) == size:
            sizes[index] = size
    last = next(reversed(sizes.values()), schedule.global_batch_size)
    return last, [index for index, size in sizes.items() if size == last]
