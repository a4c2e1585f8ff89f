"""Which documents are held out for validation: a property of the document, not of its place, its source or a seed.

A document is held out when the hash of its id in the source (of its tokens, where it has none) is below the fraction.
So a later run that reads the same documents in another order, under another name or among others holds out the same
ones, and a smaller fraction holds out a part of what a larger one does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meditron_train.data.indexed import IndexedDataset
from meditron_train.data.meta import ids_path
from meditron_train.data.packing.index_cache import IndexCache

_EDGE_TOKENS = 32  # of a document that count, at its start and at its end
_BLOCK = 1 << 20  # documents hashed at a time
_NO_ID = b"null"


def held_out(dataset: IndexedDataset, fraction: float, cache_dir: Path | None = None) -> NDArray[np.bool_]:
    """The documents held out, bool [num_documents]; see `IndexCache` for cache_dir."""
    if fraction == 0:
        return np.zeros(dataset.num_documents, dtype=np.bool_)
    cache = IndexCache(dataset.prefix, partial(_fingerprint, dataset), cache_dir)
    if dataset.num_documents < cache.smallest:
        hashes = document_hashes(dataset)
    else:
        hashes = cache.load_or_build(["document hashes"], lambda: {"hashes": document_hashes(dataset)})[
            "hashes"
        ]
    return hashes < np.uint64(int(Fraction(fraction) * 2**64))


def document_hashes(dataset: IndexedDataset) -> NDArray[np.uint64]:
    """An evenly distributed number for each document, uint64 [num_documents]."""
    hashes = _content_hashes(dataset)
    for number, line in enumerate(_id_lines(dataset)):
        if line != _NO_ID:
            hashes[number] = int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "little")
    return hashes


def _id_lines(dataset: IndexedDataset) -> Iterator[bytes]:
    path = ids_path(dataset.prefix)
    if path.is_file():
        with open(path, "rb") as lines:
            for line, _ in zip(lines, range(dataset.num_documents), strict=False):
                yield line.strip()


def _content_hashes(dataset: IndexedDataset) -> NDArray[np.uint64]:
    """Of the length and the first and last tokens: reading all of a corpus would delay every start, and documents that
    agree in all of these are near copies, which belong on one side."""
    lengths, firsts = dataset.document_lengths, dataset.document_starts
    tokens = dataset.tokens
    hashes = np.empty(dataset.num_documents, dtype=np.uint64)
    for start in range(0, dataset.num_documents, _BLOCK):
        block = slice(start, start + _BLOCK)
        hashes[block] = _hash_edges(tokens, firsts[block], lengths[block])
    return hashes


def _hash_edges(tokens: NDArray, firsts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.uint64]:
    hashes = _mix(lengths.astype(np.uint64))
    for place in range(2 * _EDGE_TOKENS):
        from_end = place - 2 * _EDGE_TOKENS  # the second half counts from the end
        at = firsts + (place if place < _EDGE_TOKENS else lengths + from_end)
        here = lengths > (place if place < _EDGE_TOKENS else -from_end - 1)
        hashes[here] = _mix(hashes[here] ^ tokens[at[here]].astype(np.int64).view(np.uint64))
    return hashes


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele et al. 2014); wrapping is meant."""
    with np.errstate(over="ignore"):
        z = z + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _fingerprint(dataset: IndexedDataset) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(dataset.index_bytes).data)
    ids = ids_path(dataset.prefix)
    sizes = [dataset.num_bytes, *((ids.stat().st_size, ids.stat().st_mtime_ns) if ids.is_file() else ())]
    digest.update(json.dumps(sizes).encode())
    return digest.hexdigest()
