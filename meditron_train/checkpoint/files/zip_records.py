"""The uncompressed records of a zip, as torch.save writes one: where each lies. Nothing is read before its size is
known to fit the file."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from typing import BinaryIO, cast

from meditron_train.checkpoint.files.pickled import shown

_MAX_DIRECTORY_BYTES = 16 << 20  # about 150,000 tensors in one file


class DamagedTorchFile(ValueError):
    """The file is cut off, or its parts contradict each other."""


class ZipRecords:
    """The records in bytes [start, start + num_bytes) of an open file, by their names below the first directory.

    Raises:
        zipfile.BadZipFile: this is not a zip at all.
        DamagedTorchFile: it is damaged.
    """

    def __init__(self, descriptor: int, start: int, num_bytes: int) -> None:
        self._descriptor, self._start, self._num_bytes = descriptor, start, num_bytes
        try:
            window = _FilePart(descriptor, start, num_bytes)
            with zipfile.ZipFile(cast("BinaryIO", window)) as archive:
                self._entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        except (EOFError, struct.error, NotImplementedError, RuntimeError, OverflowError) as error:
            raise DamagedTorchFile(str(error) or type(error).__name__) from None

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def place(self, name: str) -> tuple[int, int]:
        """(offset in the file, number of bytes) of a record.

        Raises:
            DamagedTorchFile: it is not there, compressed, or cut off.
        """
        entry = self._entries.get(name)
        if entry is None or entry.compress_type != zipfile.ZIP_STORED:
            raise DamagedTorchFile(f"the record {shown(name)} is missing or compressed")
        header = os.pread(self._descriptor, 30, self._start + entry.header_offset)
        if len(header) < 30 or header[:4] != b"PK\3\4":
            raise DamagedTorchFile(f"the record {shown(name)} has no header")
        name_size, extra_size = struct.unpack("<HH", header[26:30])
        offset = entry.header_offset + 30 + name_size + extra_size
        if offset + entry.file_size > self._num_bytes:
            raise DamagedTorchFile(f"the record {shown(name)} is cut off")
        return self._start + offset, entry.file_size

    def read(self, name: str, max_bytes: int) -> bytes:
        """The content of a small record.

        Raises:
            DamagedTorchFile: as `place`, or it has more than `max_bytes`, or is not what its checksum says.
        """
        entry = self._entries.get(name)
        if entry is not None and (entry.compress_type != zipfile.ZIP_STORED or entry.file_size > max_bytes):
            raise DamagedTorchFile(f"the record {shown(entry.filename)} is compressed or too large")
        offset, num_bytes = self.place(name)
        raw = os.pread(self._descriptor, num_bytes, offset)
        if entry is not None and zlib.crc32(raw) != entry.CRC:
            raise DamagedTorchFile(f"the record {shown(entry.filename)} has another checksum")
        return raw


class _FilePart(io.RawIOBase):
    """A read-only, seekable window on a file, of which no more than a directory is read at once."""

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

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._num_bytes - self._position)
        size = left if size < 0 else min(size, left)
        if size > _MAX_DIRECTORY_BYTES:
            raise DamagedTorchFile(f"the directory of the zip would have {size:,} bytes")
        found = os.pread(self._descriptor, size, self._start + self._position)
        self._position += len(found)
        return found
