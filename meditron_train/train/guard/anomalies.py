"""What is unusual in the numbers of a step: a loss or a gradient norm that is not finite, a spike, an explosion.

All ranks have bit-identical numbers and the same history, so all reach the same verdict without communicating.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable

from meditron_train.config.schema import ResilienceSection
from meditron_train.train.engine import StepResult

_LEAST_HISTORY = 10  # steps before anything but NaN and infinity can be unusual
_LEAST_SPREAD = 0.01  # of the mean: a loss that barely moves has no meaningful standard deviation


class AnomalyMonitor:
    """Remembers loss and gradient norm of the last `anomaly_window` good steps.

    Args:
        history: (loss, gradient norm) of past steps, the oldest first, as a checkpoint kept them.
    """

    def __init__(self, settings: ResilienceSection, history: Iterable[tuple[float, float]] = ()) -> None:
        self._settings = settings
        self._history = deque(history, maxlen=settings.anomaly_window)

    @property
    def history(self) -> list[tuple[float, float]]:
        return list(self._history)

    def add(self, result: StepResult) -> None:
        """Count a step among the usual ones."""
        self._history.append((result.loss, result.grad_norm))

    def problem(self, result: StepResult) -> str | None:
        """What is wrong with a step that has not changed the weights yet, in words; None: nothing."""
        if not result.is_finite:
            return f"is not finite (loss {result.loss:g}, gradient norm {result.grad_norm:g})"
        if len(self._history) < _LEAST_HISTORY:
            return None
        return self._loss_spike(result.loss) or self._gradient_explosion(result.grad_norm)

    def _loss_spike(self, loss: float) -> str | None:
        losses = [past for past, _ in self._history]
        mean = statistics.fmean(losses)
        spread = max(statistics.pstdev(losses), _LEAST_SPREAD * abs(mean))
        limit = self._settings.loss_spike_sigma
        if limit == 0 or loss <= mean + limit * spread:
            return None
        sigma = (loss - mean) / spread if spread else math.inf
        return f"has a loss spike: {loss:.4g}, {sigma:.1f} standard deviations above the mean {mean:.4g}"

    def _gradient_explosion(self, grad_norm: float) -> str | None:
        median = statistics.median(past for _, past in self._history)
        limit = self._settings.grad_norm_factor
        if limit == 0 or grad_norm <= limit * median:
            return None
        return f"has an exploding gradient: norm {grad_norm:.4g}, the median is {median:.4g}"
