"""The tensors in a directory of torch's distributed checkpoints (`torch_dist`), by their names there, read by rows.

Whatever tensor and pipeline layout wrote it, each chunk of a tensor is one `torch.save` record at a place that
`.metadata` names.
"""

from __future__ import annotations

import re
import zipfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from meditron_train.checkpoint.files.pickled import Allowed, ForbiddenGlobal, shown
from meditron_train.checkpoint.files.stored import Range, ReadError, Shape, StoredTensor, read_stored
from meditron_train.checkpoint.files.torch_file import find_tensors
from meditron_train.checkpoint.sharded.metadata import read_metadata
from meditron_train.errors import MeditronError, UserError
from meditron_train.files import open_regular

# megatron-core's homogeneous layers: one tensor for all of them, with the layer as its first dimension.
_ALL_LAYERS = re.compile(r"^(.*\blayers\.)(?!\d+\.)(.+)$")

_MAX_LAYERS = 10_000
_MAX_PARTS = 200_000  # layers, and their chunks, of all tensors that hold all layers


class TorchDistTensors:
    """Tensors by name: shape, dtype, rows. Opening reads `.metadata` only.

    A tensor that holds all layers appears as one per layer: `decoder.layers.mlp.linear_fc2.weight` [L, H, F]
    as `decoder.layers.0.mlp.linear_fc2.weight` [H, F] and so on.

    Raises:
        UserError: `.metadata` is missing or damaged.
    """

    def __init__(self, directory: Path, *, read_once: bool) -> None:
        self.directory, self._read_once = directory, read_once
        self._metadata = read_metadata(directory)
        self._tensors = _find_tensors(self._metadata)
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
        """Rows [start, stop) of the tensor, or all (CPU, as stored). Any thread may call it.

        Raises:
            UserError: a record is damaged.
        """
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
            raise UserError(f"{self.directory}: the chunks of {name} do not cover it")
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
            if not path.is_file():
                problems.append(f"{file} is missing")
            elif path.stat().st_size < end:
                problems.append(f"{file} is cut off: {path.stat().st_size} bytes, {end} expected")
        return problems

    def read_object(self, key: str, also_allowed: Allowed) -> Any:
        """What the object `key` holds (of those stored in parts, the first); None when there is no such object.

        Args:
            key: name of the object.
            also_allowed: further names, as for `find_tensors`.

        Raises:
            UserError: its record is damaged or could run code.
        """
        for index, place in self._metadata.storage_data.items():
            if index.fqn.partition("/")[0] == key and index.fqn not in self._tensors:
                find = partial(find_tensors, also_allowed=also_allowed)
                path = self.directory / place.relative_path
                return read_record(find, path, index.fqn, place.offset, place.length)
        return None

    def pickle_problems(self) -> list[str]:
        """Records, of tensors and objects, whose pickle is damaged or could run code, one line each. All are opened."""
        problems = []
        for index, place in self._metadata.storage_data.items():
            try:
                path = self.directory / place.relative_path
                read_record(find_tensors, path, index.fqn, place.offset, place.length)
            except MeditronError as error:
                problems.append(str(error))
        return problems

    def _tensor(self, name: str) -> _Tensor:
        if name not in self._tensors:
            raise UserError(f"{self.directory}: no tensor {name} in the checkpoint")
        return self._tensors[name]

    def _read_chunk(self, name: str, chunk: _Chunk, rows: Range | None) -> torch.Tensor:
        stored = self._find(name, chunk)
        return read_stored(self.directory / chunk.file, stored, name, rows, read_once=self._read_once)

    def _find(self, name: str, chunk: _Chunk) -> StoredTensor:
        """Where the elements lie inside the record; looked up once, as rows are read many times."""
        if chunk not in self._found:
            path = self.directory / chunk.file
            found = read_record(find_tensors, path, name, chunk.start, chunk.num_bytes)
            dtype = self._tensor(name).dtype
            expected = chunk.sizes if chunk.layer is None else (chunk.num_layers, *chunk.sizes)
            if not isinstance(found, StoredTensor) or (found.shape, found.dtype) != (expected, dtype):
                raise UserError(f"{path}: the record of {name} is not a tensor {list(expected)} of {dtype}")
            self._found[chunk] = found if chunk.layer is None else _layer_of(found, chunk.layer)
        return self._found[chunk]


def read_record(
    read: Callable[[int, int, int], Any], path: Path, name: str, start: int, num_bytes: int
) -> Any:
    """`read` (find_tensors or load_torch_file) of the record of `name`, in bytes [start, start + num_bytes) of a file.

    Raises:
        UserError: the record is damaged or could run code.
        ReadError: the system cannot read it.
    """
    where = f"{path}: the record of {shown(name)}"
    try:
        with open_regular(path) as file:
            return read(file.fileno(), start, num_bytes)
    except ForbiddenGlobal as error:
        raise UserError(
            f"{where} refers to {error}, which is not a tensor. Refused, as it could run code"
        ) from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        cause = error.__context__ or error  # zipfile calls what the system cannot read a bad file
        if isinstance(cause, OSError):
            raise ReadError(f"{where} cannot be read ({cause})") from error
        raise UserError(f"{where} cannot be read ({shown(error)})") from None


@dataclass(frozen=True)
class _Chunk:
    """One record: a box of a tensor, in bytes [start, start + num_bytes) of a file.

    Attributes:
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
    parts_left = _MAX_PARTS
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
            if tensor.shape[0] > _MAX_LAYERS:
                raise UserError(f".metadata says that {shown(name)} holds {tensor.shape[0]} layers")
            parts_left -= tensor.shape[0] + sum(chunk.sizes[0] for chunk in chunks)
            if parts_left < 0:
                raise UserError(f".metadata describes more than {_MAX_PARTS:,} layers and parts of them")
            for layer, one in enumerate(_layers_of(tensor)):
                found[f"{before}{layer}.{after}"] = one
        else:
            found[name] = tensor
    return found


def _layers_of(tensor: _Tensor) -> list[_Tensor]:
    """The layers of a tensor that holds all of them."""
    chunks: list[list[_Chunk]] = [[] for _ in range(tensor.shape[0])]
    for chunk in tensor.chunks:
        of_one = replace(chunk, offsets=chunk.offsets[1:], sizes=chunk.sizes[1:], num_layers=chunk.sizes[0])
        for layer in range(chunk.sizes[0]):
            chunks[chunk.offsets[0] + layer].append(replace(of_one, layer=layer))
    return [_Tensor(tensor.shape[1:], tensor.dtype, tuple(of_layer)) for of_layer in chunks]


def _layer_of(stored: StoredTensor, layer: int) -> StoredTensor:
    step = stored.stride[0] if stored.stride is not None else torch.Size(stored.shape[1:]).numel()
    return StoredTensor(
        stored.dtype,
        stored.shape[1:],
        stored.offset + layer * step * stored.dtype.itemsize,
        None if stored.stride is None else stored.stride[1:],
    )
