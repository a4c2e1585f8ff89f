"""A sharded checkpoint as the ranks of a layout write it: every rank its own file, every tensor in their parts."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from meditron_train.checkpoint.manifest import write_manifest
from meditron_train.checkpoint.sharded.read import ShardedSource
from meditron_train.checkpoint.tensor_map import TensorSpec, tensor_specs


def split_checkpoint(checkpoint: Path, tp: int, pp: int) -> None:
    """Rewrite a checkpoint in place as tp x pp ranks would have saved it, with torch.save alone."""
    source = ShardedSource(checkpoint)
    specs = tensor_specs(source.model)
    tensors = {spec.name: source.read(spec.name) for spec in specs}
    for path in checkpoint.glob("*.distcp"):
        path.unlink()
    entries, places = {}, {}
    for spec in specs:
        tensor = tensors[spec.name]
        chunks = []
        for number, part in enumerate(_parts(spec, tensor, tp)):
            offset = [0] * tensor.dim()
            if spec.tp_dim is not None:
                offset[spec.tp_dim] = number * part.shape[spec.tp_dim]
            rank = _stage(spec, source.model.num_layers, pp) * tp + number % tp
            path = checkpoint / f"__{rank}_0.distcp"
            with path.open("ab") as file:
                start = file.tell()
                torch.save(part.contiguous().clone(), file)
                place = _StorageInfo(path.name, start, file.tell() - start)
            chunks.append(ChunkStorageMetadata(offsets=torch.Size(offset), sizes=part.shape))
            places[MetadataIndex(spec.name, torch.Size(offset), number)] = place
        properties = TensorProperties(dtype=tensor.dtype)
        entries[spec.name] = TensorStorageMetadata(properties=properties, size=tensor.shape, chunks=chunks)
    metadata = Metadata(state_dict_metadata=dict(entries), planner_data=None, storage_data=places)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint)


def _parts(spec: TensorSpec, tensor: torch.Tensor, tp: int) -> tuple[torch.Tensor, ...]:
    """gate and up are each split over the ranks."""
    if spec.tp_dim is None:
        return (tensor,)
    return tensor.chunk(2 * tp if spec.kind == "gate_up" else tp, dim=spec.tp_dim)


def _stage(spec: TensorSpec, num_layers: int, pp: int) -> int:
    if spec.layer is not None:
        return spec.layer * pp // num_layers
    return 0 if spec.name.startswith("embedding") else pp - 1
