"""Megatron's indexed dataset, byte for byte: PREFIX.bin (token ids) and PREFIX.idx (where each document lies).

Beside them a dataset of conversations has PREFIX.loss_mask.bin, see `meditron_train.data.meta.loss_mask_path`.
"""

from __future__ import annotations

import os
import struct
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meditron_train.data.index_file import DTYPE_CODES, bin_path, idx_path
from meditron_train.data.meta import loss_mask_path
from meditron_train.errors import Cause, MeditronError, UserError
from meditron_train.log import get_logger
from meditron_train.native.packing import TokenFile

_log = get_logger(__name__)

_MAX_SEQUENCE_SIZE = 2**31 - 1


class IndexedDataset:
    """The documents of PREFIX.bin/.idx, memory-mapped. A document of several sequences reads as one.

    The index is checked whole on opening. Nothing is ever read outside the .bin.

    Raises:
        UserError: a file is missing or corrupt, or the two do not belong together (both sizes are named).
    """

    def __init__(self, prefix: Path | str) -> None:
        self.prefix = Path(prefix)
        paths = [idx_path(prefix), bin_path(prefix)]
        missing = [str(path) for path in paths if not path.is_file()]
        if missing:
            is_file_name = self.prefix.suffix in (".bin", ".idx")
            hint = " (give the prefix, without .bin or .idx)" if is_file_name else ""
            raise UserError(
                f"no indexed dataset at {prefix}: missing {' and '.join(missing)}{hint}. "
                "`meditron-train data tokenize FILE... --tokenizer DIR --output PREFIX` makes one"
            )
        if loss_mask_path(prefix).is_file():
            paths.append(loss_mask_path(prefix))
        self._opened = {path: path.stat() for path in paths}
        self._touched: set[Path] = set()
        self._idx, self._bin, *masks = (_map_bytes(path) for path in paths)
        self.loss_mask: NDArray[np.uint8] | None = masks[0] if masks else None
        """1 for each token of the assistant's, else 0, in the order of `tokens`; None without conversations."""
        try:
            self.file = TokenFile(self._idx, self._bin)
        except ValueError as error:
            raise UserError(
                f"{paths[0]} ({self._idx.size} bytes) and {paths[1]} ({self._bin.size} bytes) cannot be "
                "read: "
                f"{error}. Copy both files again from one run, or tokenize again"
            ) from error
        if self.loss_mask is not None and self.loss_mask.size != self.tokens.size:
            raise UserError(
                f"{paths[2]} marks {self.loss_mask.size} tokens, but {paths[1]} has {self.tokens.size}: copy the files "
                "again from one run, or tokenize again"
            )

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

    @cached_property
    def document_starts(self) -> NDArray[np.int64]:
        """Place in `tokens` of the first token of each document, int64 [num_documents]; arbitrary for an empty one."""
        num_sequences, num_indices = struct.unpack("<QQ", self._idx[18:34].tobytes())
        pointers_at = 34 + 4 * num_sequences
        pointers = np.frombuffer(self._idx, "<i8", num_sequences, pointers_at)
        first_sequences = np.frombuffer(self._idx, "<i8", num_indices, pointers_at + 8 * num_sequences)[:-1]
        if num_sequences == 0:
            return np.zeros(len(first_sequences), dtype=np.int64)
        return pointers[np.minimum(first_sequences, num_sequences - 1)] // self.dtype.itemsize

    @property
    def tokens(self) -> NDArray:
        """The tokens of all sequences as they lie in the .bin, memory-mapped."""
        return self._bin[: self._bin.size // self.dtype.itemsize * self.dtype.itemsize].view(self.dtype)

    def check_unchanged(self) -> None:
        """Look whether the mapped files are as they were when they were opened.

        Raises:
            MeditronError: one is shorter now; reading beyond its end would kill the process without a word.
        """
        for path, opened in self._opened.items():
            try:
                now = path.stat()
            except OSError:
                continue  # gone from its name: what is mapped stays
            if now.st_ino != opened.st_ino:
                continue  # replaced by another file
            if now.st_size < opened.st_size:
                raise MeditronError(
                    f"{path} was truncated while it is read: it had {opened.st_size} bytes and has {now.st_size} now. "
                    "Restore it; the same command then continues from the last checkpoint",
                    cause=Cause.CHANGED,
                )
            if now.st_mtime_ns != opened.st_mtime_ns and path not in self._touched:
                self._touched.add(path)
                _log.warning("%s was written to while it is read: what the run reads may have changed", path)

    def same_data(self, other: IndexedDataset) -> bool:
        """Whether both are one file, under whatever names."""
        return os.path.samefile(bin_path(self.prefix), bin_path(other.prefix))

    def document(self, index: int) -> NDArray:
        """The token ids of one document (a read-only view, dtype as stored).

        Raises:
            IndexError: there is no such document.
        """
        first_byte, length = self.file.document(index)
        return self._bin[first_byte : first_byte + length * self.dtype.itemsize].view(self.dtype)

    def __len__(self) -> int:
        return self.num_documents


def _map_bytes(path: Path) -> NDArray[np.uint8]:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype=np.uint8)
    return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
