"""The C++ core of data loading: packing, sample order, blending of sources, gathering of tokens.

All functions are deterministic, exact in 64-bit integers, check their input and release the GIL. Arrays come
and go as numpy arrays.

Raises:
    ValueError: from all functions, for a wrong value.
    IndexError: from all functions, for a number out of range.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

try:
    import meditron_train.native._packing as _packing
except ImportError as error:
    raise ImportError(
        f"the C++ core of meditron-train is not built ({error}): run `pip install -e .` in the repository, "
        "or `python setup.py build_ext --inplace`"
    ) from error

Int64Array = NDArray[np.int64]
NumberArray = NDArray[np.uint32] | NDArray[np.int64]
TokenFile = _packing.TokenFile
"""TokenFile(idx, bin): Megatron's .idx and .bin as uint8 arrays (memory maps), checked whole on construction.

Raises ValueError when the index is corrupt or does not describe exactly this .bin. Has `dtype_code`,
`num_sequences`, `num_documents`, `num_tokens`, `document(i) -> (first byte, tokens)`, `document_lengths()`.
"""


def _integers(values: ArrayLike, name: str) -> Int64Array:
    array = np.asarray(values)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, not {array.dtype}")
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} must fit 64-bit signed integers")
    return np.ascontiguousarray(array, dtype=np.int64)


def pack_best_fit(
    lengths: ArrayLike, capacity: int, *, num_threads: int = 0
) -> tuple[Int64Array, Int64Array]:
    """Pack documents into bins of `capacity` tokens by best-fit decreasing; no document is cut.

    The number of bins is exactly that of best-fit decreasing done one document at a time. Documents of length
    0 go into the last bin.

    Time O(n) plus O(log) per group of equal bins; at most 11/9 of the optimal number of bins plus a constant
    (Johnson, 1973).

    Args:
        lengths: int [n], each in 0..capacity.
        capacity: tokens per bin.
        num_threads: changes the time and nothing else (0: all processors).

    Returns:
        (order int64 [n], bin_offsets int64 [bins + 1]): documents `order[bin_offsets[i]:bin_offsets[i + 1]]`
        go into bin i, longest first.
    """
    return _packing.pack_best_fit(_integers(lengths, "lengths"), capacity, num_threads)


def permutation(n: int, seed: int) -> Int64Array:
    """A uniformly random order of 0..n-1, a function of n and the 64-bit seed alone (Fisher-Yates,
    SplitMix64)."""
    return _packing.permutation(n, seed & 0xFFFF_FFFF_FFFF_FFFF)


def shuffle_documents(lengths: ArrayLike, documents: ArrayLike, seed: int) -> tuple[NumberArray, NumberArray]:
    """`documents[permutation(len(documents), seed)]` and the lengths of these documents.

    Both uint32 where all numbers fit, else int64. Much faster than fetching the lengths after the shuffle.
    """
    return _packing.shuffle_documents(
        _integers(lengths, "lengths"), _integers(documents, "documents"), seed & 0xFFFF_FFFF_FFFF_FFFF
    )


def concat_index(lengths: ArrayLike, seq_len: int, *, num_threads: int = 0) -> Int64Array:
    """Cut the stream of documents of these lengths every seq_len tokens.

    Args:
        lengths: int [documents] in the order of the stream; uint32 and int64 are read as they are.
        seq_len: tokens per sample.
        num_threads: changes the time and nothing else (0: all processors).

    Returns:
        int64 [samples + 1, 2] of (position in the stream, token offset in that document). Sample i runs from
        row i to row i + 1; the last one may be shorter than seq_len.
    """
    array = np.asarray(lengths)
    if array.dtype != np.uint32:
        array = _integers(array, "lengths")
    return _packing.concat_index(np.ascontiguousarray(array), seq_len, num_threads)


def cut_documents(
    lengths: ArrayLike, documents: ArrayLike, seq_len: int
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Cut documents longer than seq_len into pieces of seq_len and a rest; empty documents give no piece.

    Returns:
        (document, start, length) of every piece, int64 [pieces] each.
    """
    return _packing.cut_documents(_integers(lengths, "lengths"), _integers(documents, "documents"), seq_len)


