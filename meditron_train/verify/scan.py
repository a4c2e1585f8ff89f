"""Hash and look through the tensors of a model, each read once, in blocks, by several threads."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from meditron_train.checkpoint.convert.stream import Block, first_nonfinite, index_text
from meditron_train.checkpoint.files.stored import byte_view, row_blocks
from meditron_train.checkpoint.planned import PlannedTensor
from meditron_train.errors import MeditronError
from meditron_train.verify.side import FullSide

_T = TypeVar("_T")


@dataclass(frozen=True)
class ScannedTensor:
    """SHA-256 of the bytes in C order; where the first NaN or infinity is; what kept the tensor from being read."""

    sha256: str = ""
    nonfinite: str | None = None
    problem: str | None = None


def scan_tensor(side: FullSide, name: str, dtype: torch.dtype | None = None) -> ScannedTensor:
    """Read one tensor, cast to `dtype` if given."""
    digest, nonfinite = hashlib.sha256(), None
    try:
        shape = side.shape(name)
        plan = PlannedTensor(name, dtype or side.dtype(name), shape, ())
        for rows in row_blocks(shape, side.dtype(name)):
            data = side.read(name, rows).to(plan.dtype)
            digest.update(byte_view(data))
            if nonfinite is None and (index := first_nonfinite(data)) is not None:
                nonfinite = index_text(Block(plan, data, data, name, rows[0] if rows else 0, False), index)
    except MeditronError as error:
        return ScannedTensor(problem=str(error))
    return ScannedTensor(digest.hexdigest(), nonfinite)


def in_parallel(function: Callable[[str], _T], names: Sequence[str]) -> Iterator[tuple[str, _T]]:
    """(name, function(name)) in the order of the names, as many at a time as there are cores."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the workers are the parallelism
    try:
        with ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 1))) as pool:
            yield from zip(names, pool.map(function, names), strict=True)
    finally:
        torch.set_num_threads(num_threads)
