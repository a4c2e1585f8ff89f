"""The tensors in a directory of torch's distributed checkpoints (`torch_dist`), by their names there, read by rows.

Whatever tensor and pipeline layout wrote it, each chunk of a tensor is one `torch.save` record at a place that
`.metadata` names. `.metadata` is a pickle: it is read with an allow-list of classes, never executed.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from meditron_train.checkpoint.stored import Range, ReadError, Shape, StoredTensor, read_stored
from meditron_train.checkpoint.torch_file import find_tensors
from meditron_train.errors import UserError

# megatron-core's homogeneous layers: one tensor for all of them, with the layer as its first dimension.
_ALL_LAYERS = re.compile(r"^(.*\blayers\.)(?!\d+\.)(.+)$")


class TorchDistTensors:
    """Tensors by name: shape, dtype, rows. Opening reads `.metadata` only.

    A tensor that holds all layers appears as one per layer: `decoder.layers.mlp.linear_fc2.weight` [L, H, F] as
    `decoder.layers.0.mlp.linear_fc2.weight` [H, F] and so on. Raises UserError when `.metadata` is missing or damaged.
    """

    def __init__(self, directory: Path, *, read_once: bool) -> None:
        self.directory, self._read_once = directory, read_once
        self._tensors = _find_tensors(_read_metadata(directory))
        self._found: dict[_Chunk, StoredTensor] = {}

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def place(self, name: str) -> list[str]:
        """The files that hold the tensor; none when it does not exist."""
        return sorted({chunk.file for chunk in self._tensors[name].chunks}) if name in self._tensors else []

    def shape(self, name: str) -> Shape:
        return self._tensor(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._tensor(name).dtype

    def read(self, name: str, rows: Range | None = None) -> torch.Tensor:
        """Rows [start, stop) of the tensor, or all (CPU, as stored). May be called from several threads. Raises
        UserError when a record is damaged."""
        entry = self._tensor(name)
        chunks = entry.chunks
        if len(chunks) == 1 and chunks[0].sizes == entry.shape:
            return self._read_chunk(name, chunks[0], rows)
        start, stop = rows or (0, entry.shape[0])
        tensor = torch.empty(stop - start, *entry.shape[1:], dtype=entry.dtype)
        num_elements = 0
        for chunk in chunks:
            first, last = max(start, chunk.offsets[0]), min(stop, chunk.offsets[0] + chunk.sizes[0])
            if first >= last:
                continue
            part = self._read_chunk(name, chunk, (first - chunk.offsets[0], last - chunk.offsets[0]))
            target = tensor[first - start : last - start]
            for dim, (offset, length) in enumerate(zip(chunk.offsets[1:], part.shape[1:], strict=True), 1):
                target = target.narrow(dim, offset, length)
            target.copy_(part)
            num_elements += part.numel()
        if num_elements != tensor.numel():
            raise UserError(f"{self.directory}: the chunks of {name} do not cover it.")
        return tensor

    def problems(self) -> list[str]:
        """Files that are missing or cut off, one line each. No tensor is read for it."""
        problems = []
        ends: dict[str, int] = defaultdict(int)
        for tensor in self._tensors.values():
            for chunk in tensor.chunks:
                ends[chunk.file] = max(ends[chunk.file], chunk.start + chunk.num_bytes)
        for file, end in sorted(ends.items()):
            path = self.directory / file
            if Path(file).name != file:
                problems.append(f".metadata names {file!r}, outside the directory")
            elif not path.is_file():
                problems.append(f"{file} is missing")
            elif path.stat().st_size < end:
                problems.append(f"{file} is cut off: {path.stat().st_size} bytes, {end} expected")
        return problems

    def _tensor(self, name: str) -> _Tensor:
        if name not in self._tensors:
            raise UserError(f"{self.directory}: no tensor {name} in the checkpoint.")
        return self._tensors[name]

    def _read_chunk(self, name: str, chunk: _Chunk, rows: Range | None) -> torch.Tensor:
        path = self.directory / chunk.file
        try:
            return read_stored(path, self._find(chunk), name, rows, read_once=self._read_once)
        except (OSError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
            cause = error.__context__ or error  # zipfile calls what the system cannot read a bad file
            if isinstance(cause, OSError):
                raise ReadError(f"{path}: the record of {name} cannot be read ({cause}).") from error
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path}: the record of {name} cannot be read ({first_line}).") from None

    def _find(self, chunk: _Chunk) -> StoredTensor:
        """Where the elements lie inside the record; looked up once, as rows are read many times."""
        if chunk not in self._found:
            with (self.directory / chunk.file).open("rb") as file:
                found = find_tensors(file.fileno(), chunk.start, chunk.num_bytes)
            expected = chunk.sizes if chunk.layer is None else (chunk.num_layers, *chunk.sizes)
            if not isinstance(found, StoredTensor) or found.shape != expected:
                raise ValueError(f"it is not a tensor of shape {list(expected)}")
            self._found[chunk] = found if chunk.layer is None else _layer_of(found, chunk.layer)
        return self._found[chunk]


@dataclass(frozen=True)
class _Chunk:
    """One record: a box of a tensor, in bytes [start, start + num_bytes) of a file.

    layer: of a record of num_layers layers, the one that is meant.
    """

    offsets: Shape
    sizes: Shape
    file: str
    start: int
    num_bytes: int
    layer: int | None = None
    num_layers: int = 0


@dataclass(frozen=True)
class _Tensor:
    shape: Shape
    dtype: torch.dtype
    chunks: tuple[_Chunk, ...]


def _find_tensors(metadata: Metadata) -> dict[str, _Tensor]:
    places = {(index.fqn, tuple(index.offset or ())): info for index, info in metadata.storage_data.items()}
    found: dict[str, _Tensor] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        chunks = []
        for chunk in entry.chunks:
            place = places.get((name, tuple(chunk.offsets)))
            if place is not None:
                box = (tuple(chunk.offsets), tuple(chunk.sizes))
                chunks.append(_Chunk(*box, place.relative_path, place.offset, place.length))
        tensor = _Tensor(tuple(entry.size), entry.properties.dtype, tuple(chunks))
        stacked = _ALL_LAYERS.match(name)
        if stacked and len(tensor.shape) > 1:
            before, after = stacked.groups()
            for layer in range(tensor.shape[0]):
                found[f"{before}{layer}.{after}"] = _one_layer(tensor, layer)
        else:
            found[name] = tensor
    return found


def _one_layer(tensor: _Tensor, layer: int) -> _Tensor:
    chunks = [
        replace(
            chunk,
            offsets=chunk.offsets[1:],
            sizes=chunk.sizes[1:],
            layer=layer - chunk.offsets[0],
            num_layers=chunk.sizes[0],
        )
        for chunk in tensor.chunks
        if chunk.offsets[0] <= layer < chunk.offsets[0] + chunk.sizes[0]
    ]
    return _Tensor(tensor.shape[1:], tensor.dtype, tuple(chunks))


def _layer_of(stored: StoredTensor, layer: int) -> StoredTensor:
    step = stored.stride[0] if stored.stride is not None else torch.Size(stored.shape[1:]).numel()
    return StoredTensor(
        stored.dtype,
        stored.shape[1:],
        stored.offset + layer * step * stored.dtype.itemsize,
        None if stored.stride is None else stored.stride[1:],
    )


_DCP = "torch.distributed.checkpoint."
_ALLOWED_IN_METADATA = frozenset(
    {("collections", "OrderedDict"), ("builtins", "set"), ("torch", "Size"), ("torch.serialization", "_get_layout")}
    | {("pathlib", name) for name in ("Path", "PosixPath", "PurePosixPath")}
    | {(_DCP + "filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")}
    | {
        (_DCP + "metadata", name)
        for name in (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
            "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )
    }
    | {
        (_DCP + "planner", name)
        for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    }
)  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    """Builds the plain data classes of torch's checkpoint metadata and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("megatron."):
            return type(
                name, (), {}
            )  # markers that some versions of megatron-core leave; nothing here needs them
        if (module, name) in _ALLOWED_IN_METADATA:
            return super().find_class(module, name)
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype | torch.layout | torch.memory_format):
            return found
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in checkpoint metadata")


def _read_metadata(directory: Path) -> Metadata:
    path = directory / ".metadata"
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: the checkpoint was cut off or copied without hidden files."
        ) from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise UserError(f"{path} is not the metadata of a sharded checkpoint.")
    return metadata
