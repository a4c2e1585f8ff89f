from __future__ import annotations

import bisect
import struct
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meditron_train.native import packing


def naive_best_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """Number of bins, one document at a time."""
    space: list[int] = []  # sorted
    for length in sorted(lengths, reverse=True):
        place = bisect.bisect_left(space, length)
        left = capacity if place == len(space) else space.pop(place)
        bisect.insort(space, left - length)
    return len(space)


class SplitMix64:
    def __init__(self, seed: int) -> None:
        self.state = seed

    def next(self) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) % 2**64
        z = self.state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)


@st.composite
def documents(draw: st.DrawFn, smallest: int = 1) -> tuple[list[int], int]:
    capacity = draw(st.integers(1, 64))
    return draw(st.lists(st.integers(smallest, capacity), max_size=120)), capacity


class TestBestFit:
    @given(documents())
    @settings(max_examples=300, deadline=None)
    def test_each_document_once_within_capacity_in_as_few_bins(self, case: tuple[list[int], int]) -> None:
        lengths, capacity = case
        order, offsets = packing.pack_best_fit(lengths, capacity)
        assert sorted(order.tolist()) == list(range(len(lengths)))
        assert offsets[0] == 0
        assert offsets[-1] == len(lengths)
        bins = [[lengths[i] for i in order[a:b]] for a, b in pairwise(offsets)]
        assert all(0 < sum(members) <= capacity for members in bins)
        assert all(members == sorted(members, reverse=True) for members in bins)
        assert len(bins) == naive_best_fit_decreasing(lengths, capacity)

    @given(documents(smallest=0))
    @settings(max_examples=50, deadline=None)
    def test_empty_documents_are_kept(self, case: tuple[list[int], int]) -> None:
        lengths, capacity = case
        order, offsets = packing.pack_best_fit(lengths, capacity)
        assert sorted(order.tolist()) == list(range(len(lengths)))
        expected = naive_best_fit_decreasing([length for length in lengths if length], capacity)
        assert len(offsets) - 1 == max(expected, 1 if lengths else 0)

    def test_long_samples_sort_by_comparison_with_the_same_bins(self) -> None:
        rng = np.random.default_rng(0)
        capacity = 1 << 30
        lengths = rng.integers(1, capacity, 3000)
        order, offsets = packing.pack_best_fit(lengths, capacity)
        sums = np.add.reduceat(lengths[order], offsets[:-1])
        assert sums.max() <= capacity
        assert len(offsets) - 1 == naive_best_fit_decreasing(lengths.tolist(), capacity)

    def test_realistic_lengths(self) -> None:
        rng = np.random.default_rng(1)
        lengths = np.clip(rng.lognormal(5.8, 0.9, 20_000).astype(np.int64), 1, 4096)
        order, offsets = packing.pack_best_fit(lengths, 4096)
        assert np.array_equal(np.sort(order), np.arange(20_000))
        assert np.add.reduceat(lengths[order], offsets[:-1]).max() <= 4096
        assert len(offsets) - 1 == naive_best_fit_decreasing(lengths.tolist(), 4096)

    def test_same_answer_every_time(self) -> None:
        lengths = np.random.default_rng(2).integers(1, 100, 5000)
        first, second = (packing.pack_best_fit(lengths, 128) for _ in range(2))
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))

    def test_nothing(self) -> None:
        order, offsets = packing.pack_best_fit([], 8)
        assert order.tolist() == []
        assert offsets.tolist() == [0]

    @pytest.mark.parametrize(
        ("lengths", "capacity", "message"),
        [
            ([3, 9], 8, "length 9 of document 1"),
            ([3, -1], 8, "length -1 of document 1"),
            ([3], 0, "capacity must be at least 1"),
            ([3], -(2**63), "capacity must be at least 1"),
            ([2**62], 1 << 40, "length 4611686018427387904"),
            ([0.5], 8, "must be integers"),
            ([[1]], 8, "one dimension"),
            (np.array([2**63], dtype=np.uint64), 8, "64-bit signed"),
        ],
    )
    def test_bad_input(self, lengths: list[int], capacity: int, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            packing.pack_best_fit(lengths, capacity)


class TestPermutation:
    @pytest.mark.parametrize("n", [0, 1, 2, 7, 100])
    def test_is_fisher_yates_on_splitmix64(self, n: int) -> None:
        random, expected = SplitMix64(42), list(range(n))
        for i in range(n, 1, -1):  # no draw is rejected for numbers this small, or the test would fail
            j = random.next() * i >> 64
            expected[i - 1], expected[j] = expected[j], expected[i - 1]
        assert packing.permutation(n, 42).tolist() == expected

    def test_all_orders_are_equally_likely(self) -> None:
        counts: dict[tuple[int, ...], int] = {}
        for seed in range(6000):
            order = tuple(packing.permutation(3, seed * 7919).tolist())
            counts[order] = counts.get(order, 0) + 1
        assert len(counts) == 6
        assert all(850 < count < 1150 for count in counts.values())  # five standard deviations

    def test_refuses_a_negative_size(self) -> None:
        with pytest.raises(ValueError, match="cannot order -1"):
            packing.permutation(-1, 0)


class TestConcat:
    @given(st.lists(st.integers(0, 30), max_size=30), st.integers(1, 20), st.integers(0, 99))
    @settings(max_examples=200, deadline=None)
    def test_cuts_the_stream_every_seq_len(self, lengths: list[int], seq_len: int, seed: int) -> None:
        order = packing.permutation(len(lengths), seed)
        boundaries = packing.concat_index(lengths, order, seq_len)
        num_samples = len(boundaries) - 1
        assert num_samples == -(-sum(lengths) // seq_len)
        stream = [(document, start) for document in order.tolist() for start in range(lengths[document])]
        array = np.array(lengths, dtype=np.int64)
        segments, offsets = packing.concat_segments(array, order, boundaries, range(num_samples))
        for sample in range(num_samples):
            rows = segments[offsets[sample] : offsets[sample + 1]].tolist()
            tokens = [(document, start + i) for document, start, length in rows for i in range(length)]
            assert tokens == stream[sample * seq_len : (sample + 1) * seq_len]
            assert len({document for document, _, _ in rows}) == len(rows)

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="seq_len"):
            packing.concat_index([1], [0], 0)
        with pytest.raises(IndexError, match="document 1 does not exist"):
            packing.concat_index([1], [1], 4)
        with pytest.raises(ValueError, match="negative length"):
            packing.concat_index([-1], [0], 4)
        lengths, order = np.array([5]), np.array([0])
        boundaries = packing.concat_index(lengths, order, 4)
        for sample in (-1, 2):
            with pytest.raises(IndexError, match="does not exist"):
                packing.concat_segments(lengths, order, boundaries, [sample])
        with pytest.raises(IndexError, match="does not belong"):
            packing.concat_segments(lengths, order[:0], boundaries, [0])

    @given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 16))
    @settings(deadline=None)
    def test_cut_documents(self, lengths: list[int], seq_len: int) -> None:
        documents, starts, sizes = packing.cut_documents(lengths, range(len(lengths)), seq_len)
        expected = [
            (document, start, min(seq_len, length - start))
            for document, length in enumerate(lengths)
            for start in range(0, length, seq_len)
        ]
        assert list(zip(documents.tolist(), starts.tolist(), sizes.tolist(), strict=True)) == expected


