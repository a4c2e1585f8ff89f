from __future__ import annotations

import math
from fractions import Fraction

import pytest

from meditron_train.evaluate.harness.statistics import bootstrap_interval, paired_test


def test_the_interval_is_near_the_normal_one_for_many_items():
    correct = [1.0] * 600 + [0.0] * 400
    low, high = bootstrap_interval(correct)
    half = 1.96 * math.sqrt(0.6 * 0.4 / 1000)
    assert low == pytest.approx(0.6 - half, abs=0.003)
    assert high == pytest.approx(0.6 + half, abs=0.003)
    assert bootstrap_interval(correct) == (low, high)


def test_the_sign_test_by_hand():
    """Of 8 items that only one model answers, the second answers 7: p = 2 (1 + 8) / 2^8."""
    first = [True] + [False] * 7 + [True] * 5 + [False] * 3
    second = [False] + [True] * 7 + [True] * 5 + [False] * 3
    test = paired_test(first, second)
    assert (test.only_first, test.only_second) == (1, 7)
    assert test.p_value == pytest.approx(2 * 9 / 256)


@pytest.mark.parametrize("n", [1, 2, 7, 60, 999])
def test_the_sign_test_is_the_exact_one(n):
    for fewer in {0, n // 3, n // 2}:
        exact = 2 * sum(Fraction(math.comb(n, k), 2**n) for k in range(fewer + 1))
        test = paired_test([True] * fewer + [False] * (n - fewer), [False] * fewer + [True] * (n - fewer))
        assert test.p_value == pytest.approx(float(min(exact, 1)), rel=1e-11)


def test_the_sign_test_of_very_many_items():
    """Against the normal approximation with its correction for continuity, which is close for so many."""
    n, fewer = 800_000, 399_000
    test = paired_test([True] * fewer + [False] * (n - fewer), [False] * fewer + [True] * (n - fewer))
    z = (n / 2 - fewer - 0.5) / (math.sqrt(n) / 2)
    assert test.p_value == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-3)


def test_equal_models_do_not_differ():
    assert paired_test([True, False], [True, False]).p_value == 1.0
