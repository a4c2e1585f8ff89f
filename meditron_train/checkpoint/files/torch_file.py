"""torch.save files, read and written without torch: where each tensor lies in one, and the bytes around a tensor.

The format (torch >= 1.6) is an uncompressed zip: `data.pkl` says which tensors there are, `data/KEY` holds the
elements of storage KEY. Before that it was a row of pickles (a magic number, a version, the machine, the value, the
keys of its storages), then each storage: its length and its elements. The pickles are read as data (`pickled`): nothing
in them is ever run.
"""

from __future__ import annotations

import collections
import io
import math
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from meditron_train.checkpoint.files.pickled import (
    ORDERED_DICT,
    SIZE,
    Allowed,
    Constructor,
    opaque,
    read_pickle,
    shown,
)
from meditron_train.checkpoint.files.stored import Shape, StoredTensor, read_open
from meditron_train.checkpoint.files.zip_records import DamagedTorchFile, ZipRecords

_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
_STORAGE_OF = {dtype: name for name, dtype in _STORAGES.items()}
_ALIGNMENT = 64
_MAX_PICKLE_BYTES = 256 << 20
_MAX_EXPANDED_BYTES = 16 << 20  # of a tensor that is larger than its storage, with strides of 0
_MAX_DIMS = 64  # as torch
_MAX_ELEMENTS = 1 << 60
_MAX_VALUES = 5_000_000
_OLD_MAGIC = 0x1950A86A20F9469CFC6C
_DATA_DESCRIPTOR = 8  # flag of a zip entry whose CRC and size follow its data


def find_tensors(
    descriptor: int, start: int = 0, num_bytes: int | None = None, *, also_allowed: Allowed | None = None
) -> Any:
    """What `torch.load` would return, with a StoredTensor for every tensor. No tensor data is read.

    Args:
        descriptor: the open file.
        start, num_bytes: the bytes [start, start + num_bytes) are the torch file; offsets count from the
            start of the whole file.
        also_allowed: further names, as for `read_pickle`, beside those of tensors and dtypes.

    Raises:
        ForbiddenGlobal: as `read_pickle`.
        zipfile.BadZipFile: this is not such a file at all.
        DamagedTorchFile, DamagedPickle: it is damaged.
    """
    size = os.fstat(descriptor).st_size
    if num_bytes is None:
        num_bytes = size - start
    if start < 0 or num_bytes < 0 or start + num_bytes > size:
        raise DamagedTorchFile(f"it ends at byte {size}, {start + num_bytes} expected")
    records = ZipRecords(descriptor, start, num_bytes)
    if "byteorder" in records and records.read("byteorder", 16) != b"little":
        raise DamagedTorchFile("it was written on a big-endian machine, which is not supported")
    if "data.pkl" not in records:
        raise DamagedTorchFile("it holds no data.pkl")
    raw = records.read("data.pkl", _MAX_PICKLE_BYTES)

    def storage(reference: Any) -> _Storage:
        dtype, key, _ = _checked_reference(reference, 5)
        return _Storage(dtype, *records.place(f"data/{key}"))

    return read_pickle(raw, {**_ALLOWED, **(also_allowed or {})}, storage)[0]


def _checked_reference(reference: Any, length: int) -> tuple[torch.dtype, str, int]:
    """(dtype, key, number of elements) of a reference to a storage."""
    if type(reference) is not tuple or len(reference) != length or reference[0] != "storage":
        raise DamagedTorchFile("a reference that is not to a storage")
    dtype, key, num_elements = reference[1], reference[2], reference[4]
    if dtype not in _STORAGE_OF or type(key) is not str or type(num_elements) is not int:
        raise DamagedTorchFile("a reference that is not to a storage")
    return dtype, key, num_elements


