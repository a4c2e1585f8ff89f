from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from meditron_train.data.order import Blend, SourceOrder, held_out, integer_weights, stream_seed
from tests.native.test_packing import index_bytes, token_file


class TestHeldOut:
    def test_depends_on_seed_and_document_number_alone(self) -> None:
        short, long = held_out(1000, 0.1, 5), held_out(20_000, 0.1, 5)
        assert np.array_equal(short, long[:1000])
        assert not np.array_equal(long, held_out(20_000, 0.1, 6))
        assert 0.09 < long.mean() < 0.11

    def test_a_larger_share_contains_a_smaller_one(self) -> None:
        assert not (held_out(5000, 0.05, 1) & ~held_out(5000, 0.2, 1)).any()

    def test_none(self) -> None:
        assert not held_out(1000, 0.0, 1).any()


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
