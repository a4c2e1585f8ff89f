"""`.metadata` of a sharded checkpoint: a pickle of torch's `Metadata`, read as data and built from what was checked."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from meditron_train.checkpoint.files.pickled import (
    ORDERED_DICT,
    SIZE,
    Allowed,
    ForbiddenGlobal,
    Opaque,
    opaque,
    read_pickle,
    shown,
)
from meditron_train.checkpoint.files.stored import Shape
from meditron_train.errors import UserError
from meditron_train.files import read_whole
from meditron_train.log import printable

METADATA_NAME = ".metadata"
_MAX_BYTES = 1 << 30
_MAX_DIMS = 64
_MAX_NAME_BYTES = 255  # as file systems
_MAX_ENTRY_CHARACTERS = 1000

_DCP = "torch.distributed.checkpoint."
_PLAIN = (
    *((_DCP + "metadata", name) for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata")),
    *((_DCP + "metadata", name) for name in ("MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_DCP + "metadata", name) for name in ("TensorStorageMetadata", "_MEM_FORMAT_ENCODING")),
    *((_DCP + "filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
    *((_DCP + "planner", name) for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData")),
    *((_DCP + "planner", name) for name in ("WriteItem", "WriteItemType")),
    *(("pathlib", name) for name in ("Path", "PosixPath", "PurePosixPath")),
    *(("pathlib._local", name) for name in ("Path", "PosixPath", "PurePosixPath")),
    ("torch.serialization", "_get_layout"),
    ("builtins", "set"),
    ("builtins", "getattr"),  # how Python 3.11 writes a member of an enum
    ("__builtin__", "getattr"),
)
_ALLOWED: Allowed = {
    ("collections", "OrderedDict"): ORDERED_DICT,
    ("torch", "Size"): SIZE,
    **{name: opaque(*name) for name in _PLAIN},
    **{("torch", name): dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)},
}


def read_metadata(directory: Path) -> Metadata:
    """What `.metadata` says, without the program in it.

    Every size, offset, name and type is checked, and what nobody needs (planner_data) is left out.

    Raises:
        UserError: it is missing, damaged, or names what could run code. The message names file and entry.
    """
    path = directory / METADATA_NAME
    try:
        raw = read_whole(path, _MAX_BYTES)
        return _Checked(read_pickle(raw, _ALLOWED)[0]).metadata()
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: the checkpoint was cut off or copied without hidden files"
        ) from None
    except ForbiddenGlobal as error:
        raise UserError(
            f"{path}: the pickle refers to {error}, which is not allowed in checkpoint metadata. Refused, as it could "
            "run code"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


class _Checked:
    """The metadata as a tree of inert objects, taken apart with a look at every type and number."""

    def __init__(self, found: Any) -> None:
        self._fields = _fields(found, "Metadata", "it")
        self._entries = _of_type(self._fields.get("state_dict_metadata"), dict, "state_dict_metadata")
        self._places = _of_type(self._fields.get("storage_data"), dict, "storage_data")
        # Each chunk has a place. A list of chunks that many entries share would make more of them than the file has.
        self._chunks_left = 4 * len(self._places) + 1000

    def metadata(self) -> Metadata:
        return Metadata(
            state_dict_metadata={
                _name(name): self._entry(name, entry) for name, entry in self._entries.items()
            },
            planner_data=None,
            storage_data=dict(_place(index, info) for index, info in self._places.items()),
            storage_meta=StorageMeta(),
        )

    def _entry(self, name: str, entry: Any) -> TensorStorageMetadata | BytesStorageMetadata:
        if type(entry) is Opaque and type(entry.state) is dict and type(entry.state.get("chunks")) is list:
            self._chunks_left -= len(entry.state["chunks"])
            if self._chunks_left < 0:
                raise ValueError(
                    f"its tensors have far more chunks than the {len(self._places)} places in files"
                )
        return _entry(name, entry)


def _entry(name: str, entry: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    where = shown(name)
    if _is(entry, "BytesStorageMetadata"):
        return BytesStorageMetadata()
    fields = _fields(entry, "TensorStorageMetadata", where)
    size = _shape(fields.get("size"), where)
    properties = fields.get("properties")
    state = properties.state if type(properties) is Opaque else None
    dtype = (
        state[0] if type(state) is tuple and state else state.get("dtype") if type(state) is dict else None
    )
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{where} has no dtype")
    chunks = []
    for chunk in _of_type(fields.get("chunks"), list, f"the chunks of {where}"):
        of_chunk = _fields(chunk, "ChunkStorageMetadata", where)
        offsets, sizes = _shape(of_chunk.get("offsets"), where), _shape(of_chunk.get("sizes"), where)
        if not len(offsets) == len(sizes) == len(size):
            raise ValueError(f"{where} has a chunk of {len(sizes)} dimensions instead of {len(size)}")
        if any(start + length > whole for start, length, whole in zip(offsets, sizes, size, strict=True)):
            raise ValueError(f"{where} has a chunk at {list(offsets)} that reaches beyond {list(size)}")
        chunks.append(ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes)))
    if sum(math.prod(chunk.sizes) for chunk in chunks) < math.prod(size):
        raise ValueError(f"the chunks of {where} do not cover its shape {list(size)}")
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=dtype), size=torch.Size(size), chunks=chunks
    )


def _place(index: Any, info: Any) -> tuple[MetadataIndex, _StorageInfo]:
    of_index = _fields(index, "MetadataIndex", "storage_data")
    name = _name(of_index.get("fqn"))
    where = f"the place of {shown(name)}"
    offset, number = of_index.get("offset"), of_index.get("index")
    if number is not None:
        _count(number, where)
    of_info = _fields(info, "_StorageInfo", where)
    if of_info.get("transform_descriptors"):
        raise ValueError(f"{where}: its data was transformed, which is not supported")
    file = _text(of_info.get("relative_path"))
    if Path(file).name != file or file in ("", ".", ".."):
        raise ValueError(f"{where} is {shown(ascii(file))}, outside the directory")
    if len(os.fsencode(printable(file))) > _MAX_NAME_BYTES:
        raise ValueError(f"{where} is a name of {len(file)} characters")
    start, length = _count(of_info.get("offset"), where), _count(of_info.get("length"), where)
    key = MetadataIndex(name, None if offset is None else torch.Size(_shape(offset, where)), number)
    return key, _StorageInfo(file, start, length)


def _is(value: Any, kind: str) -> bool:
    return type(value) is Opaque and value.name.rpartition(".")[2] == kind


def _fields(value: Any, kind: str, where: str) -> dict[Any, Any]:
    """The attributes of an object of the class `kind`."""
    if not _is(value, kind) or type(value.state) is not dict:
        raise ValueError(f"{where} is not a {kind}")
    return value.state


def _of_type(value: Any, kind: type, where: str) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{where} is a {type(value).__name__}, not a {kind.__name__}")
    return value


def _text(value: Any) -> str:
    return str(_of_type(value, str, "a name"))


def _name(value: Any) -> str:
    if len(_text(value)) > _MAX_ENTRY_CHARACTERS:
        raise ValueError(f"the name {shown(value)} has {len(value)} characters")
    return _text(value)


def _count(value: Any, where: str) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"{where}: {shown(value)} is not a size")
    return value


def _shape(value: Any, where: str) -> Shape:
    if type(value) is not tuple or len(value) > _MAX_DIMS:
        raise ValueError(f"{where} has no shape")
    return tuple(_count(number, where) for number in value)