def find_old_tensors(descriptor: int) -> Any:
    """What `find_tensors` gives, for a file as torch wrote it before 1.6.

    Raises:
        ForbiddenGlobal, DamagedTorchFile, DamagedPickle: as `find_tensors`.
    """
    size = os.fstat(descriptor).st_size
    raw = os.pread(descriptor, min(size, _MAX_PICKLE_BYTES), 0)
    storages: dict[str, _Storage] = {}  # as the value refers to them, then with their places

    def note(reference: Any) -> _Storage:
        dtype, key, num_elements = _checked_reference(reference, 6)
        if num_elements < 0 or reference[5] is not None:
            raise DamagedTorchFile("a view of a storage, which is not supported")
        return storages.setdefault(key, _Storage(dtype, 0, num_elements * dtype.itemsize))

    magic, position = read_pickle(raw, {})
    if magic != _OLD_MAGIC:
        raise DamagedTorchFile("it is not a file of torch.save")
    for _ in ("version", "machine"):
        _, position = read_pickle(raw, {}, None, position)
    value_start = position
    _, position = read_pickle(raw, _ALLOWED, note, position)
    keys, position = read_pickle(raw, {}, None, position)
    if (
        type(keys) is not list
        or not all(type(key) is str for key in keys)
        or sorted(keys) != sorted(storages)
    ):
        raise DamagedTorchFile("its list of storages does not fit its tensors")
    for key in keys:
        header, storage = os.pread(descriptor, 8, position), storages[key]
        position += 8
        if int.from_bytes(header, "little") * storage.dtype.itemsize != storage.num_bytes or len(header) < 8:
            raise DamagedTorchFile(f"the storage {shown(key)} is cut off or has another length")
        storages[key] = replace(storage, offset=position)
        position += storage.num_bytes
        if position > size:
            raise DamagedTorchFile(f"it ends at byte {size}, {position} expected")
    return read_pickle(raw, _ALLOWED, lambda reference: storages[reference[2]], value_start)[0]


def load_torch_file(descriptor: int, start: int = 0, num_bytes: int | None = None) -> Any:
    """What `torch.load` would return, on the CPU: tensors, the plain data around them, and no other object.

    Raises:
        OSError: the file cannot be read.
        ForbiddenGlobal, zipfile.BadZipFile, DamagedTorchFile, DamagedPickle: as `find_tensors`.
    """
    size = os.fstat(descriptor).st_size if num_bytes is None else num_bytes
    found = find_tensors(descriptor, start, num_bytes)
    try:
        return _Loading(descriptor, 2 * size + _MAX_EXPANDED_BYTES).complete(found)[0]
    except RecursionError:
        raise DamagedTorchFile("its lists and dicts are nested without end") from None


class _Loading:
    """Reads the tensors of a file. What is shared in it stays shared."""

    def __init__(self, descriptor: int, max_num_bytes: int) -> None:
        self._descriptor, self._left = descriptor, max_num_bytes
        self._known: dict[int, tuple[Any, int]] = {}

    def complete(self, value: Any) -> tuple[Any, int]:
        """The value with its tensors, and how many values it would be if nothing were shared."""
        if id(value) not in self._known:
            if isinstance(value, StoredTensor):
                found: Any = self._read(value)
                number = 1
            elif type(value) is dict:
                items = [self.complete(item) for item in value.values()]
                found = dict(zip(value, (item for item, _ in items), strict=True))
                number = 1 + sum(number for _, number in items)
            elif type(value) in (list, tuple):
                items = [self.complete(item) for item in value]
                found = type(value)(item for item, _ in items)
                number = 1 + sum(number for _, number in items)
            else:
                found, number = value, 1
            if number > _MAX_VALUES:  # whoever walks through it would never come to its end
                raise DamagedTorchFile(
                    f"its lists and dicts repeat each other more than {_MAX_VALUES:,} times"
                )
            self._known[id(value)] = found, number
        return self._known[id(value)]

    def _read(self, tensor: StoredTensor) -> torch.Tensor:
        self._left -= math.prod(tensor.shape) * tensor.dtype.itemsize
        if self._left < 0:
            raise DamagedTorchFile("its tensors repeat their storages too often")
        return read_open(self._descriptor, tensor)


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    offset: int
    num_bytes: int


