"""Planned files written from tensors in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from meditron_train.checkpoint.convert.stream import write_file
from meditron_train.checkpoint.planned import PlannedFile, PlannedTensor
from meditron_train.checkpoint.tensor_map import Piece


class MemorySource:
    """Tensors by name, read by rows."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        return self.tensors[name][slice(*rows) if rows else ...].clone()


def planned(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> list[PlannedTensor]:
    """Each tensor as it is, or cast."""
    return [
        PlannedTensor(name, dtype or t.dtype, tuple(t.shape), (Piece(name, 0, len(t), name),))
        for name, t in tensors.items()
    ]


def write_planned(
    directory: Path,
    files: Iterable[PlannedFile],
    tensors: Mapping[str, torch.Tensor],
    block_num_bytes: int = 100,
) -> None:
    for file in files:
        written = write_file(
            directory / file.name,
            file,
            MemorySource(tensors),
            block_num_bytes=block_num_bytes,
            allow_nonfinite=True,
        )
        assert written.num_bytes == (directory / file.name).stat().st_size == file.num_bytes
