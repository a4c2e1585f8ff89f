"""Megatron's indexed dataset, byte for byte: PREFIX.bin (token ids) and PREFIX.idx (where each document lies)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from meditron_train.data.index_file import DTYPE_CODES, bin_path, idx_path, write_index
from meditron_train.errors import UserError
from meditron_train.native.packing import TokenFile

_MAX_SEQUENCE_SIZE = 2**31 - 1


class IndexedDataset:
    """The documents of PREFIX.bin/.idx, memory-mapped. A document of several sequences reads as one.

    The index is checked whole on opening: UserError when a file is missing, corrupt, or the two do not belong
    together (both sizes are named). Nothing is ever read outside the .bin.
    """

    def __init__(self, prefix: Path | str) -> None:
        self.prefix = Path(prefix)
        paths = [idx_path(prefix), bin_path(prefix)]
        missing = [str(path) for path in paths if not path.is_file()]
        if missing:
            is_file_name = self.prefix.suffix in (".bin", ".idx")
            hint = " (give the prefix, without .bin or .idx)" if is_file_name else ""
            raise UserError(
                f"No indexed dataset at {prefix}: missing {' and '.join(missing)}{hint}. "
                "`meditron-train data tokenize FILE... --tokenizer DIR --output PREFIX` makes one."
            )
        self._idx, self._bin = (_map_bytes(path) for path in paths)
        try:
            self.file = TokenFile(self._idx, self._bin)
        except ValueError as error:
            raise UserError(
                f"{paths[0]} ({self._idx.size} bytes) and {paths[1]} ({self._bin.size} bytes) cannot be "
                "read: "
                f"{error}. Copy both files again from one run, or tokenize again."
            ) from error

    @property
    def num_documents(self) -> int:
        return self.file.num_documents

    @property
    def num_sequences(self) -> int:
        return self.file.num_sequences

    @property
    def num_tokens(self) -> int:
        """Tokens in all documents."""
        return self.file.num_tokens

    @property
    def num_bytes(self) -> int:
        """Size of the .bin."""
        return self._bin.size

    @property
    def token_bytes(self) -> NDArray[np.uint8]:
        """The .bin, memory-mapped."""
        return self._bin

    @property
    def index_bytes(self) -> NDArray[np.uint8]:
        """The .idx, memory-mapped."""
        return self._idx

    @property
    def dtype(self) -> np.dtype:
        return DTYPE_CODES[self.file.dtype_code]

    @cached_property
    def document_lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, int64 [num_documents]."""
        return self.file.document_lengths()

    def document(self, index: int) -> NDArray:
        """The token ids of one document (a read-only view, dtype as stored); IndexError when there is no
        such one."""
        first_byte, length = self.file.document(index)
        return self._bin[first_byte : first_byte + length * self.dtype.itemsize].view(self.dtype)

    def __len__(self) -> int:
        return self.num_documents


def _map_bytes(path: Path) -> NDArray[np.uint8]:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype=np.uint8)
    return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))


class IndexedDatasetWriter:
    """Writes PREFIX.bin and PREFIX.idx as megatron-core's IndexedDatasetBuilder does.

    Both are written as *.tmp and renamed by `close`, the index last; used as a context manager, an exception
    removes them instead. Token ids that do not fit `dtype` raise ValueError.
    """

    def __init__(self, prefix: Path | str, dtype: DTypeLike) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in DTYPE_CODES.values():
            raise ValueError(f"{self.dtype} is not a token dtype of the format: {list(DTYPE_CODES.values())}")
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin_tmp = Path(f"{bin_path(prefix)}.tmp")
        self._file: IO[bytes] = open(self._bin_tmp, "wb")  # noqa: SIM115 - closed by close() or abort()
        self._sizes: list[int] = []
        self._document_indices: list[int] = [0]

    def add_document(self, tokens: ArrayLike, sequence_lengths: Sequence[int] | None = None) -> None:
        """Append one document, ids [n]; `sequence_lengths` (sum n) when it is made of several sequences."""
        ids = np.asarray(tokens)
        lengths = [ids.size] if sequence_lengths is None else [int(length) for length in sequence_lengths]
        if sum(lengths) != ids.size or any(not 0 <= length <= _MAX_SEQUENCE_SIZE for length in lengths):
            raise ValueError(f"sequence lengths {lengths[:5]} do not add up to {ids.size} tokens")
        if ids.size:
            limits = np.iinfo(self.dtype)
            if ids.dtype.kind not in "iu" or ids.min() < limits.min or ids.max() > limits.max:
                raise ValueError(f"token ids {ids.min()}..{ids.max()} ({ids.dtype}) do not fit {self.dtype}")
        self._file.write(ids.astype(self.dtype).tobytes())
        self._sizes.extend(lengths)
        self._document_indices.append(len(self._sizes))

    def close(self) -> None:
        """Finish both files and publish them."""
        if self._file.closed:
            return
        self._file.close()
        idx_tmp = Path(f"{idx_path(self.prefix)}.tmp")
        write_index(idx_tmp, self.dtype, np.array(self._sizes, dtype=np.int32), self._document_indices)
        os.replace(self._bin_tmp, bin_path(self.prefix))
        os.replace(idx_tmp, idx_path(self.prefix))

    def abort(self) -> None:
        """Throw away what was written."""
        self._file.close()
        self._bin_tmp.unlink(missing_ok=True)

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort()
