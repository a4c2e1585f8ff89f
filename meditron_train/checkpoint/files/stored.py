"""Where a tensor lies in a file, and how any of its rows are read: `pread` into fresh memory, never a mapped page,
which would count as resident."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from meditron_train.errors import PassingError, UserError

Shape = tuple[int, ...]
Range = tuple[int, int]

_BLOCK_BYTES = 16 << 20  # column slices are cut out of row blocks of this size


class ReadError(PassingError):
    """The system could not read a file: of the data itself it says nothing, and another attempt may succeed."""


class Tensors(Protocol):
    """Tensors by name, read by rows, from several threads."""

    def shape(self, name: str) -> Shape: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, rows: Range | None = None) -> torch.Tensor: ...


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        dtype, shape: of the tensor.
        offset: bytes from the start of the file to its first element.
        stride: in elements; None when the elements follow each other in the usual order.
    """

    dtype: torch.dtype
    shape: Shape
    offset: int
    stride: Shape | None = None


def read_stored(
    path: Path,
    tensor: StoredTensor,
    name: str,
    rows: Range | None = None,
    columns: Range | None = None,
    *,
    read_once: bool = False,
) -> torch.Tensor:
    """A fresh CPU tensor: rows [start, stop) of dimension 0 and columns [start, stop) of dimension 1.

    Args:
        path: the file.
        tensor: where in the file it lies.
        name: for messages.
        rows, columns: None: all.
        read_once: the bytes will not be read again soon, so they need not stay in the page cache.

    Raises:
        UserError: the file ends too early; names file and tensor.
        ReadError: the system cannot read it; names file and tensor.
    """
    try:
        return _read(path, tensor, name, rows, columns, read_once)
    except OSError as error:
        raise ReadError(f"{path}: {name} cannot be read ({error.strerror or error})") from error


def read_open(descriptor: int, tensor: StoredTensor) -> torch.Tensor:
    """The whole of a small tensor in an open file."""
    file = _OpenFile(Path(f"file {descriptor}"), descriptor, "a tensor", read_once=False)
    if tensor.stride is not None:
        return _read_strided(file, tensor, None, None)
    return file.read(tensor.dtype, math.prod(tensor.shape), tensor.offset).view(tensor.shape)


def _read(
    path: Path,
    tensor: StoredTensor,
    name: str,
    rows: Range | None,
    columns: Range | None,
    read_once: bool,
) -> torch.Tensor:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        file = _OpenFile(path, descriptor, name, read_once)
        if tensor.stride is not None:
            return _read_strided(file, tensor, rows, columns)
        if not tensor.shape:
            return _read_rows(file, tensor, 0, 1).reshape(())
        start, stop = rows or (0, tensor.shape[0])
        if columns is None:
            return _read_rows(file, tensor, start, stop)
        found = torch.empty(stop - start, columns[1] - columns[0], dtype=tensor.dtype)
        height = max(1, _BLOCK_BYTES // max(1, tensor.shape[1] * tensor.dtype.itemsize))
        for row in range(start, stop, height):
            block = _read_rows(file, tensor, row, min(row + height, stop))
            found[row - start : row - start + block.shape[0]] = block[:, columns[0] : columns[1]]
        return found
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class _OpenFile:
    """A file from which tensor `name` is read."""

    path: Path
    descriptor: int
    name: str
    read_once: bool

    def read(self, dtype: torch.dtype, num_elements: int, offset: int) -> torch.Tensor:
        flat = torch.empty(num_elements, dtype=dtype)
        view = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
        while view:  # the kernel reads at most 2 GiB at once
            num_bytes = os.preadv(self.descriptor, [view], offset)
            if num_bytes == 0:
                raise UserError(
                    f"{self.path} ended while reading {self.name}: the file was truncated. Fetch it again"
                )
            if self.read_once and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self.descriptor, offset, num_bytes, os.POSIX_FADV_DONTNEED)
            view, offset = view[num_bytes:], offset + num_bytes
        return flat


def _read_rows(file: _OpenFile, tensor: StoredTensor, start: int, stop: int) -> torch.Tensor:
    width = math.prod(tensor.shape[1:])
    offset = tensor.offset + start * width * tensor.dtype.itemsize
    return file.read(tensor.dtype, (stop - start) * width, offset).view(stop - start, *tensor.shape[1:])


def _read_strided(
    file: _OpenFile, tensor: StoredTensor, rows: Range | None, columns: Range | None
) -> torch.Tensor:
    """Of a transposed or expanded tensor: the whole stretch of the file that it covers is read."""
    assert tensor.stride is not None
    extent = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride, strict=True))
    if 0 in tensor.shape:
        extent = 0
    found = file.read(tensor.dtype, extent, tensor.offset).as_strided(tensor.shape, tensor.stride)
    if rows is not None:
        found = found[rows[0] : rows[1]]
    if columns is not None:
        found = found[:, columns[0] : columns[1]]
    return found.clone(memory_format=torch.contiguous_format)


def row_blocks(shape: Shape, dtype: torch.dtype, block_num_bytes: int = 8 << 20) -> list[Range | None]:
    """Ranges of rows of a few MiB that cover a tensor; [None], the whole, for a scalar."""
    if not shape:
        return [None]
    height = max(1, block_num_bytes // max(1, math.prod(shape[1:]) * dtype.itemsize))
    return [(start, min(start + height, shape[0])) for start in range(0, shape[0], height)]


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
