from __future__ import annotations

import bisect
import hashlib
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

    def test_threads_change_nothing(self) -> None:
        for capacity in (128, 1 << 23):
            lengths = np.random.default_rng(4).integers(0, 129, 700_000)
            alone = packing.pack_best_fit(lengths, capacity, num_threads=1)
            for num_threads in (2, 5):
                together = packing.pack_best_fit(lengths, capacity, num_threads=num_threads)
                assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))

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
        shuffled, in_order = packing.shuffle_documents(lengths, range(len(lengths)), seed)
        assert shuffled.tolist() == order.tolist()
        assert in_order.tolist() == [lengths[document] for document in order]
        assert shuffled.dtype == in_order.dtype == np.uint32
        boundaries = packing.concat_index(in_order, seq_len)
        assert np.array_equal(boundaries, packing.concat_index(in_order.astype(np.int64), seq_len))
        num_samples = len(boundaries) - 1
        assert num_samples == -(-sum(lengths) // seq_len)
        stream = [(document, start) for document in order.tolist() for start in range(lengths[document])]
        index = concat_samples(file_of(lengths), shuffled, boundaries, seq_len)
        for sample in range(num_samples):
            rows = index.segments(sample).tolist()
            tokens = [(document, start + i) for document, start, length in rows for i in range(length)]
            assert tokens == stream[sample * seq_len : (sample + 1) * seq_len]
            assert len({document for document, _, _ in rows}) == len(rows)

    @pytest.mark.parametrize("dtype", [np.uint32, np.int64])
    def test_threads_change_nothing(self, dtype: type) -> None:
        lengths = np.random.default_rng(3).integers(0, 3000, 600_000).astype(dtype)
        alone = packing.concat_index(lengths, 4096, num_threads=1)
        assert np.array_equal(alone, packing.concat_index(lengths, 4096, num_threads=4))
        ends = np.cumsum(lengths, dtype=np.int64)
        at = np.arange(0, ends[-1], 4096)
        positions = np.searchsorted(ends, at, side="right")
        assert np.array_equal(alone[:-1, 0], positions)
        assert np.array_equal(alone[:-1, 1], at - (ends - lengths)[positions])

    def test_numbers_beyond_32_bits(self) -> None:
        lengths = np.array([2**62, 5, 2**61])
        documents, in_order = packing.shuffle_documents(lengths, [2, 1, 0], 1)
        assert documents.dtype == in_order.dtype == np.int64
        assert np.array_equal(lengths[documents], in_order)
        assert packing.concat_index(lengths, 2**61).tolist() == [
            [0, 0],
            [0, 2**61],
            [1, 0],
            [2, 2**61 - 5],
            [3, 0],
        ]

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="seq_len"):
            packing.concat_index([1], 0)
        with pytest.raises(IndexError, match="document 1 does not exist"):
            packing.shuffle_documents([1], [1], 0)
        with pytest.raises(IndexError, match="document -1 does not exist"):
            packing.shuffle_documents([1], [-1], 0)
        with pytest.raises(ValueError, match="negative length"):
            packing.shuffle_documents([-1], [0], 0)
        with pytest.raises(ValueError, match="negative length"):
            packing.concat_index([-1], 4)
        with pytest.raises(ValueError, match="more than 2\\^63"):
            packing.concat_index([2**62, 2**62], 4)
        with pytest.raises(ValueError, match="9223372036854775807 samples, more than any memory holds"):
            packing.concat_index([2**63 - 1], 1)

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


def file_of(lengths: list[int], content: bytes | None = None, code: int = 1) -> packing.TokenFile:
    """One sequence per document, one after the other; zeros unless `content` says else."""
    item_size = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}[code]
    pointers = [item_size * sum(lengths[:i]) for i in range(len(lengths))]
    idx = index_bytes(code, lengths, pointers, list(range(len(lengths) + 1)))
    return token_file(idx, bytes(item_size * sum(lengths)) if content is None else content)