class TestBlend:
    @given(st.lists(st.integers(1, 1000), min_size=1, max_size=12), st.integers(0, 150), st.integers(0, 150))
    @settings(max_examples=100, deadline=None)
    def test_error_stays_below_one_sample_at_every_prefix(
        self, weights: list[int], first: int, more: int
    ) -> None:
        taken = np.zeros(len(weights), dtype=np.int64)
        sources, indices, taken = packing.blend(weights, taken, first)
        more_sources, more_indices, _ = packing.blend(weights, taken, more)  # continued from its counts
        sources, indices = np.concatenate([sources, more_sources]), np.concatenate([indices, more_indices])
        whole = packing.blend(weights, [0] * len(weights), first + more)
        assert np.array_equal(whole[0], sources)
        assert np.array_equal(whole[1], indices)
        counts = [0] * len(weights)
        for n, (source, index) in enumerate(zip(sources.tolist(), indices.tolist(), strict=True), 1):
            assert index == counts[source]
            counts[source] += 1
            for weight, count in zip(weights, counts, strict=True):
                assert abs(count - Fraction(n * weight, sum(weights))) < 1

    def test_one_large_and_many_small_sources(self) -> None:
        weights = [1000] + [1] * 1000  # taking the largest error first leaves this bound
        sources = packing.blend(weights, [0] * 1001, 4500)[0]
        one_hot = np.zeros((4500, 1001), dtype=np.int64)
        one_hot[np.arange(4500), sources] = 1
        counts = one_hot.cumsum(axis=0)
        error = counts * 2000 - np.arange(1, 4501)[:, None] * np.array(weights)
        assert np.abs(error).max() < 2000

    def test_is_exact_far_out(self) -> None:
        weights = [2**61, 2**61 - 1, 1]
        n = 2**61
        taken = [n // 2, n // 2, 0]
        sources, indices, _ = packing.blend(weights, taken, 4)
        assert sorted(sources.tolist()) == [0, 0, 1, 1]
        assert indices.min() == n // 2

    @pytest.mark.parametrize(
        ("weights", "taken", "count", "message"),
        [
            ([], [], 1, "no source"),
            ([0], [0], 1, "weight of at least 1"),
            ([1], [-1], 1, "count of at least 0"),
            ([2**62, 1], [0, 0], 1, "2\\^62"),
            ([1, 1], [0], 1, "differ in length"),
            ([1], [0], -1, "cannot draw"),
        ],
    )
    def test_bad_input(self, weights: list[int], taken: list[int], count: int, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            packing.blend(weights, taken, count)


def index_bytes(code: int, sizes: list[int], pointers: list[int], documents: list[int]) -> bytes:
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sizes), len(documents))
    arrays = (np.array(sizes, "<i4"), np.array(pointers, "<i8"), np.array(documents, "<i8"))
    return header + b"".join(array.tobytes() for array in arrays)


