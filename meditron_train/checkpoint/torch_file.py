"""torch.save files, read and written without torch: where each tensor lies in one, and the bytes around a tensor.

The format (torch >= 1.6) is an uncompressed zip: `data.pkl` says which tensors there are, `data/KEY` holds the
elements of storage KEY. The pickle is read with an allow-list: nothing in it is ever run.
"""

from __future__ import annotations

import collections
import io
import math
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import torch

from meditron_train.checkpoint.stored import Shape, StoredTensor

_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
_STORAGE_OF = {dtype: name for name, dtype in _STORAGES.items()}
_ALIGNMENT = 64
_DATA_DESCRIPTOR = 8  # flag of a zip entry whose CRC and size follow its data


class ForbiddenGlobal(pickle.UnpicklingError):
    """The pickle names something that is no tensor: loading it could run code."""


class DamagedTorchFile(ValueError):
    """The file is cut off, or its parts contradict each other."""


def find_tensors(
    descriptor: int,
    start: int = 0,
    num_bytes: int | None = None,
    stand_in: Callable[[str, str], Any] | None = None,
) -> Any:
    """What `torch.load` would return for bytes [start, start + num_bytes) of a file, with a StoredTensor (offset from
    the start of the file) for every tensor. No tensor data is read.

    stand_in: gives what to use for a (module, name) that is neither tensor nor dtype, None for what is forbidden.
    Raises ForbiddenGlobal, zipfile.BadZipFile when it is not such a file at all, and DamagedTorchFile.
    """
    if num_bytes is None:
        num_bytes = os.fstat(descriptor).st_size - start
    window = io.BufferedReader(_FilePart(descriptor, start, num_bytes), 1 << 16)
    try:
        with zipfile.ZipFile(cast("BinaryIO", window)) as archive:
            entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
                raise DamagedTorchFile("it was written on a big-endian machine, which is not supported")
            if "data.pkl" not in entries:
                raise DamagedTorchFile("it holds no data.pkl")
            raw = archive.read(entries["data.pkl"])
    except (EOFError, struct.error, NotImplementedError) as error:
        raise DamagedTorchFile(str(error) or type(error).__name__) from None

    def place(key: str) -> tuple[int, int]:
        entry = entries.get(f"data/{key}")
        if entry is None or entry.compress_type != zipfile.ZIP_STORED:
            raise DamagedTorchFile(f"the record data/{key} is missing or compressed")
        header = os.pread(descriptor, 30, start + entry.header_offset)
        if len(header) < 30 or header[:4] != b"PK\3\4":
            raise DamagedTorchFile(f"the record data/{key} has no header")
        name_size, extra_size = struct.unpack("<HH", header[26:30])
        offset = entry.header_offset + 30 + name_size + extra_size
        if offset + entry.file_size > num_bytes:
            raise DamagedTorchFile(f"the record data/{key} is cut off")
        return start + offset, entry.file_size

    try:
        return _Unpickler(io.BytesIO(raw), place, stand_in).load()
    except (pickle.UnpicklingError, DamagedTorchFile):
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DamagedTorchFile(str(error) or type(error).__name__) from None


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    offset: int
    num_bytes: int


class _Unpickler(pickle.Unpickler):
    def __init__(
        self,
        file: io.BytesIO,
        place: Callable[[str], tuple[int, int]],
        stand_in: Callable[[str, str], Any] | None,
    ) -> None:
        super().__init__(file)
        self._place, self._stand_in = place, stand_in

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _first
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        if self._stand_in is not None and (found := self._stand_in(module, name)) is not None:
            return found
        raise ForbiddenGlobal(f"{module}.{name}")

    def persistent_load(self, reference: Any) -> _Storage:
        kind, dtype, key, _, _ = reference
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise DamagedTorchFile(f"unknown reference {reference!r}")
        return _Storage(dtype, *self._place(str(key)))


def _first(tensor: StoredTensor, *_: Any) -> StoredTensor:
    return tensor


def _rebuild(storage: _Storage, start: int, size: Any, stride: Any, *_: Any) -> StoredTensor:
    shape, strides = tuple(map(int, size)), tuple(map(int, stride))
    dense = _dense_strides(shape)
    extent = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) if all(shape) else 0
    if min((start, *shape, *strides)) < 0 or (start + extent) * storage.dtype.itemsize > storage.num_bytes:
        raise DamagedTorchFile(f"a tensor of shape {list(shape)} reaches beyond its storage")
    is_dense = all(n <= 1 or step == want for n, step, want in zip(shape, strides, dense, strict=True))
    offset = storage.offset + start * storage.dtype.itemsize
    return StoredTensor(storage.dtype, shape, offset, None if is_dense or 0 in shape else strides)


def _dense_strides(shape: Shape) -> Shape:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


class _FilePart(io.RawIOBase):
    """A read-only, seekable window on a file."""

    def __init__(self, descriptor: int, start: int, num_bytes: int) -> None:
        self._descriptor, self._start, self._num_bytes, self._position = descriptor, start, num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._num_bytes}[whence]
        if base + offset < 0:
            raise OSError(22, "seek before the start of the file")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        view = view[: max(0, self._num_bytes - self._position)]
        num_bytes = os.preadv(self._descriptor, [view], self._start + self._position) if view else 0
        self._position += num_bytes
        return num_bytes


@dataclass(frozen=True)
class RecordFrame:
    """The bytes of a torch.save file of one tensor around the tensor's own.

    before: what precedes the data; after: what follows it, given the CRC-32 of the data; num_bytes: of the whole.
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
