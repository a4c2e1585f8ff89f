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
    tail = sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n
    return PairedTest(only_first, only_second, min(1.0, 2 * tail))
