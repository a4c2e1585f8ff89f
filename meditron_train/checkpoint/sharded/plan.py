"""Sharded checkpoints (megatron-core's `torch_dist`) without process groups or a model: which tensor lies where.

Each tensor is one torch.save record in a `.distcp` file, and `.metadata` says where. torch's own writer would keep
every tensor of a file in memory until the file ends.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

import meditron_train
from meditron_train.checkpoint.files.stored import Shape
from meditron_train.checkpoint.files.torch_file import frame_record
from meditron_train.checkpoint.planned import PlannedFile, PlannedTensor
from meditron_train.config.model_config import ModelConfig

META_FORMAT = "meditron-train/1"

# What megatron-core's dist_checkpointing.load looks for to choose its reader.
_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_OBJECTS_NAME = "__0_objects.distcp"
# Small enough that several are written at a time and that little is lost by a kill.
_MAX_FILE_BYTES = 512 << 20


def plan_distcp(tensors: Iterable[PlannedTensor]) -> list[PlannedFile]:
    """The `.distcp` files that hold the tensors, filled in their order."""
    files: list[list[PlannedTensor]] = [[]]
    sizes = [0]
    for tensor in tensors:
        frame = frame_record(_record_shape(tensor), tensor.dtype)
        if files[-1] and sizes[-1] + frame.num_bytes > _MAX_FILE_BYTES:
            files.append([])
            sizes.append(0)
        files[-1].append(replace(tensor, before=frame.before, after=frame.after))
        sizes[-1] += frame.num_bytes
    return [
        PlannedFile(f"__0_{number}.distcp", tuple(members), num_bytes)
        for number, (members, num_bytes) in enumerate(zip(files, sizes, strict=True))
    ]


def write_index(
    directory: Path,
    files: Sequence[PlannedFile],
    *,
    common: Mapping[str, Any] | None = None,
    objects: Mapping[str, bytes] | None = None,
) -> None:
    """Write `.metadata`, `common.pt` and `metadata.json`, by which torch and megatron-core find the tensors.

    Args:
        directory: the checkpoint.
        files: its tensors.
        common: the content of common.pt; None: ours.
        objects: name -> torch.save record of what is not a tensor; each gets a file of its own.
    """
    tensors: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for file in files:
        start = 0
        for tensor in file.tensors:
            shape, stack = _record_shape(tensor), tensor.part_of
            offsets = torch.Size(
                [0] * len(shape) if stack is None else [stack.layer, *[0] * len(tensor.shape)]
            )
            name, size = tensor.name, torch.Size(shape)
            if stack is not None:
                name, size = stack.name, torch.Size([stack.num_layers, *tensor.shape])
            entry = tensors.setdefault(name, TensorStorageMetadata(TensorProperties(tensor.dtype), size, []))
            places[MetadataIndex(name, offsets, len(entry.chunks))] = _StorageInfo(
                Path(file.name).name, start, frame_record(shape, tensor.dtype).num_bytes
            )
            entry.chunks.append(ChunkStorageMetadata(offsets=offsets, sizes=torch.Size(shape)))
            start += frame_record(shape, tensor.dtype).num_bytes
    if objects:
        with (directory / _OBJECTS_NAME).open("wb") as raw:
            for name, record in objects.items():
                tensors[name] = BytesStorageMetadata()
                places[MetadataIndex(name)] = _StorageInfo(_OBJECTS_NAME, raw.tell(), len(record))
                raw.write(record)
    metadata = Metadata(state_dict_metadata=tensors, planner_data=None, storage_data=places)
    with (directory / ".metadata").open("wb") as raw:
        pickle.dump(metadata, raw)
    with (directory / "common.pt").open("wb") as raw:
        torch.save(common or {"content_metadata": {"non_homogeneous_layers": True}}, raw)
    (directory / "metadata.json").write_text(json.dumps(_BACKENDS))


def _record_shape(tensor: PlannedTensor) -> Shape:
    """Of the tensor as its record holds it: megatron-core keeps the dimension of the layers in a layer of a stack."""
    return tensor.shape if tensor.part_of is None else (1, *tensor.shape)


def meta_json(
    model: ModelConfig,
    padded_vocab_size: int,
    *,
    step: int = 0,
    tokens: int = 0,
    samples: int = 0,
    layout: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    contains: tuple[str, ...] = ("model",),
) -> dict[str, Any]:
    """The content of `meta.json`: what the checkpoint is, readable without loading it."""
    return {
        "format": META_FORMAT,
        "step": step,
        "tokens": tokens,
        "samples": samples,
        "model": model.model_dump(mode="json"),
        "padded_vocab_size": padded_vocab_size,
        "layout": layout or {},
        "config": config,
        "versions": {"meditron_train": meditron_train.__version__, "torch": torch.__version__},
        "contains": list(contains),
    }
