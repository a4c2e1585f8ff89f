"""Writing Megatron's .idx. Kept apart from reading, so that tokenization starts without torch.

.idx: "MMIDIDX\\0\\0", uint64 version 1, uint8 dtype code, uint64 number of sequences, uint64 number of
document indices, int32 sequence sizes [sequences], int64 byte pointers [sequences], int64 document indices
[documents + 1]. Everything is little-endian. Source: megatron/core/datasets/indexed_dataset.py of
megatron-core 0.16.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

DTYPE_CODES = {
    code: np.dtype(name) for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()
}


def idx_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.idx")


def bin_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.bin")


def find_prefix(prefix: Path, working_directory: object) -> Path | None:
    """Where the files of a run's data are: as this process sees the path, else as the run saw it; None where neither
    has them.

    Args:
        prefix: as the run's configuration has it.
        working_directory: of the run's last start, as provenance.jsonl has it; anything but a string: unknown.
    """
    seen = [prefix, Path(working_directory) / prefix] if isinstance(working_directory, str) else [prefix]
    return next((path for path in seen if bin_path(path).is_file()), None)


def write_index(
    path: Path, dtype: np.dtype, sizes: NDArray[np.int32], document_indices: ArrayLike | None = None
) -> None:
    """Write an .idx for sequences of `sizes` tokens lying one after the other.

    Args:
        path: the file.
        dtype: of the tokens.
        sizes: int32 [sequences].
        document_indices: int64 [documents + 1], the first sequence of each document and the number of
            sequences at the end; None: every sequence is a document.
    """
    code = next(code for code, known in DTYPE_CODES.items() if known == dtype)
    pointers = np.zeros(sizes.size, dtype="<i8")
    np.cumsum(sizes[:-1], dtype=np.int64, out=pointers[1:])
    pointers *= dtype.itemsize
    if document_indices is None:
        document_indices = np.arange(sizes.size + 1)
    documents = np.asarray(document_indices, dtype="<i8")
    with open(path, "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, sizes.size, documents.size))
        for array in (sizes.astype("<i4", copy=False), pointers, documents):
            file.write(array.data)