def _first(tensor: StoredTensor, *_: Any) -> StoredTensor:
    return tensor


def _rebuild(storage: _Storage, start: int, size: Any, stride: Any, *_: Any) -> StoredTensor:
    if type(storage) is not _Storage or any(type(numbers) not in (tuple, list) for numbers in (size, stride)):
        raise DamagedTorchFile(f"a tensor in a {type(storage).__name__}, or without a shape")
    if len(size) > _MAX_DIMS or len(stride) != len(size):
        raise DamagedTorchFile(f"a tensor of {len(size)} dimensions and {len(stride)} strides")
    shape, strides = tuple(size), tuple(stride)
    if any(
        type(number) is not int or not 0 <= number <= _MAX_ELEMENTS for number in (start, *shape, *strides)
    ):
        raise DamagedTorchFile("a tensor whose place, shape or strides are no sizes")
    # torch multiplies the sizes of an empty tensor too
    if math.prod(number for number in shape if number) > _MAX_ELEMENTS:
        raise DamagedTorchFile(f"a tensor of shape {list(shape)} is too large")
    dense = _dense_strides(shape)
    extent = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) if all(shape) else 0
    if (start + extent) * storage.dtype.itemsize > storage.num_bytes:
        raise DamagedTorchFile(f"a tensor of shape {list(shape)} reaches beyond its storage")
    if math.prod(shape) * storage.dtype.itemsize > max(storage.num_bytes, _MAX_EXPANDED_BYTES):
        raise DamagedTorchFile(f"a tensor of shape {list(shape)} repeats its storage too often")
    is_dense = all(n <= 1 or step == want for n, step, want in zip(shape, strides, dense, strict=True))
    offset = storage.offset + start * storage.dtype.itemsize
    return StoredTensor(storage.dtype, shape, offset, None if is_dense or 0 in shape else strides)


def _rebuild_with_attributes(rebuild: Any, _kind: Any, arguments: Any, *_: Any) -> Any:
    """A tensor of a class of its own, or with attributes: the tensor."""
    if type(rebuild) is not Constructor or rebuild.make not in (_rebuild, _first):
        raise DamagedTorchFile("a tensor that is made by something else")
    return rebuild.make(*arguments)


def _dense_strides(shape: Shape) -> Shape:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


# The names in the pickle of a file of tensors, and what stands for each.
_ALLOWED: Allowed = {
    ("collections", "OrderedDict"): ORDERED_DICT,
    ("torch", "Size"): SIZE,
    ("torch", "Tensor"): opaque("torch", "Tensor"),
    ("torch.nn.parameter", "Parameter"): opaque("torch.nn.parameter", "Parameter"),
    ("torch._utils", "_rebuild_tensor"): Constructor(_rebuild),
    ("torch._utils", "_rebuild_tensor_v2"): Constructor(_rebuild),
    ("torch._utils", "_rebuild_parameter"): Constructor(_first),
    ("torch._tensor", "_rebuild_from_type_v2"): Constructor(_rebuild_with_attributes),
    **{("torch", name): dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)},
    **{(module, name): dtype for module in ("torch", "torch.storage") for name, dtype in _STORAGES.items()},
}


@dataclass(frozen=True)
class RecordFrame:
    """The bytes of a torch.save file of one tensor around the tensor's own.

    Attributes:
        before: what precedes the data.
        after: what follows it, given the CRC-32 of the data.
        num_bytes: of the whole file.
    """

    before: bytes
    after: Callable[[int], bytes]
    num_bytes: int