def concat_samples(
    file: packing.TokenFile, stream: np.ndarray, boundaries: np.ndarray, seq_len: int
) -> packing.SampleIndex:
    """The samples of a cut stream in their own order."""
    return packing.SampleIndex(
        file,
        stream,
        np.empty(0, np.uint32),
        boundaries.reshape(-1),
        np.arange(len(boundaries) - 1),
        seq_len,
        True,
    )


def bins(
    file: packing.TokenFile, documents: list[int], starts: list[int], offsets: list[int], seq_len: int = 4
) -> packing.SampleIndex:
    """The samples of bins in their own order."""
    arrays = (np.array(values, dtype=np.int64) for values in (documents, starts, offsets))
    return packing.SampleIndex(file, *arrays, np.arange(len(offsets) - 1), seq_len, False)


def outputs(size: int, **changes: np.ndarray) -> dict[str, np.ndarray]:
    arrays = {name: np.full(size, -7, dtype=np.int32) for name in ("tokens", "labels", "positions")}
    return arrays | {"loss_mask": np.zeros(size, dtype=bool)} | changes


class TestSampleIndex:
    FILE = staticmethod(lambda: file_of([5, 1, 0]))

    def test_sizes_are_checked(self) -> None:
        numbers = np.arange(3)
        for arguments, message in (
            ((numbers, numbers[:2], numbers, numbers[:2], 4, False), "2 starts for 3 documents"),
            ((numbers, numbers, numbers, numbers, 4, False), "3 samples needs 4 boundaries"),
            ((numbers, numbers[:0], numbers, numbers[:1], 4, True), "1 samples needs 4 boundaries"),
            ((numbers, numbers, numbers, numbers[:2], 0, False), "seq_len"),
            ((numbers.astype(np.int32), numbers, numbers, numbers[:2], 4, False), "uint32 or int64"),
            ((np.arange(6)[::2], numbers, numbers, numbers[:2], 4, False), "contiguous"),
        ):
            with pytest.raises(ValueError, match=message):
                packing.SampleIndex(self.FILE(), *arguments)

    def test_sample_that_does_not_exist(self) -> None:
        index = bins(self.FILE(), [0], [0], [0, 1])
        for sample in (-1, 1):
            with pytest.raises(IndexError, match="does not exist: there are 1"):
                index.segments(sample)

    @pytest.mark.parametrize(
        ("documents", "starts", "offsets"),
        [([3], [0], [0, 1]), ([-1], [0], [0, 1]), ([0], [-1], [0, 1]), ([0], [6], [0, 1]), ([0], [5], [0, 1]),
         ([0], [2**63 - 1], [0, 1]), ([0], [0], [0, 2]), ([0], [0], [-1, 1]), ([0], [0], [1, 0]), ([2], [0], [0, 1]),
         ([0, 1], [0, 0], [0, 2]), ([0], [0], [0, 2**62])],
    )  # fmt: skip
    def test_bins_that_do_not_fit_the_file(
        self, documents: list[int], starts: list[int], offsets: list[int]
    ) -> None:
        with pytest.raises(IndexError):
            bins(self.FILE(), documents, starts, offsets).segments(0)

    @pytest.mark.parametrize(
        "boundaries",
        [[0, 6, 1, 0], [0, -1, 1, 0], [-1, 0, 1, 0], [2, 0, 1, 0], [0, 0, 4, 0], [0, 0, 3, 1], [0, 0, 2**62, 1],
         [0, 0, -5, 0], [0, 2**62, 1, 0]],
    )  # fmt: skip
    def test_cuts_that_do_not_fit_the_file(self, boundaries: list[int]) -> None:
        index = concat_samples(self.FILE(), np.arange(3), np.array(boundaries).reshape(-1, 2), 4)
        with pytest.raises(IndexError):
            index.segments(0)

    def test_shuffled_sample_numbers_are_checked(self) -> None:
        numbers = np.array([0, 1])
        index = packing.SampleIndex(self.FILE(), numbers[:1], numbers[:1], numbers, np.array([1]), 4, False)
        with pytest.raises(IndexError, match="does not fit its documents"):
            index.segments(0)

    @given(st.data())
    @settings(max_examples=300, deadline=None)
    def test_random_numbers_raise_or_stay_inside(self, data: st.DataObject) -> None:
        lengths = data.draw(st.lists(st.integers(0, 6), max_size=5))
        number = st.one_of(st.integers(-1, 8), st.sampled_from([2**31, 2**32 - 1, 2**63 - 1, -(2**63)]))
        is_concat = data.draw(st.booleans())
        num_samples, seq_len = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 8))
        num_documents = data.draw(st.integers(0, 5))
        sizes = (num_documents, 0 if is_concat else num_documents)
        sizes += ((1 + is_concat) * (num_samples + 1), num_samples)
        arrays = [np.array([data.draw(number) for _ in range(size)], dtype=np.int64) for size in sizes]
        index = packing.SampleIndex(file_of(lengths), *arrays, seq_len, is_concat)
        for sample in range(num_samples):
            try:
                rows = index.segments(sample).tolist()
            except IndexError:
                continue
            assert sum(length for _, _, length in rows) <= seq_len
            for document, start, length in rows:
                assert 0 <= start < start + length <= lengths[document]


