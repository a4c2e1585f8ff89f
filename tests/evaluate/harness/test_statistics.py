from __future__ import annotations

import math

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


def test_equal_models_do_not_differ():
    assert paired_test([True, False], [True, False]).p_value == 1.0
