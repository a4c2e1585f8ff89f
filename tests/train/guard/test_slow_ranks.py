from __future__ import annotations

from meditron_train.train.guard.slow_ranks import slow_ranks

HOSTS = ["n1", "n1", "n2", "n2"]


def test_a_slow_rank_is_named_with_its_host():
    (slow,) = slow_ranks([1.0, 1.1, 1.0, 1.6], [0, 0, 0, 0], HOSTS, 1.3)
    assert str(slow).startswith("rank 3 on host n2 is slow: 1.6 s")
    assert "1.6 times" in str(slow)


def test_nobody_is_slow_when_all_are_alike():
    assert slow_ranks([1.0, 1.1, 1.2, 1.0], [0, 0, 0, 0], HOSTS, 1.3) == []


def test_of_two_peers_the_slower_one_is_named():
    assert [slow.rank for slow in slow_ranks([1.0, 2.0], [0, 0], HOSTS, 1.3)] == [1]


def test_stages_of_a_pipeline_have_different_work():
    assert slow_ranks([1.0, 1.0, 3.0, 3.0], [0, 0, 1, 1], HOSTS, 1.3) == []