def frame_record(shape: Shape, dtype: torch.dtype) -> RecordFrame:
    """The file that `torch.save` would make of a contiguous CPU tensor, without the tensor."""
    num_bytes = math.prod(shape) * dtype.itemsize
    entries: list[_ZipEntry] = []
    before = b""
    for name, data in (
        ("data.pkl", _pickle_of(shape, dtype)),
        (".format_version", b"1"),
        (".storage_alignment", str(_ALIGNMENT).encode()),
        ("byteorder", b"little"),
        ("version", b"3\n"),
    ):
        entry = _ZipEntry(f"archive/{name}", len(before), len(data), zlib.crc32(data))
        entries.append(entry)
        before += entry.local_header() + data + entry.descriptor()
    last = _ZipEntry("archive/data/0", len(before), num_bytes, 0)
    before += last.local_header(align=True)

    def after(crc: int) -> bytes:
        complete = [*entries, _ZipEntry(last.name, last.offset, last.num_bytes, crc)]
        descriptor = complete[-1].descriptor()
        directory_start = len(before) + num_bytes + len(descriptor)
        directory = b"".join(entry.central_header() for entry in complete)
        return descriptor + directory + _end_of_directory(len(complete), directory_start, len(directory))

    return RecordFrame(before, after, len(before) + num_bytes + len(after(0)))


@dataclass(frozen=True)
class _ZipEntry:
    """One uncompressed member; its sizes are written in 64 bits, so that every header has one form."""

    name: str
    offset: int
    num_bytes: int
    crc: int

    def local_header(self, *, align: bool = False) -> bytes:
        name = self.name.encode()
        extra = struct.pack("<HHQQ", 1, 16, 0, 0)  # zip64: the sizes follow the data
        if align:
            # The data begins at a multiple of 64, as torch wants it; "FB" is the field that torch pads with.
            extra += b"FB" + struct.pack("<H", 0)
            padding = -(self.offset + 30 + len(name) + len(extra)) % _ALIGNMENT
            extra = extra[:-2] + struct.pack("<H", padding) + b"Z" * padding
        fields = (45, _DATA_DESCRIPTOR, 0, 0, 0x21, 0, 0xFFFFFFFF, 0xFFFFFFFF, len(name), len(extra))
        return b"PK\3\4" + struct.pack("<HHHHHIIIHH", *fields) + name + extra

    def descriptor(self) -> bytes:
        return b"PK\7\x08" + struct.pack("<IQQ", self.crc, self.num_bytes, self.num_bytes)

    def central_header(self) -> bytes:
        name = self.name.encode()
        extra = struct.pack("<HHQQQ", 1, 24, self.num_bytes, self.num_bytes, self.offset)
        sizes = (self.crc, 0xFFFFFFFF, 0xFFFFFFFF, len(name), len(extra))
        fields = (45, 45, _DATA_DESCRIPTOR, 0, 0, 0x21, *sizes, 0, 0, 0, 0, 0xFFFFFFFF)
        header = struct.pack("<HHHHHHIIIHHHHHII", *fields)
        return b"PK\1\2" + header + name + extra


def _end_of_directory(num_entries: int, start: int, num_bytes: int) -> bytes:
    zip64 = b"PK\6\6" + struct.pack(
        "<QHHIIQQQQ", 44, 45, 45, 0, 0, num_entries, num_entries, num_bytes, start
    )
    locator = b"PK\6\7" + struct.pack("<IQI", 0, start + num_bytes, 1)
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, num_entries, num_entries, num_bytes, 0xFFFFFFFF, 0)
    return zip64 + locator + end


class _TensorToPickle:
    """Pickles as a tensor does."""

    def __init__(self, shape: Shape, storage: _StorageToPickle) -> None:
        self._shape, self._storage = shape, storage

    def __reduce__(self) -> Any:
        stride = _dense_strides(self._shape)
        arguments: tuple[Any, ...] = (self._storage, 0, self._shape, stride, False, collections.OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


@dataclass(frozen=True)
class _StorageToPickle:
    dtype: torch.dtype
    num_elements: int


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _StorageToPickle):
            return None
        return ("storage", getattr(torch, _STORAGE_OF[value.dtype]), "0", "cpu", value.num_elements)


def _pickle_of(shape: Shape, dtype: torch.dtype) -> bytes:
    file = io.BytesIO()
    _Pickler(file, protocol=2).dump(_TensorToPickle(tuple(shape), _StorageToPickle(dtype, math.prod(shape))))
    return file.getvalue()
