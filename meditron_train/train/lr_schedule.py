"""The learning rate of a step: a pure function, so that a resume needs no state of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from meditron_train.config.schema import Config
from meditron_train.config.training import OptimizerSection, ScheduleSection

_LEAST_JUMP = 0.1  # relative: what changes less need not be said


def learning_rate(
    step: int, schedule: ScheduleSection, optimizer: OptimizerSection, total_steps: int
) -> float:
    """The learning rate of `step`, which counts from 1 to `total_steps`.

    With W warm-up steps, peak `lr` and `min_lr`:

    - warm-up, step k <= W:  lr * k / W, so that step W has the peak (W = 0: no warm-up).
    - cosine, to step D = decay_steps (default total_steps), with p = (k - W) / (D - W):
      min_lr + (lr - min_lr) * (1 + cos(pi * p)) / 2;  min_lr after D.
    - linear: min_lr + (lr - min_lr) * (1 - p), with the same p;  min_lr after D.
    - constant: lr.
    - wsd: lr, and over the last D = decay_steps steps (default a tenth of total_steps) linearly down, with
      p = (k - S) / D, where S = total_steps - D is the last stable step (or W, if the warm-up ends later).

    So the last step of a decay has exactly min_lr, unless the warm-up takes all the steps. Steps beyond
    total_steps keep the value of the end.

    Raises:
        ValueError: the step is below 1.
    """
    if step < 1:
        raise ValueError(f"steps count from 1, there is no step {step}")
    warmup_steps = _warmup_steps(schedule, total_steps)
    if step <= warmup_steps:
        return optimizer.lr * step / warmup_steps
    if schedule.kind == "constant":
        return optimizer.lr
    decay_start, decay_end = _decay_span(schedule, warmup_steps, total_steps)
    if step >= decay_end:
        return optimizer.min_lr
    progress = max(0, step - decay_start) / (decay_end - decay_start)
    if schedule.kind == "cosine":
        remaining = (1 + math.cos(math.pi * progress)) / 2
    else:
        remaining = 1 - progress
    return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * remaining


def changed_rates(step: int, before: Mapping[str, Any] | None, config: Config) -> tuple[float, float] | None:
    """The learning rates of `step` with the settings `before` and with those of `config`, where they differ by
    more than a tenth; else None.

    Args:
        before: a configuration as a checkpoint keeps it; one of an unknown version gives None.
    """
    try:
        old = learning_rate(
            step,
            ScheduleSection.model_validate((before or {})["schedule"]),
            OptimizerSection.model_validate((before or {})["optimizer"]),
            int((before or {})["train"]["steps"]),
        )
    except (KeyError, TypeError, ValueError, ValidationError):
        return None
    new = learning_rate(step, config.schedule, config.optimizer, config.train.steps)
    return (old, new) if abs(new - old) > _LEAST_JUMP * max(old, new) else None


def _warmup_steps(schedule: ScheduleSection, total_steps: int) -> int:
    if schedule.warmup_fraction is not None:
        return round(schedule.warmup_fraction * total_steps)
    return schedule.warmup_steps or 0


def _decay_span(schedule: ScheduleSection, warmup_steps: int, total_steps: int) -> tuple[int, int]:
    """The last step with the peak and the first with min_lr."""
    if schedule.kind == "wsd":
        decay_steps = schedule.decay_steps or max(1, total_steps // 10)
        return max(warmup_steps, total_steps - decay_steps), total_steps
    return warmup_steps, schedule.decay_steps or total_steps
