"""What files will hold, planned from names, shapes and dtypes alone, before any tensor is read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from meditron_train.checkpoint.files.stored import Shape
from meditron_train.checkpoint.tensor_map import Piece


@dataclass(frozen=True)
class Stack:
    """A tensor with a first dimension for the layers.

    Attributes:
        layer: the one that a part holds.
    """

    name: str
    num_layers: int
    layer: int


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output.

    Attributes:
        pieces: rows of the source that it is made of, in order, cast to `dtype`.
        before: bytes that precede its data in the file.
        after: bytes that follow, given the CRC-32 of the data.
        part_of: where it is one layer of a tensor that holds all of them.
    """

    name: str
    dtype: torch.dtype
    shape: Shape
    pieces: tuple[Piece, ...]
    before: bytes = b""
    after: Callable[[int], bytes] | None = None
    part_of: Stack | None = None

    @property
    def num_bytes(self) -> int:
        """Of the data alone."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PlannedFile:
    """One file of the output: its tensors in the order of their bytes.

    Attributes:
        num_bytes: of the whole file.
    """

    name: str
    tensors: tuple[PlannedTensor, ...]
    num_bytes: int
