from __future__ import annotations

import math

import pytest

from meditron_train.config.schema import ResilienceSection
from meditron_train.train.engine import StepResult
from meditron_train.train.guard.anomalies import AnomalyMonitor


def step(loss: float, grad_norm: float = 1.0) -> StepResult:
    return StepResult(loss=loss, num_loss_tokens=10, grad_norm=grad_norm, own_seconds=0.0)


def monitor(**settings) -> AnomalyMonitor:
    """One that has seen 20 losses with mean 2 and standard deviation 0.1, and gradient norms of 1."""
    return AnomalyMonitor(ResilienceSection(**settings), [(2 + 0.1 * (-1) ** i, 1.0) for i in range(20)])


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (step(math.nan), "not finite"),
        (step(2.0, math.inf), "not finite"),
        (step(2.61), "6.1 standard deviations above the mean 2"),
        (step(2.0, 20.1), "exploding gradient: norm 20.1"),
        (step(2.59), None),
        (step(0.1), None),  # a loss that falls is no anomaly
        (step(2.0, 19.9), None),
    ],
)
def test_what_is_unusual(result, said):
    problem = monitor().problem(result)
    assert problem is None if said is None else said in problem


def test_zero_turns_it_off_but_not_for_nan():
    silent = monitor(loss_spike_sigma=0, grad_norm_factor=0)
    assert silent.problem(step(1e6, 1e6)) is None
    assert "not finite" in silent.problem(step(math.nan))


def test_nothing_is_unusual_before_there_is_a_history():
    fresh = AnomalyMonitor(ResilienceSection())
    for _ in range(9):
        assert fresh.problem(step(1e6)) is None
        fresh.add(step(2.0))
    fresh.add(step(2.0))
    assert "loss spike" in fresh.problem(step(1e6))


def test_a_loss_that_hardly_moves_does_not_spike_at_every_ripple():
    flat = AnomalyMonitor(ResilienceSection(), [(2.0, 1.0)] * 50)
    assert flat.problem(step(2.1)) is None
    assert flat.problem(step(2.13)) is not None


def test_the_history_survives_json():
    import json

    first = monitor()
    again = AnomalyMonitor(ResilienceSection(), json.loads(json.dumps(first.history)))
    assert again.problem(step(2.61)) == first.problem(step(2.61))
