"""Read the tensors of a Hugging Face directory one slice at a time, without building the model.

safetensors files (one, or shards with an index) are parsed here, as the header has to be checked against the file's
size anyway; of older `pytorch_model*.bin` files only the index inside is read: no code in a pickle is ever run.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from meditron_train.checkpoint.hf_config import load_config_json, model_config_from_hf
from meditron_train.checkpoint.hf_map import check_source
from meditron_train.checkpoint.stored import Range, Shape, StoredTensor, read_stored
from meditron_train.checkpoint.torch_file import ForbiddenGlobal, find_tensors
from meditron_train.config.model_config import ModelConfig
from meditron_train.errors import UserError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


class _Shard(Protocol):
    """One file of weights."""

    path: Path

    @property
    def names(self) -> Collection[str]: ...

    def shape(self, name: str) -> Shape: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, rows: Range | None, columns: Range | None) -> torch.Tensor: ...


class HFSource:
    """The tensors of a Hugging Face directory: safetensors or `.bin`, one file or shards with an index.

    Opening reads headers only. `read` may be called from several threads. read_once: what was read need not stay in
    the page cache; not for the ranks of a node, who all read the same. Raises UserError, naming file and tensor, for a
    missing or truncated shard, an index that names absent tensors or leaves the directory, and a directory without
    weights.
    """

    def __init__(self, directory: str | Path, *, read_once: bool = False) -> None:
        self.directory = Path(directory)
        self.config: dict[str, Any] = load_config_json(self.directory)
        index, files = _find_weights(self.directory)
        shards = {name: _open_shard(self.directory / name, read_once) for name in files}
        self._shard_of: dict[str, _Shard] = {}
        for file_name, shard in shards.items():
            for name in shard.names:
                self._shard_of.setdefault(name, shard)
                if index.get(name, file_name) == file_name:
                    self._shard_of[name] = shard
        absent = [
            f"{name} (expected in {file})" for name, file in index.items() if name not in shards[file].names
        ]
        if absent:
            more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
            raise UserError(
                f"{self.directory}: the index names tensors that its files do not hold: {', '.join(absent[:5])}{more}. "
                f"Fetch the model again."
            )

    @property
    def names(self) -> list[str]:
        return list(self._shard_of)

    def place(self, name: str) -> list[str]:
        """The files that hold the tensor (one)."""
        return [self._shard(name).path.name]

    def shape(self, name: str) -> Shape:
        return self._shard(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._shard(name).dtype(name)

    def read(self, name: str, rows: Range | None = None, columns: Range | None = None) -> torch.Tensor:
        """A fresh CPU tensor: rows [start, stop) of dimension 0 and columns [start, stop) of dimension 1."""
        return self._shard(name).read(name, rows, columns)

    def _shard(self, name: str) -> _Shard:
        if name not in self._shard_of:
            raise UserError(f"{self.directory}: no tensor {name} in the weights.")
        return self._shard_of[name]


def open_hf_model(directory: str | Path, *, read_once: bool = False) -> tuple[ModelConfig, HFSource]:
    """Open a Hugging Face Llama and check that config and weights belong together (names and shapes, no data read).
    read_once: as of HFSource."""
    source = HFSource(directory, read_once=read_once)
    model = model_config_from_hf(source.config, where=str(source.directory / "config.json"))
    check_source(source, model, str(directory))
    return model, source


def is_hf_directory(directory: str | Path) -> bool:
    """Whether `directory` holds a Hugging Face `config.json`."""
    return (Path(directory) / "config.json").is_file()


def _find_weights(directory: Path) -> tuple[dict[str, str], list[str]]:
    """(index: tensor name -> file name, empty for a single file; the files to open), preferring safetensors."""
    for stem, extension in (("model", "safetensors"), ("pytorch_model", "bin")):
        single, index_path = directory / f"{stem}.{extension}", directory / f"{stem}.{extension}.index.json"
        if os.path.lexists(single):
            return {}, [single.name]
        if index_path.is_file():
            index = _read_index(index_path)
            return index, sorted(set(index.values()))
    if any(directory.glob("model-*-of-*.safetensors")) or any(directory.glob("pytorch_model-*-of-*.bin")):
        raise UserError(
            f"{directory} has weight shards but no *.index.json that says what they hold. Fetch it again."
        )
    if (directory / "adapter_model.safetensors").is_file():
        raise UserError(
            f"{directory} holds a LoRA adapter only. Merge it into its base model first (merge_and_unload)."
        )
    raise UserError(
        f"{directory} holds no weights: neither model.safetensors nor pytorch_model.bin, whole or in shards."
    )


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        index = {str(name): str(file) for name, file in weight_map.items()}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path} is not an index of weights (a JSON object with weight_map). Fetch it again."
        ) from None
    if not index:
        raise UserError(f"{path} names no tensors. Fetch the model again.")
    for name, file in index.items():
        if Path(file).name != file or file in (".", "..") or "\\" in file:
            raise UserError(f"{path}: {name} points to {file!r}, outside the directory. Refused.")
    missing = sorted({file for file in index.values() if not (path.parent / file).exists()})
    if missing:
        raise UserError(
            f"{path.parent}: missing {', '.join(missing)}, which {path.name} names. Fetch the model again."
        )
    return index


def _open_shard(path: Path, read_once: bool) -> _Shard:
    if not path.exists():
        raise UserError(f"{path} is a link to a file that does not exist. Fetch the model again.")
    if not path.is_file():
        raise UserError(f"{path} is not a file.")
    if path.suffix == ".safetensors":
        return _StreamedShard(path, _read_safetensors_header(path), read_once)
    if zipfile.is_zipfile(path):
        return _StreamedShard(path, _find_torch_tensors(path), read_once)
    return _LoadedShard(path)


class _StreamedShard:
    """A file of which any rows can be read by themselves."""

    def __init__(self, path: Path, tensors: Mapping[str, StoredTensor], read_once: bool) -> None:
        self.path = path
        self._tensors, self._read_once = tensors, read_once

    @property
    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> Shape:
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str, rows: Range | None, columns: Range | None) -> torch.Tensor:
        return read_stored(self.path, self._tensors[name], name, rows, columns, read_once=self._read_once)


def _read_safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """Name -> entry. Checks sizes and offsets against the file, so that a cut-off download is seen before any work."""
    file_size = path.stat().st_size
    if file_size < 8:
        raise UserError(f"{path} is only {file_size} bytes long, too short for safetensors. Fetch it again.")
    with path.open("rb") as file:
        (header_size,) = struct.unpack("<Q", file.read(8))
        if header_size > min(_MAX_HEADER_BYTES, file_size - 8):
            if file.read(40).startswith(b"//git-lfs") or header_size == int.from_bytes(b"version ", "little"):
                raise UserError(
                    f"{path} is a git-lfs pointer, not the weights. Run `git lfs pull` in that directory."
                )
            raise UserError(f"{path} is not a safetensors file, or its header is cut off. Fetch it again.")
        raw = file.read(header_size)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        raise UserError(f"{path}: the safetensors header is not valid JSON. Fetch the file again.") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: the safetensors header is no JSON object. Fetch the file again.")
    header.pop("__metadata__", None)
    data_start = 8 + header_size
    entries, spans = {}, []
    for name, item in header.items():
        dtype_name, shape, start, stop = _header_entry(path, name, item)
        if dtype_name not in _DTYPES:
            raise UserError(f"{path}: {name} has dtype {dtype_name}; quantized weights are not supported.")
        num_bytes = math.prod(shape) * _DTYPES[dtype_name].itemsize
        if min(start, *shape, 0) < 0 or stop - start != num_bytes:
            raise UserError(
                f"{path}: the header says {name} is {dtype_name} {list(shape)}, not {stop - start} bytes."
            )
        if data_start + stop > file_size:
            raise UserError(
                f"{path} is truncated: {name} ends at byte {data_start + stop} of {file_size}. Fetch it again."
            )
        entries[name] = StoredTensor(_DTYPES[dtype_name], shape, data_start + start)
        spans.append((start, stop, name))
    _check_cover(path, spans, file_size - data_start)
    return entries


def _header_entry(path: Path, name: str, item: Any) -> tuple[str, Shape, int, int]:
    """(dtype, shape, first byte, byte after the last) as a header has them for one tensor."""
    try:
        dtype_name, shape, (start, stop) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise _malformed(path, name) from None
    # bool is an int, 80.0 equals 80, and int("80") works: only what the format says is right
    if type(dtype_name) is not str or any(type(number) is not int for number in (*shape, start, stop)):
        raise _malformed(path, name)
    return dtype_name, shape, start, stop


def _malformed(path: Path, name: str) -> UserError:
    return UserError(f"{path}: the header entry of {name} is malformed. Fetch the file again.")


def _check_cover(path: Path, spans: list[tuple[int, int, str]], num_bytes: int) -> None:
    """The tensors must lie one after the other and fill the file, as the safetensors library demands: a header that
    gives one tensor the bytes of another is seen by that."""
    end, previous = 0, "the header"
    for start, stop, name in sorted(spans):
        if start != end:
            what = "overlaps" if start < end else "does not begin at the end of"
            raise UserError(f"{path}: the header lies: {name} {what} {previous}. Fetch the file again.")
        end, previous = stop, name
    if end != num_bytes:
        raise UserError(
            f"{path}: {num_bytes - end} bytes after the last tensor ({previous}) belong to none. Fetch the file again."
        )


def _find_torch_tensors(path: Path) -> dict[str, StoredTensor]:
    """Name -> place of the tensors of a `.bin` as torch has written it since 1.6."""
    try:
        with path.open("rb") as file:
            found = find_tensors(file.fileno())
    except ForbiddenGlobal as error:
        raise _refused(path, str(error)) from None
    except (OSError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise _damaged(path, error) from None
    return _state_dict(path, found, StoredTensor)


class _LoadedShard:
    """A `.bin` in the format before torch 1.6, which cannot be read in parts: it is held in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors = _state_dict(path, _load_old_torch_file(path), torch.Tensor)

    @property
    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> Shape:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str, rows: Range | None, columns: Range | None) -> torch.Tensor:
        tensor = self._tensors[name]
        if rows is not None:
            tensor = tensor[rows[0] : rows[1]]
        if columns is not None:
            tensor = tensor[:, columns[0] : columns[1]]
        return tensor.clone(memory_format=torch.contiguous_format)


def _load_old_torch_file(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise _refused(path, found.group(1) if found else None) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise _damaged(path, error) from None


_T = TypeVar("_T")


def _state_dict(path: Path, value: Any, kind: type[_T]) -> dict[str, _T]:
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a state dict, but a {type(value).__name__}.")
    return {str(name): tensor for name, tensor in value.items() if isinstance(tensor, kind)}


def _refused(path: Path, global_name: str | None) -> UserError:
    what = (
        f"the pickle refers to {global_name}, not a tensor"
        if global_name
        else "its pickle is not tensors only"
    )
    return UserError(f"{path}: {what}. Refused, as it could run code. Use a safetensors version.")


def _damaged(path: Path, error: Exception) -> UserError:
    first_line = (str(error).splitlines() or ["unreadable"])[0]
    return UserError(f"{path} cannot be read ({first_line}). It is truncated or damaged: fetch it again.")