def blend(
    weights: ArrayLike, taken: ArrayLike, count: int
) -> tuple[NDArray[np.int32], Int64Array, Int64Array]:
    """Draw the next `count` samples of a blend of sources with integer weights.

    At every prefix of n samples, |taken[s] - n * weights[s] / sum(weights)| < 1 exactly: the earliest
    deadline of proportionate-fair scheduling (Baruah et al., 1996) goes first.

    Args:
        weights: int [sources].
        taken: int [sources], how many samples of each source the blend has already drawn (zeros at the
            start).
        count: samples to draw.

    Returns:
        (source int32 [count], number of the sample within its source int64 [count], taken after them).
    """
    return _packing.blend(_integers(weights, "weights"), _integers(taken, "taken"), count)


SampleIndex = _packing.SampleIndex
"""SampleIndex(file, documents, starts, boundaries, samples, seq_len, is_concat): what each sample of one epoch of
one TokenFile holds; sample i is number samples[i] of the cut stream, or of the bins.

concat: `documents` [n] is the stream, boundaries [samples + 1, 2] what `concat_index` gives, starts empty.
best_fit: `documents` and `starts` [n] are the pieces in the order of their bins, boundaries [samples + 1] the
bin_offsets. Arrays are uint32 or int64, may be memory-mapped and hold anything: numbers are checked where they are
used, and IndexError is raised where they do not fit the file. Has `num_samples`, and `segments(i)`: int64 [m, 3] of
(document, start, length).
"""

BadToken = _packing.BadToken
"""ValueError(sample, document, token): a token id outside the vocabulary; sample counts within the job."""

Prefetcher = _packing.Prefetcher
"""Prefetcher(num_threads): gathers jobs in threads of its own, without the GIL.

`submit(...)` takes the arguments of `gather` and returns at once; `take()` waits for the oldest job and returns, or
raises, what `gather` would. `close()` waits for the threads; so does the end of the object's life. A forked child has
no such threads: there `take` and `submit` raise RuntimeError, and the object may be dropped.
"""

BufferPool = _packing.BufferPool
"""`take(size)`: uint8 [size] with any content, reusing the memory of arrays that nothing refers to."""


def gather(
    indexes: Sequence[SampleIndex],
    which: Int64Array,
    samples: Int64Array,
    samples_per_micro_batch: int,
    vocab_size: int,
    tokens: NDArray[np.int32],
    labels: NDArray[np.int32],
    positions: NDArray[np.int32],
    loss_mask: NDArray[np.bool_],
) -> tuple[NDArray[np.int32], list[int]]:
    """Write the samples `samples[i]` of `indexes[which[i]]`, one after the other, into the arrays.

    Labels are the next token of the same document, also beyond the segment's end; where the document ends,
    label and mask are 0. Positions count from 0 in each segment. Unused room in a sample becomes one padding
    segment of zeros.

    Args:
        indexes: the sources.
        which: source of each sample.
        samples: number of each sample in its source.
        samples_per_micro_batch: samples whose segments are counted together.
        vocab_size: upper bound of the ids (0: no limit).
        tokens, labels, positions, loss_mask: written, [samples * seq_len] each.

    Returns:
        cu_seqlens of every micro-batch of samples_per_micro_batch samples, int32 one after the other, each
        from 0 to its number of tokens, and the number of entries of each.

    Raises:
        BadToken: an id is not below vocab_size and 2^31; the arrays are incomplete.
    """
    return _packing.gather(
        list(indexes),
        which,
        samples,
        samples_per_micro_batch,
        vocab_size,
        tokens,
        labels,
        positions,
        loss_mask,
    )
