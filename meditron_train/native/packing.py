"""The C++ core of data loading: packing, sample order, blending of sources, gathering of tokens.

All functions are deterministic, exact in 64-bit integers, check their input and release the GIL.
Arrays come and go as numpy arrays; a wrong value raises ValueError, a number out of range IndexError.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


def pack_best_fit(lengths: ArrayLike, capacity: int) -> tuple[Int64Array, Int64Array]:
    """Pack documents into bins of `capacity` tokens by best-fit decreasing; no document is cut.

    lengths: int [n], each in 0..capacity. Returns (order int64 [n], bin_offsets int64 [bins + 1]): documents
    `order[bin_offsets[i]:bin_offsets[i + 1]]` go into bin i, longest first. The number of bins is exactly
    that of best-fit decreasing done one document at a time. Documents of length 0 go into the last bin.

    Time O(n) plus O(log) per group of equal bins; at most 11/9 of the optimal number of bins plus a constant
    (Johnson, 1973).
    """
    return _packing.pack_best_fit(_integers(lengths, "lengths"), capacity)


def permutation(n: int, seed: int) -> Int64Array:
    """A uniformly random order of 0..n-1, a function of n and the 64-bit seed alone (Fisher-Yates,
    SplitMix64)."""
    return _packing.permutation(n, seed & 0xFFFF_FFFF_FFFF_FFFF)


def concat_index(lengths: ArrayLike, order: ArrayLike, seq_len: int) -> Int64Array:
    """Cut the stream of the documents lengths[order[0]], lengths[order[1]], … every seq_len tokens.

    Returns int64 [samples + 1, 2] of (position in order, token offset in that document); sample i runs from
    row i to row i + 1, and the last one may be shorter than seq_len.
    """
    return _packing.concat_index(_integers(lengths, "lengths"), _integers(order, "order"), seq_len)


def concat_segments(
    lengths: Int64Array, order: Int64Array, boundaries: Int64Array, samples: ArrayLike
) -> tuple[Int64Array, Int64Array]:
    """The segments of some samples of `concat_index`.

    Returns (segments int64 [m, 3] of (document, start, length), offsets int64 [len(samples) + 1]): the i-th
    asked sample has the rows offsets[i]:offsets[i + 1].
    """
    return _packing.concat_segments(lengths, order, boundaries, _integers(samples, "samples"))


def cut_documents(
    lengths: ArrayLike, documents: ArrayLike, seq_len: int
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Cut documents longer than seq_len into pieces of seq_len and a rest; empty documents give no piece.

    Returns (document, start, length) of every piece, int64 [pieces] each.
    """
    return _packing.cut_documents(_integers(lengths, "lengths"), _integers(documents, "documents"), seq_len)


def blend(
    weights: ArrayLike, taken: ArrayLike, count: int
) -> tuple[NDArray[np.int32], Int64Array, Int64Array]:
    """Draw the next `count` samples of a blend of sources with integer weights.

    taken: int [sources], how many samples of each source the blend has already drawn (zeros at the start).
    Returns (source int32 [count], number of the sample within its source int64 [count], taken after them).
    At every prefix of n samples, |taken[s] - n * weights[s] / sum(weights)| < 1 exactly: the earliest
    deadline of proportionate-fair scheduling (Baruah et al., 1996) goes first.
    """
    return _packing.blend(_integers(weights, "weights"), _integers(taken, "taken"), count)


@dataclass(frozen=True)
class Gathered:
    """cu_seqlens int32 [segments + paddings + 1]; bad_segment is -1, or the segment holding the id
    bad_token."""

    cu_seqlens: NDArray[np.int32]
    bad_segment: int
    bad_token: int


def gather(
    files: Sequence[TokenFile],
    segments: Int64Array,
    sample_offsets: Int64Array,
    seq_len: int,
    vocab_size: int,
    *,
    tokens: Int64Array,
    labels: Int64Array,
    loss_mask: NDArray[np.float32],
    positions: Int64Array,
) -> Gathered:
    """Write a micro-batch of T = samples * seq_len tokens into the given arrays [T].

    segments: int64 [m, 4] of (number in files, document, start, length); sample i has the rows
    sample_offsets[i]:sample_offsets[i + 1]. Labels are the next token of the same document, also beyond the
    segment's end; where the document ends, label and mask are 0. Positions count from 0 in each segment.
    Room that is left in a sample becomes one padding segment of zeros. vocab_size 0 checks only that ids are
    not negative; when an id is outside, the arrays are incomplete and the result names it.
    """
    cu_seqlens, bad_segment, bad_token = _packing.gather(
        list(files), segments, sample_offsets, seq_len, vocab_size, tokens, labels, loss_mask, positions
    )
    return Gathered(cu_seqlens, bad_segment, bad_token)
