"""Read a sharded checkpoint (megatron-core's `torch_dist`) one tensor at a time, without process groups or a model.

Whatever tensor and pipeline layout wrote it, each chunk of a tensor is one `torch.save` record at a place that
`.metadata` names. `.metadata` is a pickle: it is read with an allow-list of classes, never executed.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from meditron_train.checkpoint.hf_map import tensor_specs
from meditron_train.checkpoint.manifest import not_intact
from meditron_train.checkpoint.stored import Range, Shape, StoredTensor, read_stored
from meditron_train.checkpoint.torch_file import find_tensors
from meditron_train.config.model_config import ModelConfig
from meditron_train.errors import UserError


class MegatronSource:
    """The model tensors of a sharded checkpoint directory.

    model: the ModelConfig in meta.json; meta: the whole of it; padded_vocab_size: rows of the embedding as stored.
    Opening reads `.metadata` and checks that every file is there and long enough, and that the tensors are those of
    the model; all problems come in one UserError (with check=False, `problems()` lists them). Optimizer state is
    ignored.
    """

    def __init__(self, directory: str | Path, *, check: bool = True) -> None:
        self.directory = Path(directory)
        self.meta = read_meta(self.directory)
        try:
            self.model = ModelConfig.model_validate(self.meta["model"])
            self.padded_vocab_size = int(self.meta["padded_vocab_size"])
        except (KeyError, TypeError, ValueError, ValidationError) as error:
            raise UserError(f"{self.directory / 'meta.json'} does not describe a model: {error}") from None
        self._metadata = _read_metadata(self.directory)
        self._chunks = _find_chunks(self._metadata)
        self._found: dict[_Chunk, StoredTensor] = {}
        if check and (problems := self.problems()):
            raise not_intact(self.directory, problems)

    @property
    def names(self) -> list[str]:
        """The model's tensors in the order of the layers."""
        return [spec.name for spec in tensor_specs(self.model)]

    def place(self, name: str) -> list[str]:
        """The files that hold the tensor."""
        return sorted({chunk.file for chunk in self._chunks.get(name, [])})

    @property
    def all_names(self) -> list[str]:
        """Every tensor in the files, optimizer state included."""
        entries = self._metadata.state_dict_metadata.items()
        return [name for name, entry in entries if isinstance(entry, TensorStorageMetadata)]

    def shape(self, name: str) -> Shape:
        return tuple(self._entry(name).size)

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).properties.dtype

    def read(self, name: str, rows: Range | None = None) -> torch.Tensor:
        """Rows [start, stop) of the tensor, or all (CPU, as stored: vocabulary padded). May be called from several
        threads. Raises UserError when a record is damaged."""
        entry = self._entry(name)
        chunks = self._chunks[name]
        if len(chunks) == 1 and chunks[0].sizes == tuple(entry.size):
            return self._read_chunk(name, chunks[0], rows)
        start, stop = rows or (0, entry.size[0])
        tensor = torch.empty(stop - start, *entry.size[1:], dtype=entry.properties.dtype)
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

    def _entry(self, name: str) -> TensorStorageMetadata:
        entry = self._metadata.state_dict_metadata.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            raise UserError(f"{self.directory}: no tensor {name} in the checkpoint.")
        return entry

    def _read_chunk(self, name: str, chunk: _Chunk, rows: Range | None) -> torch.Tensor:
        path = self.directory / chunk.file
        try:
            return read_stored(path, self._find(chunk), name, rows)
        except (OSError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path}: the record of {name} cannot be read ({first_line}).") from None

    def _find(self, chunk: _Chunk) -> StoredTensor:
        """Where the elements lie inside the record; looked up once, as rows are read many times."""
        if chunk not in self._found:
            with (self.directory / chunk.file).open("rb") as file:
                found = find_tensors(file.fileno(), chunk.start, chunk.num_bytes)
            if not isinstance(found, StoredTensor) or found.shape != chunk.sizes:
                raise ValueError(f"it is not a tensor of shape {list(chunk.sizes)}")
            self._found[chunk] = found
        return self._found[chunk]

    def problems(self) -> list[str]:
        """What keeps the model from being read, one line each: files missing or cut off, tensors missing or of
        another shape than meta.json says. Empty when the checkpoint can be read. No tensor is read for it."""
        problems = []
        ends: dict[str, int] = defaultdict(int)
        for chunks in self._chunks.values():
            for chunk in chunks:
                ends[chunk.file] = max(ends[chunk.file], chunk.start + chunk.num_bytes)
        for file, end in sorted(ends.items()):
            path = self.directory / file
            if Path(file).name != file:
                problems.append(f".metadata names {file!r}, outside the directory")
            elif not path.is_file():
                problems.append(f"{file} is missing")
            elif path.stat().st_size < end:
                problems.append(f"{file} is cut off: {path.stat().st_size} bytes, {end} expected")
        for spec in tensor_specs(self.model):
            entry = self._metadata.state_dict_metadata.get(spec.name)
            shape = spec.padded_shape(self.padded_vocab_size)
            if not isinstance(entry, TensorStorageMetadata):
                problems.append(f"{spec.name} is missing")
            elif tuple(entry.size) != shape:
                problems.append(f"{spec.name} has shape {list(entry.size)}, meta.json says {list(shape)}")
            elif not self._chunks.get(spec.name):
                problems.append(f"{spec.name} has no data")
        return problems


def is_megatron_directory(directory: str | Path) -> bool:
    """Whether `directory` looks like a sharded checkpoint (finished or not)."""
    directory = Path(directory)
    return any((directory / name).is_file() for name in ("meta.json", ".metadata", "metadata.json"))


def hint_at_checkpoint(directory: Path) -> str:
    """ " Did you mean …?" with the newest finished checkpoint below a run directory, or nothing."""
    for pattern in ("checkpoints/step_*/meta.json", "step_*/meta.json"):
        if found := sorted(path.parent for path in directory.glob(pattern) if path.parent.suffix != ".tmp"):
            return f" Did you mean {found[-1]}?"
    return ""


def read_meta(directory: str | Path) -> dict[str, Any]:
    """`meta.json` of a sharded checkpoint. Raises UserError when it is missing or not JSON."""
    directory = Path(directory)
    path = directory / "meta.json"
    if directory.name.endswith(".tmp"):
        raise UserError(f"{directory} was never finished (its name ends in .tmp). Use an earlier checkpoint.")
    if not path.is_file():
        message = f"{path} does not exist, so {directory} is not a finished checkpoint of this program."
        raise UserError(message + hint_at_checkpoint(directory))
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(meta, dict) or not str(meta.get("format", "")).startswith("meditron-train/"):
        raise UserError(f'{path} does not say "format": "meditron-train/1".')
    return meta


@dataclass(frozen=True)
class _Chunk:
    """One record: a box of a tensor, in bytes [start, start + num_bytes) of a file."""

    offsets: Shape
    sizes: Shape
    file: str
    start: int
    num_bytes: int


def _find_chunks(metadata: Metadata) -> dict[str, list[_Chunk]]:
    places = {(index.fqn, tuple(index.offset or ())): info for index, info in metadata.storage_data.items()}
    found: dict[str, list[_Chunk]] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        found[name] = []
        for chunk in entry.chunks:
            place = places.get((name, tuple(chunk.offsets)))
            if place is not None:
                found[name].append(
                    _Chunk(
                        tuple(chunk.offsets),
                        tuple(chunk.sizes),
                        place.relative_path,
                        place.offset,
                        place.length,
                    )
                )
    return found


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
