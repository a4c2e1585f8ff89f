from __future__ import annotations

import math

import pytest
import torch

from meditron_train.config.schema import Config
from meditron_train.config.training import OptimizerSection, ScheduleSection
from meditron_train.train.lr_schedule import learning_rate

OPTIMIZER = OptimizerSection(lr=3e-4, min_lr=1e-6)
KINDS = ("cosine", "linear", "constant", "wsd")


def rates(total_steps: int, optimizer: OptimizerSection = OPTIMIZER, **schedule) -> list[float]:
    """Learning rates of step 1 .. total_steps; [k - 1] is that of step k."""
    section = ScheduleSection(**schedule)
    return [learning_rate(step, section, optimizer, total_steps) for step in range(1, total_steps + 1)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warmup_steps", [1, 7, 100])
def test_warmup_rises_linearly_from_the_first_step_and_ends_at_the_peak(kind, warmup_steps):
    values = rates(100, kind=kind, warmup_steps=warmup_steps)
    assert values[:warmup_steps] == [3e-4 * step / warmup_steps for step in range(1, warmup_steps + 1)]
    assert values[warmup_steps - 1] == 3e-4
    assert max(values) == 3e-4


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 20, 99])
def test_the_last_step_has_exactly_the_minimum(kind, warmup_steps):
    values = rates(100, kind=kind, warmup_steps=warmup_steps)
    assert values[-1] == 1e-6
    after_warmup = values[warmup_steps:]
    assert after_warmup == sorted(after_warmup, reverse=True)
    assert min(after_warmup) == 1e-6


def test_cosine_against_torch():
    values = rates(50, kind="cosine")
    weight = torch.nn.Parameter(torch.zeros(1))
    torch_optimizer = torch.optim.SGD([weight], lr=3e-4)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(torch_optimizer, T_max=50, eta_min=1e-6)
    for value in values:
        torch_optimizer.step()
        reference.step()
        assert value == pytest.approx(reference.get_last_lr()[0], rel=1e-9)


def test_cosine_after_warmup_at_its_quarters():
    values = rates(120, kind="cosine", warmup_steps=20)
    span = 3e-4 - 1e-6
    assert values[69] == pytest.approx(1e-6 + span / 2, rel=1e-12)
    assert values[44] == pytest.approx(1e-6 + span * (1 + math.sqrt(0.5)) / 2, rel=1e-12)
    assert values[94] == pytest.approx(1e-6 + span * (1 - math.sqrt(0.5)) / 2, rel=1e-12)


def test_linear():
    values = rates(110, kind="linear", warmup_steps=10)
    expected = [1e-6 + (3e-4 - 1e-6) * (110 - step) / 100 for step in range(11, 111)]
    assert values[10:] == pytest.approx(expected, rel=1e-12)


def test_constant():
    assert rates(10, kind="constant", warmup_steps=2) == [1.5e-4] + [3e-4] * 9


def test_wsd_is_stable_and_then_falls_linearly_over_the_last_tenth():
    values = rates(100, kind="wsd", warmup_steps=5)
    assert values[4:90] == [3e-4] * 86
    expected = [1e-6 + (3e-4 - 1e-6) * (10 - step) / 10 for step in range(1, 11)]
    assert values[90:] == pytest.approx(expected, rel=1e-12)


def test_wsd_with_its_own_decay_and_with_one_that_starts_inside_the_warmup():
    assert rates(100, kind="wsd", decay_steps=30)[68:71] == pytest.approx([3e-4, 3e-4, 3e-4 - 2.99e-4 / 30])
    values = rates(10, kind="wsd", warmup_steps=5, decay_steps=8)
    assert values[:5] == [3e-4 * step / 5 for step in range(1, 6)]
    assert values[5:] == pytest.approx([1e-6 + 2.99e-4 * (5 - step) / 5 for step in range(1, 6)], rel=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_an_earlier_end_of_the_decay_stays_at_the_minimum(kind):
    values = rates(100, kind=kind, warmup_steps=10, decay_steps=60)
    assert values[59:] == [1e-6] * 41
    assert values[58] > 1e-6
    assert rates(100, kind=kind, warmup_steps=10, decay_steps=5)[10:] == [1e-6] * 90


def test_a_later_end_of_the_decay_is_cut_off_by_the_end_of_the_run():
    assert rates(50, kind="linear", decay_steps=100)[-1] == pytest.approx(1e-6 + 2.99e-4 / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_warmup_for_the_whole_run_ends_at_the_peak(kind):
    assert rates(4, kind=kind, warmup_steps=4) == [3e-4 / 4, 3e-4 / 2, 3e-4 * 3 / 4, 3e-4]
    assert rates(4, kind=kind, warmup_steps=8)[-1] == 1.5e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_one_step(kind):
    assert rates(1, kind=kind) == [3e-4 if kind == "constant" else 1e-6]
    assert rates(1, kind=kind, warmup_steps=1) == [3e-4]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_steps_beyond_the_end_keep_its_value(kind):
    assert learning_rate(1000, ScheduleSection(kind=kind), OPTIMIZER, 100) == 1e-6


@pytest.mark.parametrize("step", [0, -3])
def test_there_is_no_step_below_one(step):
    with pytest.raises(ValueError, match=f"no step {step}"):
        learning_rate(step, ScheduleSection(), OPTIMIZER, 100)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "span",
    [{}, {"warmup_steps": 30}, {"warmup_fraction": 0.25}, {"decay_steps": 40}, {"warmup_fraction": 0.0}],
)
def test_defaults_are_those_of_the_configuration(kind, span):
    config = Config.model_validate(
        {
            "model": {"from": "m"},
            "data": {"tokenizer": "t", "train": [{"name": "a", "path": "a"}]},
            "schedule": {"kind": kind, **span},
            "train": {"steps": 90},
        }
    )
    explicit = ScheduleSection(kind=kind, warmup_steps=config.warmup_steps, decay_steps=config.decay_steps)
    for step in range(1, 91):
        assert learning_rate(step, config.schedule, config.optimizer, 90) == learning_rate(
            step, explicit, config.optimizer, 90
        )


def test_the_70b_recipe():
    """Peak 1.5e-4 after 2000 of 23,000 steps, down to 1e-6 by a cosine."""
    schedule = ScheduleSection(kind="cosine", warmup_steps=2000)
    optimizer = OptimizerSection(lr=1.5e-4, min_lr=1e-6)
    expected = {1: 7.5e-8, 1000: 7.5e-5, 2000: 1.5e-4, 12_500: 7.55e-5, 23_000: 1e-6}
    for step, value in expected.items():
        assert learning_rate(step, schedule, optimizer, 23_000) == pytest.approx(value, rel=1e-12)
