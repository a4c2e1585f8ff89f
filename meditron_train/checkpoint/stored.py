"""Where a tensor lies in a file, and how any of its rows are read: `pread` into fresh memory, never a mapped page,
which would count as resident."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from meditron_train.errors import UserError

Shape = tuple[int, ...]
Range = tuple[int, int]

_BLOCK_BYTES = 16 << 20  # column slices are cut out of row blocks of this size


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    dtype, shape; offset: bytes from the start of the file to its first element; stride: in elements, None when the
    elements follow each other in the usual order.
    """

    dtype: torch.dtype
    shape: Shape
    offset: int
    stride: Shape | None = None


def read_stored(
    path: Path, tensor: StoredTensor, name: str, rows: Range | None = None, columns: Range | None = None
) -> torch.Tensor:
    """A fresh CPU tensor: rows [start, stop) of dimension 0 and columns [start, stop) of dimension 1.

    Raises UserError, naming file and tensor, when the file ends too early, OSError when it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if tensor.stride is not None:
            return _read_strided(descriptor, path, tensor, name, rows, columns)
        if not tensor.shape:
            return _read_rows(descriptor, path, tensor, name, 0, 1).reshape(())
        start, stop = rows or (0, tensor.shape[0])
        if columns is None:
            return _read_rows(descriptor, path, tensor, name, start, stop)
        found = torch.empty(stop - start, columns[1] - columns[0], dtype=tensor.dtype)
        height = max(1, _BLOCK_BYTES // max(1, tensor.shape[1] * tensor.dtype.itemsize))
        for row in range(start, stop, height):
            block = _read_rows(descriptor, path, tensor, name, row, min(row + height, stop))
            found[row - start : row - start + block.shape[0]] = block[:, columns[0] : columns[1]]
        return found
    finally:
        os.close(descriptor)


def _read_rows(
    descriptor: int, path: Path, tensor: StoredTensor, name: str, start: int, stop: int
) -> torch.Tensor:
    width = math.prod(tensor.shape[1:])
    offset = tensor.offset + start * width * tensor.dtype.itemsize
    flat = _read_elements(descriptor, path, name, tensor.dtype, (stop - start) * width, offset)
    return flat.view(stop - start, *tensor.shape[1:])


def _read_strided(
    descriptor: int,
    path: Path,
    tensor: StoredTensor,
    name: str,
    rows: Range | None,
    columns: Range | None,
) -> torch.Tensor:
    """Of a transposed or expanded tensor: the whole stretch of the file that it covers is read."""
    assert tensor.stride is not None
    extent = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride, strict=True))
    if 0 in tensor.shape:
        extent = 0
    flat = _read_elements(descriptor, path, name, tensor.dtype, extent, tensor.offset)
    found = flat.as_strided(tensor.shape, tensor.stride)
    if rows is not None:
        found = found[rows[0] : rows[1]]
    if columns is not None:
        found = found[:, columns[0] : columns[1]]
    return found.clone(memory_format=torch.contiguous_format)


def _read_elements(
    descriptor: int, path: Path, name: str, dtype: torch.dtype, num_elements: int, offset: int
) -> torch.Tensor:
    flat = torch.empty(num_elements, dtype=dtype)
    view = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
    while view:  # the kernel reads at most 2 GiB at once
        num_bytes = os.preadv(descriptor, [view], offset)
        if num_bytes == 0:
            raise UserError(f"{path} ended while reading {name}: the file was truncated. Fetch it again.")
        view, offset = view[num_bytes:], offset + num_bytes
    return flat
