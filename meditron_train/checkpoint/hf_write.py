"""Write safetensors shards with an index, as transformers names them, one tensor at a time into its final place.

The plan (which tensor in which file at which byte) follows from names, shapes and dtypes alone, so headers are
written first and tensors may come in any order, from several threads.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from meditron_train.errors import UserError

Shape = tuple[int, ...]

_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


@dataclass(frozen=True)
class TensorPlan:
    """Name, dtype and shape of a tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: Shape

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class HFWriter:
    """Writes the planned tensors into `directory`; a context manager that ends with the index.

    A model that fits into `max_shard_num_bytes` becomes `model.safetensors`, a larger one
    `model-00001-of-0000N.safetensors` … with `model.safetensors.index.json`, filled in the order of the plans.
    Leaving the block without an error raises ValueError if a planned tensor was not written.
    """

    def __init__(
        self, directory: Path, plans: Iterable[TensorPlan], max_shard_num_bytes: int = 5 * 10**9
    ) -> None:
        self.directory = directory
        shards = _split(list(plans), max_shard_num_bytes)
        self._plans = {plan.name: plan for shard in shards for plan in shard}
        self._file_of: dict[str, str] = {}
        self._places: dict[str, tuple[int, int]] = {}  # name -> (file descriptor, offset)
        self._descriptors: list[int] = []
        self._missing = set(self._plans)
        for number, shard in enumerate(shards, start=1):
            many = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._start_file(many if len(shards) > 1 else "model.safetensors", shard)
        self._num_shards = len(shards)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor at its place, cast to its planned dtype. Raises OSError when the disk is full."""
        plan = self._plans[name]
        if tuple(tensor.shape) != plan.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, planned was {list(plan.shape)}")
        descriptor, offset = self._places[name]
        flat = tensor.detach().to(plan.dtype).contiguous().reshape(-1)
        view = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
        while view:
            num_bytes = os.pwrite(descriptor, view[: 1 << 30], offset)
            view, offset = view[num_bytes:], offset + num_bytes
        self._missing.discard(name)

    def __enter__(self) -> HFWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            for descriptor in self._descriptors:
                os.close(descriptor)

    def _finish(self) -> None:
        if self._missing:
            raise ValueError(f"tensors planned but not written: {sorted(self._missing)[:5]}")
        for descriptor in self._descriptors:
            os.fsync(descriptor)
        if self._num_shards > 1:
            plans = self._plans.values()
            sizes = {
                "total_parameters": sum(math.prod(plan.shape) for plan in plans),
                "total_size": sum(plan.num_bytes for plan in plans),
            }
            index = {"metadata": sizes, "weight_map": dict(sorted(self._file_of.items()))}
            path = self.directory / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _start_file(self, file_name: str, shard: list[TensorPlan]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offsets, end = {}, 0
        for plan in sorted(
            shard, key=lambda plan: -plan.dtype.itemsize
        ):  # wide types first keeps all aligned
            offsets[plan.name] = end
            end += plan.num_bytes
            header[plan.name] = {
                "dtype": _DTYPE_NAMES[plan.dtype],
                "shape": list(plan.shape),
                "data_offsets": [offsets[plan.name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        descriptor = os.open(self.directory / file_name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._descriptors.append(descriptor)
        os.pwrite(descriptor, struct.pack("<Q", len(text)) + text, 0)
        for plan in shard:
            self._file_of[plan.name] = file_name
            self._places[plan.name] = (descriptor, 8 + len(text) + offsets[plan.name])


def parse_num_bytes(text: str | int) -> int:
    """Bytes in a size like "5GB" (10^9), "4GiB" (2^30) or "500MB". Raises UserError when it is none."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)\s*", str(text).upper())
    if not match or match.group(2) not in _UNITS or float(match.group(1)) <= 0:
        raise UserError(
            f"{text!r} is not a size. Write for example 5GB (10^9 bytes), 4GiB (2^30 bytes) or 500MB."
        )
    return int(float(match.group(1)) * _UNITS[match.group(2)])


def format_num_bytes(num_bytes: int) -> str:
    """For people, in the largest binary unit that gives at least 1: "1000 bytes", "4.00 GiB"."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if num_bytes >= _UNITS[unit.upper()]:
            return f"{num_bytes / _UNITS[unit.upper()]:.2f} {unit}"
    return f"{num_bytes} bytes"


def _split(plans: list[TensorPlan], max_num_bytes: int) -> list[list[TensorPlan]]:
    """Consecutive plans per file, each file at most `max_num_bytes` of data unless one tensor alone is larger."""
    shards: list[list[TensorPlan]] = [[]]
    num_bytes = 0
    for plan in plans:
        if shards[-1] and num_bytes + plan.num_bytes > max_num_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(plan)
        num_bytes += plan.num_bytes
    return shards
