"""Safetensors shards with an index, as transformers names them: which tensor lies in which file at which byte.

All of it follows from names, shapes and dtypes alone, before any tensor is read.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from meditron_train.checkpoint.planned import PlannedFile, PlannedTensor

_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
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
    return [plan_safetensors_file(name, shard) for name, shard in zip(names, shards, strict=True)]


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


def plan_safetensors_file(
    file_name: str, shard: Sequence[PlannedTensor], said: Mapping[str, str] | None = None
) -> PlannedFile:
    """One file.

    Args:
        file_name: of the file.
        shard: its tensors, at least one.
        said: what its header says beside them.
    """
    # Wide types first keep every tensor aligned, as the library that reads them wants it.
    ordered = sorted(shard, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(said or {})}}
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