def token_file(idx: bytes, content: bytes) -> packing.TokenFile:
    return packing.TokenFile(np.frombuffer(idx, np.uint8), np.frombuffer(content, np.uint8))


class TestTokenFile:
    def test_documents_of_several_sequences(self) -> None:
        idx = index_bytes(8, [2, 3, 0, 1], [0, 4, 10, 10], [0, 2, 2, 3, 4])
        file = token_file(idx, bytes(12))
        assert (file.num_sequences, file.num_documents, file.num_tokens) == (4, 4, 6)
        assert file.document_lengths().tolist() == [5, 0, 0, 1]
        assert file.document(0) == (0, 5)
        assert file.document(3) == (10, 1)
        for index in (-1, 4):
            with pytest.raises(IndexError, match="does not exist"):
                file.document(index)

    @pytest.mark.parametrize(
        ("idx", "content", "message"),
        [
            (b"", b"", "header alone needs 34"),
            (b"x" * 40, b"", "does not begin with MMIDIDX"),
            (b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 2, 8, 0, 1) + bytes(8), b"", "version 2"),
            (index_bytes(7, [], [], [0]), b"", "floating-point"),
            (index_bytes(9, [], [], [0]), b"", "dtype code 9"),
            (b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2**64 - 1, 9), b"", f"announces {2**64 - 1}"),
            (index_bytes(8, [1], [0], [0, 1])[:-1], b"ab", "which take 62 bytes, but has 61"),
            (index_bytes(8, [1], [0], []), b"ab", "no document indices"),
            (index_bytes(8, [1], [0], [0, 1]), b"abcd", "describes 2 bytes of tokens but the .bin has 4"),
            (index_bytes(8, [3], [0], [0, 1]), b"ab", "describes 6 bytes of tokens but the .bin has 2"),
            (index_bytes(8, [1], [2**63 - 1], [0, 1]), b"ab", "more than 2\\^62"),
            (index_bytes(8, [-1], [0], [0, 1]), b"", "size -1"),
            (index_bytes(8, [1], [-2], [0, 1]), b"", "at byte -2"),
            (index_bytes(8, [1], [0], [1, 1]), b"ab", "run from 1 to 1"),
            (index_bytes(8, [1], [0], [0, 2]), b"ab", "run from 0 to 2"),
            (index_bytes(8, [1], [0], [0, 2, 1]), b"ab", "document 0 of the .idx has sequences 0 to 2"),
            (index_bytes(8, [1], [0], [0, -1, 1]), b"ab", "document 0"),
            (index_bytes(8, [1, 1], [2, 0], [0, 2]), b"abcd", "do not lie one after the other"),
        ],
    )
    def test_corrupt_index(self, idx: bytes, content: bytes, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            token_file(idx, content)

    @given(st.data())
    @settings(max_examples=400, deadline=None)
    def test_random_damage_raises_or_stays_inside(self, data: st.DataObject) -> None:
        idx = bytearray(index_bytes(8, [2, 3, 1], [0, 4, 10], [0, 1, 3]))
        for _ in range(data.draw(st.integers(1, 3))):
            idx[data.draw(st.integers(0, len(idx) - 1))] = data.draw(st.integers(0, 255))
        cut = data.draw(st.integers(0, len(idx)))
        idx = idx[: cut if cut < 10 else len(idx)]
        try:
            file = token_file(bytes(idx), bytes(12))
        except ValueError:
            return
        item_size = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}[file.dtype_code]
        for index in range(file.num_documents):
            first_byte, length = file.document(index)
            assert 0 <= first_byte <= first_byte + length * item_size <= 12

    def test_wrong_kind_of_array(self) -> None:
        with pytest.raises(TypeError):
            packing.TokenFile(np.zeros(34), np.zeros(1))


