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

from meditron_train.data.packing.index_cache import Arrays, IndexCache
from meditron_train.native import packing as native

Int64Array = NDArray[np.int64]
Packing = Literal["concat", "best_fit"]
Value = TypeVar("Value")

_LARGEST_WEIGHT_SUM = 1 << 62


def stream_seed(seed: int, *words: str | int) -> int:
    """An independent 64-bit seed for one use, named by `words`."""
    text = json.dumps([seed, *words], ensure_ascii=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def integer_weights(weights: Sequence[Fraction]) -> list[int]:
    """Whole numbers in the same proportion; exact unless they would add up to more than 2^62."""
    scale = lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * scale) for weight in weights]
    if sum(whole) <= _LARGEST_WEIGHT_SUM:
        return whole
    total = sum(weights)
    return [max(1, round(weight / total * 2**52)) if weight else 0 for weight in weights]


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

    def taken(self, num_samples: int) -> Int64Array:
        """How many of the first `num_samples` each source gives, int64 [sources]."""
        if len(self.weights) == 1:
            return np.array([num_samples], dtype=np.int64)
        block, rest = divmod(num_samples, self.block_size)
        with self._lock:
            self._advance(block)
            return native.blend(self.weights, self._taken[block], rest)[2] if rest else self._taken[block]

    def _draw(self, block: int) -> tuple[NDArray[np.int32], Int64Array]:
        self._advance(block)
        sources, indices, _ = native.blend(self.weights, self._taken[block], self.block_size)
        return sources, indices

    def _advance(self, block: int) -> None:
        """Compute what was taken before `block`."""
        while len(self._taken) <= block:
            self._taken.append(native.blend(self.weights, self._taken[-1], self.block_size)[2])


class PhasedBlend:
    """A `Blend` whose weights change at certain samples; each source continues from where the previous phase left off.

    Args:
        phases: (first sample, weight of each source), the first one from sample 0 on; a weight of 0 takes
            none.
    """

    def __init__(self, phases: Sequence[tuple[int, Sequence[int]]]) -> None:
        self.phases = [(first, list(weights)) for first, weights in phases]
        self._firsts = np.array([first for first, _ in phases], dtype=np.int64)
        self._sources = [np.flatnonzero(weights) for _, weights in phases]
        self._blends = [
            Blend([weights[source] for source in sources.tolist()])
            for (_, weights), sources in zip(phases, self._sources, strict=True)
        ]
        before = np.zeros(len(phases[0][1]), dtype=np.int64)
        self._before = [before]
        for number, num_samples in enumerate(np.diff(self._firsts).tolist()):
            before = before.copy()
            before[self._sources[number]] += self._blends[number].taken(num_samples)
            self._before.append(before)

    def taken(self, num_samples: int) -> Int64Array:
        """How many of the first `num_samples` each source gives, int64 [sources]."""
        phase = int(np.searchsorted(self._firsts, num_samples, side="left")) - 1
        if phase < 0:
            return self._before[0]
        taken = self._before[phase].copy()
        taken[self._sources[phase]] += self._blends[phase].taken(num_samples - int(self._firsts[phase]))
        return taken

    def locate(self, sample_numbers: Int64Array) -> tuple[Int64Array, Int64Array]:
        """(source, number of the sample within that source) of each, int64 [n] both."""
        sources, indices = np.empty_like(sample_numbers), np.empty_like(sample_numbers)
        phase_of = np.searchsorted(self._firsts, sample_numbers, side="right") - 1
        for phase in np.unique(phase_of).tolist():
            here = phase_of == phase
            drawn, places = self._blends[phase].locate(sample_numbers[here] - self._firsts[phase])
            sources[here] = self._sources[phase][drawn]
            indices[here] = places + self._before[phase][sources[here]]
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

    Args:
        file: the dataset.
        lengths: tokens of each of its documents, int64.
        documents: numbers of those that take part, int64.
        packing, seq_len, seed: as in the configuration, the seed mixed with the name of the source.
        cache: where built indexes are kept.
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
