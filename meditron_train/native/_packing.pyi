"""Types of the compiled module; documentation is in packing.py."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_Int32Array = NDArray[np.int32]
_Int64Array = NDArray[np.int64]
_NumberArray = NDArray[np.uint32] | NDArray[np.int64]

class BadToken(ValueError): ...

class TokenFile:
    def __init__(self, idx: NDArray[np.uint8], bin: NDArray[np.uint8]) -> None: ...
    @property
    def dtype_code(self) -> int: ...
    @property
    def num_sequences(self) -> int: ...
    @property
    def num_documents(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    def document(self, index: int) -> tuple[int, int]: ...
    def document_lengths(self) -> _Int64Array: ...

class SampleIndex:
    def __init__(
        self,
        file: TokenFile,
        documents: _NumberArray,
        starts: _NumberArray,
        boundaries: _NumberArray,
        samples: _NumberArray,
        seq_len: int,
        is_concat: bool,
    ) -> None: ...
    @property
    def num_samples(self) -> int: ...
    def segments(self, sample: int) -> _Int64Array: ...

class Prefetcher:
    def __init__(self, num_threads: int) -> None: ...
    def submit(
        self,
        indexes: list[SampleIndex],
        which: _Int64Array,
        samples: _Int64Array,
        samples_per_micro_batch: int,
        vocab_size: int,
        tokens: _Int32Array,
        labels: _Int32Array,
        positions: _Int32Array,
        loss_mask: NDArray[np.bool_],
    ) -> None: ...
    def take(self) -> tuple[_Int32Array, list[int]]: ...
    def close(self) -> None: ...

class BufferPool:
    def take(self, size: int) -> NDArray[np.uint8]: ...

def pack_best_fit(
    lengths: _Int64Array, capacity: int, num_threads: int
) -> tuple[_Int64Array, _Int64Array]: ...
def permutation(n: int, seed: int) -> _Int64Array: ...
def shuffle_documents(
    lengths: _Int64Array, documents: _Int64Array, seed: int
) -> tuple[_NumberArray, _NumberArray]: ...
def concat_index(lengths: _NumberArray, seq_len: int, num_threads: int) -> _Int64Array: ...
def cut_documents(
    lengths: _Int64Array, documents: _Int64Array, seq_len: int
) -> tuple[_Int64Array, _Int64Array, _Int64Array]: ...
def blend(
    weights: _Int64Array, taken: _Int64Array, count: int
) -> tuple[NDArray[np.int32], _Int64Array, _Int64Array]: ...
def gather(
    indexes: Sequence[SampleIndex],
    which: _Int64Array,
    samples: _Int64Array,
    samples_per_micro_batch: int,
    vocab_size: int,
    tokens: _Int32Array,
    labels: _Int32Array,
    positions: _Int32Array,
    loss_mask: NDArray[np.bool_],
) -> tuple[_Int32Array, list[int]]: ...
