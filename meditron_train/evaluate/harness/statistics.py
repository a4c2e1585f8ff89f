"""Uncertainty of scores: bootstrap intervals and a paired test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 10_000
_SEED = 1234


def bootstrap_interval(correct: Sequence[float]) -> tuple[float, float]:
    """95 % percentile interval of the mean over items (Efron 1979), the same for the same items.

    Args:
        correct: 1 or 0 for each item, or its mean over seeds.
    """
    values = np.asarray(correct, dtype=np.float64)
    generator = np.random.default_rng(_SEED)
    means = np.empty(_RESAMPLES)
    for number in range(_RESAMPLES):
        means[number] = values[generator.integers(0, len(values), len(values))].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class PairedTest:
    """Items that only one of two models answers, and the two-sided p-value of the exact sign test on them
    (McNemar 1947)."""

    only_first: int
    only_second: int
    p_value: float


def paired_test(first: Sequence[bool], second: Sequence[bool]) -> PairedTest:
    """Are two models equally good on the same items? `first[i]` and `second[i]` are of the same item."""
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    n, fewer = only_first + only_second, min(only_first, only_second)
    return PairedTest(only_first, only_second, min(1.0, 2 * _lower_tail(n, fewer)))


def _lower_tail(n: int, most: int) -> float:
    """The probability of at most `most` heads in n throws of a fair coin, `most` at most n / 2.

    From the largest term down, each by its ratio to the one above: no number is as large as the binomial coefficients.
    """
    log_largest = math.lgamma(n + 1) - math.lgamma(most + 1) - math.lgamma(n - most + 1) - n * math.log(2)
    total = term = 1.0
    for k in range(most, 0, -1):
        term *= k / (n - k + 1)
        total += term
        if term < 1e-18 * total:
            break
    return math.exp(log_largest) * total