class TestGather:
    def run(
        self, documents: list[int], starts: list[int], size: int = 4, **changes: np.ndarray
    ) -> tuple[list[int], dict[str, np.ndarray]]:
        content = np.array([10, 11, 12, 13, 14, 20], dtype="<u2")
        index = bins(file_of([5, 1], content.tobytes(), 8), documents, starts, [0, len(documents)])
        arrays = outputs(size, **changes)
        cu_seqlens, counts = packing.gather([index], np.array([0]), np.array([0]), 1, 100, **arrays)
        assert counts == [len(cu_seqlens)]
        return cu_seqlens.tolist(), arrays

    def test_a_cut_document_a_short_one_and_padding(self) -> None:
        cu_seqlens, arrays = self.run([0, 1], [3, 0])
        assert arrays["tokens"].tolist() == [13, 14, 20, 0]
        assert arrays["labels"].tolist() == [14, 0, 0, 0]
        assert arrays["loss_mask"].tolist() == [True, False, False, False]
        assert arrays["positions"].tolist() == [0, 1, 0, 0]
        assert cu_seqlens == [0, 2, 3, 4]

    def test_the_last_label_lies_beyond_the_sample(self) -> None:
        cu_seqlens, arrays = self.run([0], [0])
        assert arrays["tokens"].tolist() == [10, 11, 12, 13]
        assert arrays["labels"].tolist() == [11, 12, 13, 14]
        assert arrays["loss_mask"].all()
        assert cu_seqlens == [0, 4]

    def test_no_sample_and_empty_sample(self) -> None:
        cu_seqlens, arrays = self.run([], [])
        assert cu_seqlens == [0, 4]
        assert arrays["tokens"].tolist() == [0] * 4
        assert arrays["positions"].tolist() == [0, 1, 2, 3]
        index = bins(file_of([1]), [], [], [0])
        nothing = np.empty(0, np.int64)
        assert packing.gather([index], nothing, nothing, 2, 0, **outputs(0))[1] == []

    @pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 8])
    @pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 63, 64, 65, 200])
    def test_every_type_and_many_lengths(self, code: int, length: int) -> None:
        dtype = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}[code]
        ids = np.random.default_rng(length).integers(0, 127, 3 * length).astype(dtype)
        file = file_of([length, length, length], ids.tobytes(), code)
        arrays = outputs(4 * length)
        index = bins(file, [2, 0, 1], [0, 0, 0], [0, 3], seq_len=4 * length)
        cu_seqlens, _ = packing.gather([index], np.array([0]), np.array([0]), 1, 127, **arrays)
        order = np.concatenate([ids[2 * length :], ids[: 2 * length]]).astype(np.int32)
        last = np.arange(length - 1, 3 * length, length)
        labels = np.roll(order, -1)
        labels[last] = 0
        mask = np.ones(3 * length, dtype=bool)
        mask[last] = False
        assert np.array_equal(arrays["tokens"][: 3 * length], order)
        assert np.array_equal(arrays["labels"][: 3 * length], labels)
        assert np.array_equal(arrays["loss_mask"][: 3 * length], mask)
        assert np.array_equal(arrays["positions"], np.tile(np.arange(length), 4))
        assert not arrays["tokens"][3 * length :].any() and not arrays["loss_mask"][3 * length :].any()
        assert cu_seqlens.tolist() == [0, length, 2 * length, 3 * length, 4 * length]

    def test_ids_at_odd_bytes(self) -> None:
        content = b"\x00" + np.array([5, 6, 7], dtype="<u2").tobytes()
        file = token_file(index_bytes(8, [3], [1], [0, 1]), content)
        arrays = outputs(4)
        packing.gather([bins(file, [0], [0], [0, 1])], np.array([0]), np.array([0]), 1, 0, **arrays)
        assert arrays["tokens"].tolist() == [5, 6, 7, 0]

    @pytest.mark.parametrize(
        ("vocab_size", "token", "seq_len"), [(2, 2, 1), (2, 2, 2), (0, -1, 2), (3, -1, 3), (0, -1, 3)]
    )
    @pytest.mark.parametrize(("dtype_code", "dtype"), [(2, "<i1"), (3, "<i2"), (4, "<i4"), (5, "<i8")])
    def test_names_a_bad_token(
        self, dtype_code: int, dtype: str, vocab_size: int, token: int, seq_len: int
    ) -> None:
        file = file_of([1, 3], np.array([0, 1, 2, -1], dtype=dtype).tobytes(), dtype_code)
        index = bins(file, [0, 1], [0, 0], [0, 1, 2], seq_len)  # a label counts too
        with pytest.raises(packing.BadToken) as caught:
            packing.gather(
                [index], np.zeros(2, np.int64), np.arange(2), 1, vocab_size, **outputs(2 * seq_len)
            )
        assert caught.value.args == (1, 1, token)

    @pytest.mark.parametrize("vocab_size", [0, 2**40])
    @pytest.mark.parametrize("token", [2**31, 2**32, 2**32 + 1, 2**63 - 1])
    def test_ids_of_64_bits_are_not_cut_off(self, token: int, vocab_size: int) -> None:
        file = file_of([2], np.array([1, token], dtype="<i8").tobytes(), 5)
        index = bins(file, [0], [0], [0, 1])
        with pytest.raises(packing.BadToken):
            packing.gather([index], np.array([0]), np.array([0]), 1, vocab_size, **outputs(4))

    def test_wrong_outputs(self) -> None:
        with pytest.raises(ValueError, match="labels has 3 elements instead of 4"):
            self.run([], [], labels=np.zeros(3, np.int32))
        with pytest.raises(TypeError):
            self.run([], [], labels=np.zeros(4, np.int64))
        read_only = np.zeros(4, np.int32)
        read_only.flags.writeable = False
        with pytest.raises(ValueError, match="writeable"):
            self.run([], [], labels=read_only)

    def test_wrong_jobs(self) -> None:
        index = bins(file_of([4]), [0], [0], [0, 1])
        one, two = np.array([0]), np.array([0, 0])
        other = bins(file_of([4]), [0], [0], [0, 1], seq_len=5)
        for arguments, error, message in (
            (([index], one, two, 1), ValueError, "differ in length"),
            (([index], two, two, 3), ValueError, "not a multiple of 3"),
            (([], one, one, 1), ValueError, "no index"),
            (([index, other], one, one, 1), ValueError, "differ in seq_len"),
            (([index, None], one, one, 1), ValueError, "None"),
            (([index], np.array([1]), one, 1), IndexError, "index 1 does not exist"),
            (([index], np.array([-1]), one, 1), IndexError, "index -1 does not exist"),
            (([index], one, np.array([1]), 1), IndexError, "sample 1 does not exist"),
        ):
            size = 4 * len(arguments[1])
            with pytest.raises(error, match=message):
                packing.gather(*arguments, 0, **outputs(size))
        huge = bins(file_of([4]), [0], [0], [0, 1], seq_len=2**62)
        with pytest.raises(ValueError, match="too many tokens"):
            packing.gather([huge], one, one, 1, 0, **outputs(4))


