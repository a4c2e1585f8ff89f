"""How many samples each step takes: a constant global batch, or one that grows at the start of training."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

from meditron_train.config.training import BatchRamp, TrainSection


@dataclass(frozen=True)
class _Level:
    first_step: int
    first_sample: int
    batch_size: int


@dataclass(frozen=True)
class BatchSchedule:
    """Global batch size by step (steps count from 1). A pure function of its arguments, which `check_config`
    has found to fit together.

    With a ramp, the `samples` are divided evenly among the sizes start, start + increment, … below
    global_batch_size (Megatron-LM's --rampup-batch-size); a size changes at the first step that begins at or
    after its share.
    """

    global_batch_size: int
    ramp: BatchRamp | None = None

    @classmethod
    def of(cls, train: TrainSection) -> BatchSchedule:
        """How many samples each step of the run takes."""
        return cls(train.global_batch_size, train.batch_ramp)

    @cached_property
    def _levels(self) -> tuple[_Level, ...]:
        if self.ramp is None:
            return (_Level(1, 0, self.global_batch_size),)
        num_increments = (self.global_batch_size - self.ramp.start) // self.ramp.increment
        levels = []
        step, sample = 1, 0
        for number in range(num_increments):
            size = self.ramp.start + number * self.ramp.increment
            share_end = -(-(number + 1) * self.ramp.samples // num_increments)  # rounded up
            num_steps = -(-(share_end - sample) // size)
            if num_steps > 0:
                levels.append(_Level(step, sample, size))
                step, sample = step + num_steps, sample + num_steps * size
        return (*levels, _Level(step, sample, self.global_batch_size))

    def _level(self, step: int) -> _Level:
        if step < 1:
            raise ValueError(f"steps count from 1, not {step}")
        return self._levels[bisect_right(self._levels, step, key=lambda level: level.first_step) - 1]

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Every global batch size that occurs, in order."""
        return tuple(level.batch_size for level in self._levels)

    def levels(self, num_steps: int) -> list[tuple[int, int]]:
        """(global batch size, steps of it) of the first `num_steps` steps, in order."""
        firsts = [min(level.first_step, num_steps + 1) for level in self._levels]
        ends = [*firsts[1:], num_steps + 1]
        counts = [end - first for first, end in zip(firsts, ends, strict=True)]
        return [(level.batch_size, count) for level, count in zip(self._levels, counts, strict=True) if count]

    def batch_size(self, step: int) -> int:
        """Samples of this step."""
        return self._level(step).batch_size

    def steps_for(self, num_samples: int) -> int:
        """The fewest steps that take at least `num_samples` samples."""
        level = next(level for level in reversed(self._levels) if level.first_sample < num_samples)
        return level.first_step - 1 + -(-(num_samples - level.first_sample) // level.batch_size)

    def samples_before(self, step: int) -> int:
        """Samples of all steps before this one: the number of its first sample."""
        level = self._level(step)
        return level.first_sample + (step - level.first_step) * level.batch_size
