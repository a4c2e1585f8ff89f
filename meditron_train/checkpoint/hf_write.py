"""Safetensors shards with an index, as transformers names them: which tensor lies in which file at which byte.

All of it follows from names, shapes and dtypes alone, before any tensor is read.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from meditron_train.checkpoint.stream import PlannedFile, PlannedTensor
from meditron_train.errors import UserError

_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


INDEX_NAME = "model.safetensors.index.json"


def plan_safetensors(
    tensors: Iterable[PlannedTensor], max_shard_num_bytes: int = 5 * 10**9
) -> list[PlannedFile]:
    """The files that hold the tensors, filled in their order.

    A model that fits into `max_shard_num_bytes` becomes `model.safetensors`, a larger one
    `model-00001-of-0000N.safetensors` …, to which `safetensors_index` belongs.
    """
    shards = _split(list(tensors), max_shard_num_bytes)
    many = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    names = many if len(shards) > 1 else ["model.safetensors"]
    return [_plan_file(name, shard) for name, shard in zip(names, shards, strict=True)]


def safetensors_index(files: Sequence[PlannedFile]) -> str | None:
    """The content of `model.safetensors.index.json`; None for a single file, which has none."""
    if len(files) == 1:
        return None
    tensors = [tensor for file in files for tensor in file.tensors]
    sizes = {
        "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors),
        "total_size": sum(tensor.num_bytes for tensor in tensors),
    }
    weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
    return json.dumps({"metadata": sizes, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"


def _plan_file(file_name: str, shard: Sequence[PlannedTensor]) -> PlannedFile:
    # Wide types first keep every tensor aligned, as the library that reads them wants it.
    ordered = sorted(shard, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.num_bytes
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    before = struct.pack("<Q", len(text)) + text
    tensors = (replace(ordered[0], before=before), *ordered[1:])
    return PlannedFile(file_name, tensors, len(before) + end)


def parse_num_bytes(text: str | int) -> int:
    """Bytes in a size like "5GB" (10^9), "4GiB" (2^30) or "500MB". Raises UserError when it is none."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?I?B?)\s*", str(text).upper())
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


def _split(plans: list[PlannedTensor], max_num_bytes: int) -> list[list[PlannedTensor]]:
    """Consecutive plans per file, each file at most `max_num_bytes` of data unless one tensor alone is larger."""
    shards: list[list[PlannedTensor]] = [[]]
    num_bytes = 0
    for plan in plans:
        if shards[-1] and num_bytes + plan.num_bytes > max_num_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(plan)
        num_bytes += plan.num_bytes
    return shards