class TestPrefetcher:
    def test_jobs_come_out_in_order_and_errors_with_their_job(self) -> None:
        content = np.arange(64, dtype="<u2")
        content[37] = 999
        index = bins(file_of([4] * 16, content.tobytes(), 8), list(range(16)), [0] * 16, list(range(17)))
        for num_threads in (1, 4):
            pool = packing.Prefetcher(num_threads)
            jobs = []
            for first in range(0, 16, 4):
                arrays = outputs(16)
                pool.submit([index], np.zeros(4, np.int64), np.arange(first, first + 4), 2, 100, **arrays)
                jobs.append(arrays)
            for number, arrays in enumerate(jobs):
                if number == 2:
                    with pytest.raises(packing.BadToken) as caught:
                        pool.take()
                    assert caught.value.args == (1, 9, 999)
                    continue
                cu_seqlens, counts = pool.take()
                assert cu_seqlens.tolist() == [0, 4, 8] * 2
                assert counts == [3, 3]
                assert np.array_equal(arrays["tokens"], content[16 * number : 16 * (number + 1)])
            with pytest.raises(ValueError, match="no job"):
                pool.take()
            pool.close()
            pool.close()
            with pytest.raises(ValueError, match="closed"):
                pool.take()

    def test_what_a_job_needs_stays_alive(self) -> None:
        pool = packing.Prefetcher(2)
        for _ in range(50):
            index = bins(file_of([4000]), [0], [0], [0, 1], seq_len=4000)
            pool.submit([index], np.zeros(1, np.int64), np.zeros(1, np.int64), 1, 0, **outputs(4000))
        del index
        pool.take()
        del pool  # with 49 jobs that nobody took

    def test_needs_a_thread(self) -> None:
        with pytest.raises(ValueError, match="at least 1 thread"):
            packing.Prefetcher(0)


