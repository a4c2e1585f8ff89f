"""Read the tensors of a Hugging Face directory one slice at a time, without building the model.

safetensors files (one, or shards with an index) are parsed here, as the header has to be checked against the file's
size anyway; of older `pytorch_model*.bin` files only the index inside is read: no code in a pickle is ever run.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from meditron_train.checkpoint.files.pickled import ForbiddenGlobal
from meditron_train.checkpoint.files.stored import Range, Shape, StoredTensor, read_stored
from meditron_train.checkpoint.files.torch_file import find_old_tensors, find_tensors
from meditron_train.checkpoint.hf.config import load_config_json, model_config_from_hf, refuse_adapter
from meditron_train.checkpoint.tensor_map import check_source
from meditron_train.checkpoint.tied_head import EMBEDDING, HEAD, differing_head, same_values
from meditron_train.config.model_config import ModelConfig
from meditron_train.errors import UserError
from meditron_train.files import open_regular, read_json

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_MAX_DIMS = 64
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


class HFSource:
    """The tensors of a Hugging Face directory: safetensors or `.bin`, one file or shards with an index.

    Opening reads headers only. `read` may be called from several threads.

    Args:
        directory: the model.
        read_once: what was read need not stay in the page cache; not for the ranks of a node, which all read
            the same.

    Raises:
        UserError: a missing or truncated shard, an index that names absent tensors or leaves the directory,
            or a directory without weights. The message names file and tensor.
    """

    def __init__(self, directory: str | Path, *, read_once: bool = False) -> None:
        self.directory = Path(directory)
        self.config: dict[str, Any] = load_config_json(self.directory)
        refuse_adapter(self.directory)
        index, files = _find_weights(self.directory)
        shards = {name: _open_shard(self.directory / name, read_once) for name in files}
        self._stored: dict[str, tuple[_Shard, str]] = {}
        for file_name, shard in shards.items():
            for name in shard.names:
                self._stored.setdefault(name, (shard, name))
                if index.get(name, file_name) == file_name:
                    self._stored[name] = shard, name
        if "embed_tokens.weight" in self._stored:  # of LlamaModel, not LlamaForCausalLM
            self._stored = {n if n == HEAD else f"model.{n}": place for n, place in self._stored.items()}
        optional = self._join_tied()
        absent = [
            f"{name} (expected in {file})"
            for name, file in index.items()
            if name not in shards[file].names and name not in optional
        ]
        if absent:
            more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
            raise UserError(
                f"{self.directory}: the index names tensors that its files do not hold: {', '.join(absent[:5])}{more}. "
                f"Fetch the model again"
            )

    def _join_tied(self) -> set[str]:
        """The names that a tied model may leave out: either of the two for one tensor, as transformers reads it. Under
        the name of the output layer alone it counts as the embedding."""
        if self.config.get("tie_word_embeddings") is not True:
            return set()
        if EMBEDDING not in self._stored and HEAD in self._stored:
            self._stored[EMBEDDING] = self._stored.pop(HEAD)
        return {EMBEDDING, HEAD} if EMBEDDING in self._stored else set()

    @property
    def names(self) -> list[str]:
        return list(self._stored)

    def place(self, name: str) -> list[str]:
        """The files that hold the tensor (one)."""
        return [self._find(name)[0].path.name]

    def shape(self, name: str) -> Shape:
        shard, stored = self._find(name)
        return shard.shape(stored)

    def dtype(self, name: str) -> torch.dtype:
        shard, stored = self._find(name)
        return shard.dtype(stored)

    def read(self, name: str, rows: Range | None = None, columns: Range | None = None) -> torch.Tensor:
        """A fresh CPU tensor: rows [start, stop) of dimension 0 and columns [start, stop) of dimension 1."""
        shard, stored = self._find(name)
        return shard.read(stored, rows, columns)

    def _find(self, name: str) -> tuple[_Shard, str]:
        if name not in self._stored:
            raise UserError(f"{self.directory}: no tensor {name} in the weights")
        return self._stored[name]


def open_hf_model(directory: str | Path, *, read_once: bool = False) -> tuple[ModelConfig, HFSource]:
    """Open a Hugging Face Llama and check that config and weights belong together.

    Checked are names and shapes, and the values of an output layer that is stored though it is tied.

    Args:
        directory: the model.
        read_once: as of HFSource.

    Raises:
        UserError: they do not belong together.
    """
    source = HFSource(directory, read_once=read_once)
    model = model_config_from_hf(source.config, where=str(source.directory / "config.json"))
    check_source(source, model, str(directory))
    if model.tie_embeddings and HEAD in source.names and not same_values(source, HEAD, EMBEDDING):
        raise UserError(differing_head(str(directory)))
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
            f"{directory} has weight shards but no *.index.json that says what they hold. Fetch it again"
        )
    raise UserError(
        f"{directory} holds no weights: neither model.safetensors nor pytorch_model.bin, whole or in shards"
    )


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = read_json(path, _MAX_HEADER_BYTES)["weight_map"]
        index = {str(name): str(file) for name, file in weight_map.items()}
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path} is not an index of weights (a JSON object with weight_map). Fetch it again"
        ) from None
    if not index:
        raise UserError(f"{path} names no tensors. Fetch the model again")
    for name, file in index.items():
        if Path(file).name != file or file in (".", "..") or "\\" in file:
            raise UserError(f"{path}: {name} points to {file!r}, outside the directory. Refused")
    missing = sorted({file for file in index.values() if not (path.parent / file).exists()})
    if missing:
        raise UserError(
            f"{path.parent}: missing {', '.join(missing)}, which {path.name} names. Fetch the model again"
        )
    return index


def _open_shard(path: Path, read_once: bool) -> _Shard:
    if not path.exists():
        raise UserError(f"{path} is a link to a file that does not exist. Fetch the model again")
    if not path.is_file():
        raise UserError(f"{path} is not a file")
    if path.suffix == ".safetensors":
        return _Shard(path, _read_safetensors_header(path), read_once)
    return _Shard(path, _find_torch_tensors(path), read_once)


class _Shard:
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

    def read(self, name: str, rows: Range | None = None, columns: Range | None = None) -> torch.Tensor:
        return read_stored(self.path, self._tensors[name], name, rows, columns, read_once=self._read_once)


def open_safetensors(path: Path) -> tuple[_Shard, dict[str, str]]:
    """The tensors of a safetensors file, and what its header says beside them.

    Raises:
        UserError: it is cut off or malformed.
    """
    tensors = _read_safetensors_header(path)
    with path.open("rb") as file:
        (header_size,) = struct.unpack("<Q", file.read(8))
        said = json.loads(file.read(header_size)).get("__metadata__")
    said = said if isinstance(said, dict) else {}
    return _Shard(path, tensors, read_once=False), {str(key): str(value) for key, value in said.items()}


def _read_safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """Name -> entry. Checks sizes and offsets against the file, so that a cut-off download is seen before any work."""
    file_size = path.stat().st_size
    if file_size < 8:
        raise UserError(f"{path} is only {file_size} bytes long, too short for safetensors. Fetch it again")
    with path.open("rb") as file:
        (header_size,) = struct.unpack("<Q", file.read(8))
        if header_size > min(_MAX_HEADER_BYTES, file_size - 8):
            if file.read(40).startswith(b"//git-lfs") or header_size == int.from_bytes(b"version ", "little"):
                raise UserError(
                    f"{path} is a git-lfs pointer, not the weights. Run `git lfs pull` in that directory"
                )
            raise UserError(f"{path} is not a safetensors file, or its header is cut off. Fetch it again")
        raw = file.read(header_size)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        raise UserError(f"{path}: the safetensors header is not valid JSON. Fetch the file again") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: the safetensors header is not a JSON object. Fetch the file again")
    header.pop("__metadata__", None)
    data_start = 8 + header_size
    entries, spans = {}, []
    for name, item in header.items():
        dtype_name, shape, start, stop = _header_entry(path, name, item)
        if dtype_name not in _DTYPES:
            raise UserError(f"{path}: {name} has dtype {dtype_name}; quantized weights are not supported")
        num_bytes = math.prod(shape) * _DTYPES[dtype_name].itemsize
        if min(start, *shape, 0) < 0 or stop - start != num_bytes:
            raise UserError(
                f"{path}: the header says {name} is {dtype_name} {list(shape)}, not {stop - start} bytes"
            )
        if data_start + stop > file_size:
            raise UserError(
                f"{path} is truncated: {name} ends at byte {data_start + stop} of {file_size}. Fetch it again"
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
    if len(shape) > _MAX_DIMS or any(number >= 1 << 48 for number in (*shape, start, stop)):
        raise _malformed(path, name)
    return dtype_name, shape, start, stop


def _malformed(path: Path, name: str) -> UserError:
    return UserError(f"{path}: the header entry of {name} is malformed. Fetch the file again")


def _check_cover(path: Path, spans: list[tuple[int, int, str]], num_bytes: int) -> None:
    """The tensors must lie one after the other and fill the file, as the safetensors library requires.

    This catches a header that gives one tensor the bytes of another.
    """
    end, previous = 0, "the header"
    for start, stop, name in sorted(spans):
        if start != end:
            what = "overlaps" if start < end else "does not begin at the end of"
            raise UserError(f"{path}: the header lies: {name} {what} {previous}. Fetch the file again")
        end, previous = stop, name
    if end != num_bytes:
        raise UserError(
            f"{path}: {num_bytes - end} bytes after the last tensor ({previous}) belong to none. Fetch the file again"
        )


def _find_torch_tensors(path: Path) -> dict[str, StoredTensor]:
    """Name -> place of the tensors of a `.bin`."""
    try:
        with open_regular(path) as file:
            read = find_tensors if zipfile.is_zipfile(file) else find_old_tensors
            found = read(file.fileno())
    except ForbiddenGlobal as error:
        raise _refused(path, error) from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from None
    if not isinstance(found, dict):
        raise UserError(f"{path} does not hold a state dict, but a {type(found).__name__}")
    return {str(name): tensor for name, tensor in found.items() if isinstance(tensor, StoredTensor)}


def _refused(path: Path, error: ForbiddenGlobal) -> UserError:
    return UserError(
        f"{path}: the pickle refers to {error}, not a tensor. Refused, as it could run code. Use a safetensors version"
    )


def _damaged(path: Path, error: Exception) -> UserError:
    first_line = (str(error).splitlines() or ["unreadable"])[0]
    return UserError(f"{path} cannot be read ({first_line}). It is truncated or damaged: fetch it again")
