"""Compare tensors by their bits, block by block."""

from __future__ import annotations

import math

import torch

from meditron_train.checkpoint.files.stored import Shape

_BLOCK_ELEMENTS = 1 << 22  # differences are measured in float64, block by block
_BIT_TYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class BitComparison:
    """Collects where and by how much two tensors of one shape and dtype differ, given in blocks of rows."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._num_different = 0
        self._first: tuple[int, object, object] | None = None  # flat index and both values
        self._largest = 0.0

    def add(self, a: torch.Tensor, b: torch.Tensor, row: int = 0) -> None:
        """Blocks that begin at `row` of the tensors."""
        bits_a, bits_b = (t.contiguous().reshape(-1).view(_BIT_TYPES[t.element_size()]) for t in (a, b))
        if torch.equal(bits_a, bits_b):
            return
        offset = row * math.prod(self._shape[1:])
        flat_a, flat_b = a.reshape(-1), b.reshape(-1)
        for start in range(0, bits_a.numel(), _BLOCK_ELEMENTS):
            block = slice(start, start + _BLOCK_ELEMENTS)
            different = bits_a[block] != bits_b[block]
            count = int(different.sum())
            if not count:
                continue
            self._num_different += count
            if self._first is None:
                first = start + int(different.to(torch.uint8).argmax())
                self._first = (offset + first, flat_a[first].item(), flat_b[first].item())
            delta = (flat_a[block][different].double() - flat_b[block][different].double()).abs().max().item()
            largest = self._largest
            self._largest = max(largest, delta) if delta == delta and largest == largest else float("nan")

    def __str__(self) -> str:
        """Empty when nothing differs."""
        if self._first is None:
            return ""
        index, value_a, value_b = self._first
        where = [int(i) for i in torch.unravel_index(torch.tensor(index), self._shape)] if self._shape else []
        return (
            f"{self._num_different} of {math.prod(self._shape)} elements differ, first at {where}: "
            f"{value_a!r} against {value_b!r}, max |Δ| {self._largest:.6g}"
        )
