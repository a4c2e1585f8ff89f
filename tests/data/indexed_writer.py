"""Datasets for tests, written document by document. `tokenize` writes its own in blocks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from meditron_train.data.index_file import DTYPE_CODES, bin_path, idx_path, write_index

_MAX_SEQUENCE_SIZE = 2**31 - 1


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