class TestGather:
    def run(
        self,
        segments: list[list[int]],
        offsets: list[int],
        seq_len: int = 4,
        size: int = 4,
        **changes: np.ndarray,
    ) -> tuple[packing.Gathered, dict[str, np.ndarray]]:
        content = np.array([10, 11, 12, 13, 14, 20], dtype="<u2")
        file = token_file(index_bytes(8, [5, 1], [0, 10], [0, 1, 2]), content.tobytes())
        arrays = {
            "tokens": np.full(size, -7, dtype=np.int64),
            "labels": np.full(size, -7, dtype=np.int64),
            "loss_mask": np.full(size, -7, dtype=np.float32),
            "positions": np.full(size, -7, dtype=np.int64),
        } | changes
        table = np.array(segments, dtype=np.int64).reshape(-1, 4)
        return packing.gather([file], table, np.array(offsets), seq_len, 100, **arrays), arrays

    def test_a_cut_document_a_short_one_and_padding(self) -> None:
        result, arrays = self.run([[0, 0, 1, 2], [0, 1, 0, 1]], [0, 2])
        assert arrays["tokens"].tolist() == [11, 12, 20, 0]
        assert arrays["labels"].tolist() == [12, 13, 0, 0]
        assert arrays["loss_mask"].tolist() == [1, 1, 0, 0]
        assert arrays["positions"].tolist() == [0, 1, 0, 0]
        assert result.cu_seqlens.tolist() == [0, 2, 3, 4]
        assert result.bad_segment == -1

    def test_no_sample_and_empty_sample(self) -> None:
        assert self.run([], [0], size=0)[0].cu_seqlens.tolist() == [0]
        result, arrays = self.run([], [0, 0])
        assert result.cu_seqlens.tolist() == [0, 4]
        assert arrays["tokens"].tolist() == [0] * 4
        assert arrays["positions"].tolist() == [0, 1, 2, 3]

    def test_names_the_segment_with_a_bad_token(self) -> None:
        file = token_file(index_bytes(4, [3], [0], [0, 1]), np.array([1, 2, -1], dtype="<i4").tobytes())
        for vocab_size, token, length in ((2, 2, 1), (2, 2, 2), (0, -1, 2), (3, -1, 3)):
            arrays = {name: np.zeros(4, np.int64) for name in ("tokens", "labels", "positions")}
            result = packing.gather(
                [file], np.array([[0, 0, 0, length]]), np.array([0, 1]), 4, vocab_size,
                loss_mask=np.zeros(4, np.float32), **arrays,
            )  # fmt: skip
            assert (result.bad_segment, result.bad_token) == (0, token)  # a label counts too

    @pytest.mark.parametrize(
        "segment",
        [[1, 0, 0, 1], [-1, 0, 0, 1], [0, 2, 0, 1], [0, -1, 0, 1], [0, 0, -1, 2], [0, 0, 0, 0],
         [0, 0, 4, 2], [0, 0, 0, 5], [0, 0, 2**63 - 1, 2], [0, 0, 0, 2**63 - 1], [0, 0, 0, -1]],
    )  # fmt: skip
    def test_never_reads_or_writes_outside(self, segment: list[int]) -> None:
        with pytest.raises(IndexError):
            self.run([segment], [0, 1])

    @pytest.mark.parametrize("offsets", [[0, 2], [-1, 1], [1, 0], [0, 2**62]])
    def test_bad_offsets(self, offsets: list[int]) -> None:
        with pytest.raises(IndexError, match="offsets"):
            self.run([[0, 0, 0, 1]], offsets)

    def test_wrong_outputs(self) -> None:
        with pytest.raises(ValueError, match="labels has 3 elements instead of 4"):
            self.run([], [0, 0], labels=np.zeros(3, np.int64))
        with pytest.raises(TypeError):
            self.run([], [0, 0], labels=np.zeros(4, np.int32))
        read_only = np.zeros(4, np.int64)
        read_only.flags.writeable = False
        with pytest.raises(ValueError, match="writeable"):
            self.run([], [0, 0], labels=read_only)
        with pytest.raises(ValueError, match="2\\^31"):
            self.run([], [0, 0], seq_len=2**31)
        with pytest.raises(ValueError, match="2\\^31"):
            self.run([], [0, 0], seq_len=0)
