"""What becomes of each document that stage `read` kept: written on, or dropped as a duplicate of which other.

Two arrays over all documents. They are filled by one process that sees only the memory-mapped indexes, never text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Fate(IntEnum):
    """Why a document is dropped."""

    KEPT = 0
    EXACT_DUPLICATE = 1
    FULL_TEXT = 2
    """An abstract, and the paper is there."""
    NEAR_DUPLICATE = 3

    @property
    def rule(self) -> str:
        return f"duplicate.{self.name.lower()}"


@dataclass(frozen=True)
class Fates:
    """The arrays; NumPy's memory maps where they were loaded."""

    fate: NDArray[np.uint8]
    kept: NDArray[np.int64]
    """For a dropped document, the number of the one that stands for it."""

    @classmethod
    def all_kept(cls, num_documents: int) -> Fates:
        return cls(np.zeros(num_documents, np.uint8), np.arange(num_documents, dtype=np.int64))

    @classmethod
    def load(cls, path: Path) -> Fates:
        """Of a directory written by `write`, to read."""
        return cls(_mapped(path / "fate", np.uint8), _mapped(path / "kept", np.int64))

    def copy(self) -> Fates:
        return Fates(np.array(self.fate), np.array(self.kept))

    def write(self, directory: Path) -> None:
        self.fate.tofile(directory / "fate")
        self.kept.tofile(directory / "kept")

    def drop(self, documents: NDArray[np.int64], fate: Fate, kept: NDArray[np.int64]) -> None:
        self.fate[documents] = fate
        self.kept[documents] = kept

    def is_kept(self, documents: NDArray[np.int64]) -> NDArray[np.bool_]:
        return self.fate[documents] == Fate.KEPT

    def stands_for(self, document: int) -> int:
        """The document that is in the corpus in place of this one."""
        while self.fate[document] != Fate.KEPT:
            document = int(self.kept[document])
        return document


def _mapped(path: Path, dtype: type[np.generic]) -> NDArray[Any]:
    """A raw array on disk; NumPy cannot map an empty file."""
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def groups_of_equals(*sorted_columns: NDArray[np.uint64]) -> Iterable[slice]:
    """The runs of two or more equal rows in columns sorted together."""
    size = len(sorted_columns[0])
    if size < 2:
        return
    changes = np.zeros(size - 1, bool)
    for column in sorted_columns:
        changes |= column[1:] != column[:-1]
    bounds = np.concatenate(([0], np.flatnonzero(changes) + 1, [size]))
    for first in np.flatnonzero(np.diff(bounds) > 1).tolist():
        yield slice(int(bounds[first]), int(bounds[first + 1]))