def test_buffers_are_used_again_only_when_nothing_refers_to_them() -> None:
    pool = packing.BufferPool()
    first, second = pool.take(1000), pool.take(1000)
    addresses = {first.ctypes.data, second.ctypes.data}
    assert len(addresses) == 2
    view = first[10:20]
    del first
    assert pool.take(1000).ctypes.data not in addresses
    del view, second
    assert {pool.take(900).ctypes.data, pool.take(1000).ctypes.data} & addresses
    kept = pool.take(10)
    del pool
    kept[:] = 1


def test_the_order_of_samples_is_what_it_always_was() -> None:
    """Runs go on after an upgrade only while the same seed gives the same samples: these hashes may not change
    without data.packed._ORDER_VERSION, and the version of the index cache, changing too."""

    def digest(*arrays: np.ndarray) -> str:
        whole = b"".join(np.ascontiguousarray(array).astype("<i8").tobytes() for array in arrays)
        return hashlib.sha256(whole).hexdigest()[:16]

    lengths = np.arange(50_000) * 7919 % 4096 + 1
    order = packing.permutation(50_000, 11)
    found = {
        "best_fit": digest(*packing.pack_best_fit(lengths, 4096)),
        "best_fit, long": digest(*packing.pack_best_fit(lengths * 1024, 1 << 22)),
        "permutation": digest(order),
        "concat": digest(packing.concat_index(lengths[order], 257)),
        "cut": digest(*packing.cut_documents(lengths, order, 64)),
        "blend": digest(*packing.blend([5, 2, 9], [0, 0, 0], 5000)),
    }
    assert found == {
        "best_fit": "59e7cafe0849b935",
        "best_fit, long": "59e7cafe0849b935",
        "permutation": "a3196724eccdb69b",
        "concat": "085576da5340cdde",
        "cut": "a6876653c4fbd64c",
        "blend": "865e803113c489d7",
    }
