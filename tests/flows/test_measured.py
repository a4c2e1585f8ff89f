"""Which lines of metrics.jsonl a plan is compared with."""

from __future__ import annotations

from meditron_train.config.training import BatchRamp
from meditron_train.data.packing.batch_schedule import BatchSchedule
from meditron_train.flows.measured import comparable_lines

CONSTANT = BatchSchedule(8)
# Steps 1 to 6 of 2 samples, 7 to 9 of 4, 10 and 11 of 6, the others of 8.
RAMP = BatchSchedule(8, BatchRamp(start=2, increment=2, samples=36))


def test_the_first_lines_are_left_out():
    assert comparable_lines(range(1, 9), CONSTANT, 0) == (8, [5, 6, 7])
    assert comparable_lines(range(1, 6), CONSTANT, 0) == (8, [])
    assert comparable_lines([], CONSTANT, 0) == (8, [])


def test_only_the_last_start_counts():
    assert comparable_lines(range(1, 21), CONSTANT, 12) == (8, [17, 18, 19])
    assert comparable_lines(range(1, 21), CONSTANT, 16) == (8, [])


def test_only_one_batch_size_counts():
    assert [RAMP.batch_size(step) for step in range(1, 13)] == [2] * 6 + [4] * 3 + [6] * 2 + [8]
    assert comparable_lines(range(1, 15), RAMP, 0) == (8, [11, 12, 13])
    assert comparable_lines(range(1, 10), RAMP, 0) == (4, [6, 7, 8])  # the run is in its ramp
    # Lines of every second step: that of step 12 is the mean of step 11, of 6 samples, and of step 12.
    assert comparable_lines(range(2, 17, 2), RAMP, 0) == (8, [6, 7])
    assert comparable_lines(range(2, 13, 2), RAMP, 0) == (8, [])
