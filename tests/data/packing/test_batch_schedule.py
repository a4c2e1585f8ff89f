from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meditron_train.config.training import BatchRamp
from meditron_train.data.packing.batch_schedule import BatchSchedule


def ramp(start: int, increment: int, samples: int) -> BatchRamp:
    return BatchRamp(start=start, increment=increment, samples=samples)


def test_constant() -> None:
    schedule = BatchSchedule(16)
    assert [schedule.batch_size(step) for step in (1, 2, 10**9)] == [16, 16, 16]
    assert [schedule.samples_before(step) for step in (1, 2, 10**9)] == [0, 16, 16 * (10**9 - 1)]
    assert schedule.batch_sizes == (16,)


def test_ramp() -> None:
    schedule = BatchSchedule(8, ramp(start=2, increment=2, samples=24))  # 8 samples each of 2, 4, 6
    assert [schedule.batch_size(step) for step in range(1, 11)] == [2, 2, 2, 2, 4, 4, 6, 6, 8, 8]
    assert schedule.samples_before(9) == 28
    assert schedule.batch_sizes == (2, 4, 6, 8)


@given(st.integers(1, 8), st.integers(1, 5), st.integers(0, 6), st.integers(1, 200))
def test_ramp_is_megatrons(start: int, increment: int, num_increments: int, samples: int) -> None:
    size = start + increment * num_increments
    schedule = BatchSchedule(size, ramp(start, increment, samples))
    consumed = 0
    for step in range(1, 60):
        assert schedule.samples_before(step) == consumed
        level = consumed * num_increments // samples if consumed < samples else num_increments
        assert schedule.batch_size(step) == start + level * increment
        consumed += schedule.batch_size(step)


@given(st.integers(1, 8), st.integers(1, 5), st.integers(0, 6), st.integers(1, 200), st.integers(0, 60))
def test_levels_are_the_steps_one_by_one(
    start: int, increment: int, num_increments: int, samples: int, num_steps: int
) -> None:
    schedule = BatchSchedule(start + increment * num_increments, ramp(start, increment, samples))
    counts = Counter(schedule.batch_size(step) for step in range(1, num_steps + 1))
    assert schedule.levels(num_steps) == sorted(counts.items())


def test_steps_count_from_one() -> None:
    with pytest.raises(ValueError, match="count from 1"):
        BatchSchedule(4).batch_size(0)


@given(st.integers(1, 8), st.integers(1, 5), st.integers(0, 6), st.integers(1, 200), st.integers(1, 500))
def test_steps_for_samples(
    start: int, increment: int, num_increments: int, samples: int, wanted: int
) -> None:
    schedule = BatchSchedule(start + increment * num_increments, ramp(start, increment, samples))
    steps = schedule.steps_for(wanted)
    assert schedule.samples_before(steps) < wanted <= schedule.samples_before(steps + 1)
