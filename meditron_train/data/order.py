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
from typing import Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

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

    def locate(self, sample_number: int) -> tuple[int, int]:
        """(source, number of the sample within that source)."""
        if len(self.weights) == 1:
            return 0, sample_number
        block, offset = divmod(sample_number, self.block_size)
        with self._lock:
            sources, indices = self._blocks.get_or_compute(block)
        return int(sources[offset]), int(indices[offset])

    def _draw(self, block: int) -> tuple[NDArray[np.int32], Int64Array]:
        while len(self._taken) <= block:
            self._taken.append(native.blend(self.weights, self._taken[-1], self.block_size)[2])
        sources, indices, _ = native.blend(self.weights, self._taken[block], self.block_size)
        return sources, indices


class _Epoch(Protocol):
    def segments(self, sample: int) -> Int64Array:
        """Rows of (document, start, length), int64 [segments, 3]."""


class _ConcatEpoch:
    """Documents in shuffled order form one stream, cut every seq_len; the samples are shuffled again, so
    that the pieces of a long document do not follow each other."""

    def __init__(
        self, lengths: Int64Array, documents: Int64Array, seq_len: int, seed: int, epoch: int
    ) -> None:
        self._lengths = lengths
        self._documents = documents[native.permutation(len(documents), stream_seed(seed, "documents", epoch))]
        self._boundaries = native.concat_index(lengths, self._documents, seq_len)
        self._samples = native.permutation(len(self._boundaries) - 1, stream_seed(seed, "samples", epoch))

    def segments(self, sample: int) -> Int64Array:
        return native.concat_segments(
            self._lengths, self._documents, self._boundaries, self._samples[sample : sample + 1]
        )[0]


class _BestFitEpoch:
    """Best-fit decreasing bins. Which of the documents of one length goes where changes from epoch to epoch;
    the number of bins does not, since it depends on the lengths alone."""

    def __init__(
        self, pieces: tuple[Int64Array, Int64Array, Int64Array], seq_len: int, seed: int, epoch: int
    ) -> None:
        self._documents, self._starts, self._lengths = pieces
        shuffled = native.permutation(len(self._lengths), stream_seed(seed, "documents", epoch))
        order, self._bin_offsets = native.pack_best_fit(self._lengths[shuffled], seq_len)
        self._pieces = shuffled[order]
        self._samples = native.permutation(self.num_samples, stream_seed(seed, "samples", epoch))

    @property
    def num_samples(self) -> int:
        return len(self._bin_offsets) - 1

    def segments(self, sample: int) -> Int64Array:
        bin_number = self._samples[sample]
        pieces = self._pieces[self._bin_offsets[bin_number] : self._bin_offsets[bin_number + 1]]
        return np.stack([self._documents[pieces], self._starts[pieces], self._lengths[pieces]], axis=1)


class SourceOrder:
    """The samples of one source, endless: every epoch holds each token of `documents` exactly once."""

    def __init__(
        self, lengths: Int64Array, documents: Int64Array, packing: Packing, seq_len: int, seed: int
    ) -> None:
        self._lengths, self._documents = lengths, documents
        self._packing, self._seq_len, self._seed = packing, seq_len, seed
        self.num_tokens = int(lengths[documents].sum())
        self._epochs: _Cache[_Epoch] = _Cache(self._pack)
        self._lock = Lock()
        if packing == "concat":
            self.samples_per_epoch = -(-self.num_tokens // seq_len)
        else:
            self._cut = native.cut_documents(lengths, documents, seq_len)
            first = _BestFitEpoch(self._cut, seq_len, seed, 0)
            self._epochs[0] = first
            self.samples_per_epoch = first.num_samples

    def _pack(self, epoch: int) -> _Epoch:
        if self._packing == "concat":
            return _ConcatEpoch(self._lengths, self._documents, self._seq_len, self._seed, epoch)
        return _BestFitEpoch(self._cut, self._seq_len, self._seed, epoch)

    def segments(self, index: int) -> Int64Array:
        """Rows of (document, start, length) of the index-th sample of this source, int64 [segments, 3]."""
        epoch, sample = divmod(index, self.samples_per_epoch)
        with self._lock:
            plan = self._epochs.get_or_compute(epoch)
        return plan.segments(sample)
