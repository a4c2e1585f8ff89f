"""Which sample comes when: blending of sources, and the packing and order of one source's epochs.

Everything is a function of seeds and sample numbers: nothing depends on what was asked before, on ranks or
threads.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from fractions import Fraction
from math import lcm
from threading import Lock
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from meditron_train.data.index_cache import Arrays, IndexCache
from meditron_train.native import packing as native

Int64Array = NDArray[np.int64]
Packing = Literal["concat", "best_fit"]
Value = TypeVar("Value")

_LARGEST_WEIGHT_SUM = 1 << 62


def stream_seed(seed: int, *words: str | int) -> int:
    """An independent 64-bit seed for one use, named by `words`."""
    text = json.dumps([seed, *words], ensure_ascii=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def held_out(num_documents: int, fraction: float, seed: int) -> NDArray[np.bool_]:
    """The documents held out for validation, bool [num_documents]: a function of seed and document number
    alone."""
    with np.errstate(over="ignore"):  # SplitMix64 of the document number; wrapping is meant
        z = (np.arange(num_documents, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64(stream_seed(seed, "held_out"))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) < np.uint64(int(Fraction(fraction) * 2**64))


def integer_weights(weights: Sequence[Fraction]) -> list[int]:
    """Whole numbers in the same proportion; exact unless they would add up to more than 2^62."""
    scale = lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * scale) for weight in weights]
    if sum(whole) <= _LARGEST_WEIGHT_SUM:
        return whole
    total = sum(weights)
    return [max(1, round(weight / total * 2**52)) for weight in weights]


class _Cache(OrderedDict[int, Value]):
    """The last few values of a function of an integer."""

    def __init__(self, compute: Callable[[int], Value], size: int = 2) -> None:
        super().__init__()
        self._compute, self._size = compute, size

    def get_or_compute(self, key: int) -> Value:
        if key not in self:
            while len(self) >= self._size:
                self.popitem(last=False)
            self[key] = self._compute(key)
        self.move_to_end(key)
        return self[key]


class Blend:
    """Which source each sample number takes. Sources keep their share at every prefix, with an error below
    one."""

    block_size = 1 << 16

    def __init__(self, weights: Sequence[int]) -> None:
        self.weights = np.asarray(weights, dtype=np.int64)
        self._taken = [np.zeros(len(weights), dtype=np.int64)]  # before block i
        self._blocks = _Cache(self._draw)
        self._lock = Lock()

    def locate(self, sample_numbers: Int64Array) -> tuple[Int64Array, Int64Array]:
        """(source, number of the sample within that source) of each, int64 [n] both."""
        if len(self.weights) == 1:
            return np.zeros_like(sample_numbers), sample_numbers
        blocks, offsets = np.divmod(sample_numbers, self.block_size)
        sources, indices = np.empty_like(sample_numbers), np.empty_like(sample_numbers)
        for block in np.unique(blocks).tolist():
            with self._lock:
                drawn_sources, drawn_indices = self._blocks.get_or_compute(block)
            here = blocks == block
            sources[here], indices[here] = drawn_sources[offsets[here]], drawn_indices[offsets[here]]
        return sources, indices

    def _draw(self, block: int) -> tuple[NDArray[np.int32], Int64Array]:
        while len(self._taken) <= block:
            self._taken.append(native.blend(self.weights, self._taken[-1], self.block_size)[2])
        sources, indices, _ = native.blend(self.weights, self._taken[block], self.block_size)
        return sources, indices


def _concat_epoch(
    lengths: Int64Array, documents: Int64Array, seq_len: int, seed: int, epoch: int
) -> dict[str, NDArray]:
    """Documents in shuffled order form one stream, cut every seq_len; the samples are shuffled again, so
    that the pieces of a long document do not follow each other."""
    stream, stream_lengths = native.shuffle_documents(
        lengths, documents, stream_seed(seed, "documents", epoch)
    )
    boundaries = native.concat_index(stream_lengths, seq_len)
    samples = native.permutation(len(boundaries) - 1, stream_seed(seed, "samples", epoch))
    return {
        "documents": stream,
        "starts": np.empty(0, dtype=np.uint32),
        "boundaries": boundaries.reshape(-1),
        "samples": samples,
    }


def _best_fit_epoch(
    lengths: Int64Array, documents: Int64Array, seq_len: int, seed: int, epoch: int
) -> dict[str, NDArray]:
    """Best-fit decreasing bins. Which of the documents of one length goes where changes from epoch to epoch;
    the number of bins does not, since it depends on the lengths alone."""
    piece_documents, piece_starts, piece_lengths = native.cut_documents(lengths, documents, seq_len)
    shuffled = native.permutation(len(piece_lengths), stream_seed(seed, "documents", epoch))
    order, bin_offsets = native.pack_best_fit(piece_lengths[shuffled], seq_len)
    pieces = shuffled[order]
    samples = native.permutation(len(bin_offsets) - 1, stream_seed(seed, "samples", epoch))
    return {
        "documents": _narrow(piece_documents)[pieces],
        "starts": _narrow(piece_starts)[pieces],
        "boundaries": bin_offsets,
        "samples": samples,
    }


def _narrow(numbers: Int64Array) -> NDArray:
    """As uint32 where all fit: half the room on disk and in memory."""
    return numbers.astype(np.uint32) if numbers.size == 0 or numbers.max() < 1 << 32 else numbers


class SourceOrder:
    """The samples of one source, endless: every epoch holds each token of `documents` exactly once.

    file: the dataset; lengths: tokens of each of its documents, int64; cache: where built indexes are kept.
    """

    def __init__(
        self,
        file: native.TokenFile,
        lengths: Int64Array,
        documents: Int64Array,
        packing: Packing,
        seq_len: int,
        seed: int,
        cache: IndexCache | None = None,
    ) -> None:
        self._file, self._lengths, self._documents = file, lengths, documents
        self._packing, self._seq_len, self._seed, self._cache = packing, seq_len, seed, cache
        self.num_tokens = int(lengths[documents].sum())
        self._epochs: _Cache[native.SampleIndex] = _Cache(self._epoch)
        self._lock = Lock()
        if packing == "concat":
            self.samples_per_epoch = -(-self.num_tokens // seq_len)
        else:
            self.samples_per_epoch = self.index(0).num_samples

    def index(self, epoch: int) -> native.SampleIndex:
        """The samples of one epoch."""
        with self._lock:
            return self._epochs.get_or_compute(epoch)

    def segments(self, number: int) -> Int64Array:
        """Rows of (document, start, length) of a sample of this source, int64 [segments, 3]."""
        epoch, sample = divmod(number, self.samples_per_epoch)
        return self.index(epoch).segments(sample)

    def _epoch(self, epoch: int) -> native.SampleIndex:
        def build() -> dict[str, NDArray]:
            make = _concat_epoch if self._packing == "concat" else _best_fit_epoch
            return make(self._lengths, self._documents, self._seq_len, self._seed, epoch)

        if self._cache is None or len(self._documents) < self._cache.smallest:
            arrays: Arrays = build()
        else:
            arrays = self._cache.load_or_build([self._packing, self._seq_len, self._seed, epoch], build)
        return native.SampleIndex(
            self._file, **arrays, seq_len=self._seq_len, is_concat=self._packing == "concat"
        )
