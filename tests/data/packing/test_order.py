from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from meditron_train.data.packing.order import Blend, PhasedBlend, SourceOrder, integer_weights, stream_seed
from tests.native.test_packing import index_bytes, token_file


def test_seeds_of_different_uses_differ() -> None:
    seeds = {stream_seed(seed, *words) for seed in (1, 2) for words in (("a",), ("a", 1), ("b", 1), ("a1",))}
    assert len(seeds) == 8


class TestIntegerWeights:
    def test_exact(self) -> None:
        assert integer_weights([Fraction("0.7"), Fraction("0.2"), Fraction("0.1")]) == [7, 2, 1]

    def test_awkward_numbers_stay_in_proportion(self) -> None:
        weights = [Fraction(1, 2**61 - 1), Fraction(1, 3), Fraction(10**30)]
        whole = integer_weights(weights)
        assert sum(whole) <= 2**62
        assert min(whole) >= 1


class TestBlend:
    def test_random_access_equals_one_pass(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Blend, "block_size", 16)
        forward = Blend([5, 2, 1])
        sources, indices = forward.locate(np.arange(200))
        expected = list(zip(sources.tolist(), indices.tolist(), strict=True))
        for numbers in ([199], [3], [77, 120], [120, 3, 15, 16]):
            sources, indices = Blend([5, 2, 1]).locate(np.array(numbers))
            found = list(zip(sources.tolist(), indices.tolist(), strict=True))
            assert found == [expected[n] for n in numbers]
        for source in range(3):  # every source's samples are counted through
            numbers = [index for chosen, index in expected if chosen == source]
            assert numbers == list(range(len(numbers)))


def source_order(
    lengths: ArrayLike, documents: ArrayLike, packing: str, seq_len: int, seed: int
) -> SourceOrder:
    """Of documents of these lengths; what they say does not matter."""
    sizes = np.asarray(lengths, dtype=np.int64)
    pointers = (np.cumsum(sizes) - sizes).tolist()
    file = token_file(
        index_bytes(1, sizes.tolist(), pointers, range(len(sizes) + 1)), bytes(int(sizes.sum()))
    )
    return SourceOrder(file, sizes, np.asarray(documents, dtype=np.int64), packing, seq_len, seed)


def collect(order: SourceOrder, epoch: int) -> list[list[tuple[int, int, int]]]:
    first = epoch * order.samples_per_epoch
    return [
        [tuple(row) for row in order.segments(index).tolist()]
        for index in range(first, first + order.samples_per_epoch)
    ]


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=40).filter(any),
    st.integers(1, 16),
    st.sampled_from(["concat", "best_fit"]),
    st.integers(0, 2),
)
@settings(max_examples=200, deadline=None)
def test_every_token_once_per_epoch(lengths: list[int], seq_len: int, packing: str, epoch: int) -> None:
    order = source_order(lengths, np.arange(len(lengths)), packing, seq_len, seed=3)
    samples = collect(order, epoch)
    tokens = sorted((d, start + i) for rows in samples for d, start, length in rows for i in range(length))
    assert tokens == [(d, i) for d, length in enumerate(lengths) for i in range(length)]
    assert all(0 < sum(length for _, _, length in rows) <= seq_len for rows in samples)
    if packing == "best_fit":
        whole = {(d, 0, length) for d, length in enumerate(lengths) if 0 < length <= seq_len}
        assert whole <= {row for rows in samples for row in rows}
        assert {start % seq_len for rows in samples for _, start, _ in rows} == {0}
    else:
        sizes = sorted(sum(length for _, _, length in rows) for rows in samples)
        assert sizes[1:] == [seq_len] * (len(sizes) - 1)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_epochs_and_seeds_differ_but_asking_again_does_not(packing: str) -> None:
    lengths = np.random.default_rng(0).integers(1, 30, 200)
    documents = np.arange(200, dtype=np.int64)
    order, again, other = (source_order(lengths, documents, packing, 32, seed) for seed in (1, 1, 2))
    epochs = [collect(order, epoch) for epoch in (0, 1, 2)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert [collect(again, epoch) for epoch in (2, 0, 1)] == [epochs[2], epochs[0], epochs[1]]
    assert collect(other, 0) != epochs[0]


def test_only_the_chosen_documents() -> None:
    lengths = np.array([3, 4, 5, 6])
    for packing in ("concat", "best_fit"):
        order = source_order(lengths, [1, 3], packing, 8, seed=1)
        assert order.num_tokens == 10
        assert {d for rows in collect(order, 0) for d, _, _ in rows} == {1, 3}


class TestPhasedBlend:
    def test_sources_go_on_where_the_phase_before_left_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Blend, "block_size", 16)
        blend = PhasedBlend([(0, [3, 1, 0]), (50, [0, 1, 1]), (90, [1, 1, 1])])
        sources, indices = blend.locate(np.arange(150))
        for source in range(3):  # every sample of a source once, in order
            assert indices[sources == source].tolist() == list(range((sources == source).sum()))
        assert np.bincount(sources[:50], minlength=3).tolist() in ([37, 13, 0], [38, 12, 0])
        assert np.bincount(sources[50:90], minlength=3).tolist() == [0, 20, 20]
        assert np.bincount(sources[90:], minlength=3).tolist() == [20, 20, 20]
        for count in (0, 1, 49, 50, 51, 90, 91, 150):
            assert blend.taken(count).tolist() == np.bincount(sources[:count], minlength=3).tolist()
        for numbers in ([149], [49, 50], [120, 3, 90, 60]):  # in any order
            again = PhasedBlend(blend.phases).locate(np.array(numbers))
            assert (again[0] == sources[numbers]).all() and (again[1] == indices[numbers]).all()

    def test_one_phase_is_a_blend(self) -> None:
        numbers = np.arange(1000)
        for ours, theirs in zip(
            PhasedBlend([(0, [5, 2, 1])]).locate(numbers), Blend([5, 2, 1]).locate(numbers), strict=True
        ):
            assert (ours == theirs).all()
