"""How much each checkpoint counts in an average: alike, by given weights, or as in an exponential moving average."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from meditron_train.errors import UserError

_NUMBER = re.compile(r"\d{1,12}(\.\d{1,15}|/[1-9]\d{0,11})?", re.ASCII)
_TOLERANCE = Fraction(1, 10**6)
_KINDS = "uniform, ema:DECAY, or a number for each checkpoint, such as 0.5,0.25,0.25 or 1/3,1/3,1/3"


@dataclass(frozen=True)
class MergeWeights:
    """How much each checkpoint counts.

    Attributes:
        rule: as the user wrote it.
        values: one for each checkpoint in the order given, positive, with the sum 1.
    """

    rule: str
    values: tuple[float, ...]


def needs_steps(rule: str) -> bool:
    """Whether the weights follow from the steps of the checkpoints."""
    return rule.startswith("ema")


def parse_weights(rule: str, num_checkpoints: int, steps: Sequence[int] = ()) -> MergeWeights:
    """The weights of `num_checkpoints` checkpoints.

    Args:
        rule: "uniform", 1/n each. "ema:D" with 0 < D < 1, over the checkpoints in the order of their steps, whatever
            the order given: average <- D x average + (1 - D) x next, beginning with the earliest. Numbers, as decimals
            or fractions: they must sum to 1 within 1e-6 and are divided by their sum.
        steps: of the checkpoints, for "ema".

    Raises:
        UserError: the rule is none of these.
    """
    if rule == "uniform":
        return MergeWeights(rule, (1 / num_checkpoints,) * num_checkpoints)
    if needs_steps(rule):
        return MergeWeights(rule, _ema(_decay(rule), steps))
    texts = [text.strip() for text in rule.split(",")]
    if wrong := [text for text in texts if not _NUMBER.fullmatch(text)]:
        raise UserError(f"--weights: {wrong[0]!r} is not a weight; write {_KINDS}")
    if len(texts) != num_checkpoints:
        raise UserError(
            f"--weights gives {len(texts)} numbers for {num_checkpoints} checkpoints; write one for each, in order"
        )
    values = [Fraction(text) for text in texts]
    if zero := next((number for number, value in enumerate(values, 1) if not value), None):
        raise UserError(f"--weights: checkpoint {zero} has the weight 0; leave it out")
    total = sum(values, Fraction(0))
    if abs(total - 1) > _TOLERANCE:
        shares = ",".join(str((value / total).limit_denominator(10**6)) for value in values)
        raise UserError(
            f"--weights sum to {float(total):g} instead of 1; in this proportion they are {shares}"
        )
    return MergeWeights(rule, tuple(float(value / total) for value in values))


def _decay(rule: str) -> float:
    text = rule.removeprefix("ema").removeprefix(":")
    decay = float(text) if re.fullmatch(r"0?\.\d{1,15}", text) else 0.0
    if not 0 < decay < 1:
        raise UserError(
            f"--weights is {rule!r}; write ema:DECAY with a number between 0 and 1, such as ema:0.9"
        )
    return decay


def _ema(decay: float, steps: Sequence[int]) -> tuple[float, ...]:
    order = sorted(range(len(steps)), key=steps.__getitem__)
    weights = [0.0] * len(steps)
    for age, number in enumerate(reversed(order)):
        is_earliest = age == len(steps) - 1
        weights[number] = decay**age * (1.0 if is_earliest else 1 - decay)
    return tuple(weights)
