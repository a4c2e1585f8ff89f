"""Built sample indexes kept on disk: written once per node, then memory-mapped by all its ranks.

A file holds "MDTINDEX", the length and CRC-32 of a JSON header (uint32 each), the header (key, file size, name, dtype,
number of elements and place of each array, and its CRC-32), and the arrays, each at a multiple of 64 bytes. Everything
is little-endian. What an index depends on is in its key, and the key in its name, so that a change gives another file.
Only directories and files that belong to this user (or root), and that no other user may write, are used: anyone who
can plant an index decides what is trained on.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import stat
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meditron_train.files import has_no_locks, replacing
from meditron_train.log import get_logger

_log = get_logger(__name__)

Arrays = Mapping[str, NDArray]

_MAGIC = b"MDTINDEX"
# Part of the key: raise it when what is written changes, or what the same seed gives.
_FORMAT_VERSION = 2
_ALIGNMENT = 64
_MAX_HEADER_BYTES = 1 << 20
_ENTRIES_KEPT = 8  # per dataset: training and validation, two epochs each, of two configurations
_STALE_AFTER_S = 3600
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_ROOT = 0


class IndexCache:
    """The indexes of one dataset.

    Args:
        prefix: of the dataset's files.
        content: gives a hash of the dataset and the documents that take part; asked only when a file is
            looked for.
        directory: where to keep them; None: `.index_cache` beside the data. Where that cannot be written, a
            directory of this user under the system's temporary one serves instead; where nothing can, indexes
            are built in memory.
        smallest: an index of fewer documents is quicker to build than to find.
    """

    def __init__(
        self,
        prefix: Path,
        content: Callable[[], str],
        directory: Path | None = None,
        *,
        smallest: int = 1 << 16,
    ) -> None:
        self.smallest = smallest
        self._name, self._content = prefix.name, content
        fallback = Path(tempfile.gettempdir()) / f"meditron-train-index-{os.getuid()}"
        self._directories = (directory or prefix.parent / ".index_cache", fallback)

    def load_or_build(self, depends_on: list[Any], build: Callable[[], Arrays]) -> Arrays:
        """The arrays that `build` gives, from disk where an earlier call with equal values left them."""
        key = hashlib.sha256(json.dumps([_FORMAT_VERSION, self._content(), *depends_on]).encode()).hexdigest()
        file_name = f"{self._name}.{key[:32]}.index"
        for directory in filter(_is_own, self._directories):
            if (found := _open(directory / file_name, key)) is not None:
                return found
        for directory in self._directories:
            try:
                _make_directory(directory)
                with _locked(directory / ".lock"):
                    path = directory / file_name
                    found = _open(path, key)  # another rank may have built it meanwhile
                    if found is None:
                        started = time.monotonic()
                        arrays = build()
                        built = time.monotonic() - started
                        write_index_file(path, key, arrays)
                        _log.info("built the sample index %s in %.1f s", path, built)
                        self._remove_old(directory)
                        found = _open(path, key)
                    if found is not None:
                        return found
            except OSError as error:
                _log.warning("cannot keep sample indexes in %s (%s)", directory, error)
        return build()

    def _remove_old(self, directory: Path) -> None:
        """Leave the newest entries of this dataset, and no leftovers of writers that died."""
        entry = re.escape(self._name) + r"\.[0-9a-f]{32}\.index"
        leftover = re.compile(rf"\.{entry}\..+\.tmp")  # as `replacing` names a writer's own file
        entries, now = [], time.time()
        for path in directory.iterdir():
            if re.fullmatch(entry, path.name):
                entries.append((path.stat().st_mtime, path))
            elif leftover.fullmatch(path.name) and now - path.stat().st_mtime > _STALE_AFTER_S:
                path.unlink(missing_ok=True)
        for _, path in sorted(entries, reverse=True)[_ENTRIES_KEPT:]:
            path.unlink(missing_ok=True)  # who has it mapped keeps it


def write_index_file(path: Path, key: str, arrays: Arrays) -> None:
    """Write and publish by rename; on an error nothing is left behind."""
    described = [[name, array.dtype.str, array.size] for name, array in arrays.items()]
    # The header's length depends on the places it names: room for them is left, in a multiple of the alignment.
    first = _rounded_up(len(_MAGIC) + 8 + len(json.dumps(described)) + 60 * len(described) + len(key) + 200)
    places, at = [], first
    for array in arrays.values():
        places.append(at)
        at = _rounded_up(at + array.nbytes)
    fields = {
        "key": key,
        "file_bytes": at,
        "arrays": [[*entry, place] for entry, place in zip(described, places, strict=True)],
        "checksums": [zlib.crc32(np.ascontiguousarray(array).data) for array in arrays.values()],
    }
    header = json.dumps(fields).encode()
    with replacing(path, shared=True) as file:
        os.fchmod(file.fileno(), stat.S_IMODE(os.fstat(file.fileno()).st_mode) & ~_OTHERS_WRITE)
        file.write(_MAGIC + struct.pack("<II", len(header), zlib.crc32(header)) + header)
        for array, place in zip(arrays.values(), places, strict=True):
            file.seek(place)
            file.write(np.ascontiguousarray(array).data)
        file.truncate(at)


def read_index_file(path: Path, key: str) -> dict[str, NDArray]:
    """The arrays, memory-mapped read-only.

    Raises:
        ValueError: says what is wrong with the file.
        OSError: as `open`.
    """
    with open(path, "rb") as file:
        _require_own(os.fstat(file.fileno()), path)
        size = os.fstat(file.fileno()).st_size
        start = file.read(len(_MAGIC) + 8)
        if len(start) < len(_MAGIC) + 8 or not start.startswith(_MAGIC):
            raise ValueError("it does not begin as a sample index does")
        header_bytes, checksum = struct.unpack("<II", start[len(_MAGIC) :])
        header = file.read(min(header_bytes, _MAX_HEADER_BYTES))
    if len(header) != header_bytes or zlib.crc32(header) != checksum:
        raise ValueError("the checksum of its header is wrong")
    fields = json.loads(header)
    if fields["key"] != key:
        raise ValueError("it is of other data or settings")
    if fields["file_bytes"] != size:
        raise ValueError(f"it has {size} bytes instead of {fields['file_bytes']}")
    found = {}
    for (name, dtype, count, place), checksum in zip(fields["arrays"], fields["checksums"], strict=True):
        found[name] = _map(path, dtype, count, place, size)
        if zlib.crc32(found[name].data) != checksum:
            raise ValueError(f"the checksum of {name} is wrong")
    return found


def _map(path: Path, dtype: str, count: int, place: int, file_bytes: int) -> NDArray:
    if place < 0 or count < 0 or place + count * np.dtype(dtype).itemsize > file_bytes:
        raise ValueError("its arrays lie outside of it")
    if count == 0:  # an empty range cannot be mapped
        return np.empty(0, dtype=dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=place, shape=(count,)))


def _open(path: Path, key: str) -> dict[str, NDArray] | None:
    try:
        arrays = read_index_file(path, key)
    except FileNotFoundError:
        return None
    except OSError as error:
        _log.warning("cannot read the sample index %s (%s)", path, error)
        return None
    except ValueError as error:
        _log.warning("the sample index %s is damaged (%s): it is built again", path, error)
        return None
    with suppress(OSError):  # read-only
        os.utime(path)  # used now: others are removed first
    return arrays


def _is_own(directory: Path) -> bool:
    try:
        _require_own(directory.stat(), directory)
    except OSError:
        return False
    return True


def _make_directory(directory: Path) -> None:
    is_temporary = directory.parent == Path(tempfile.gettempdir())
    directory.mkdir(parents=True, exist_ok=True, mode=0o700 if is_temporary else 0o755)
    _require_own(directory.stat(), directory)


def _require_own(status: os.stat_result, path: Path) -> None:
    """Check that nobody else made the file or may change it.

    Raises:
        OSError: another user did, or may.
    """
    if status.st_uid not in (os.getuid(), _ROOT):
        raise OSError(f"{path} belongs to another user")
    if status.st_mode & _OTHERS_WRITE:
        raise OSError(f"others may write {path} (chmod go-w)")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; where the file system has none, two may build, and the last rename stays."""
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if not has_no_locks(error):
                raise
        yield


def _rounded_up(place: int) -> int:
    return -(-place // _ALIGNMENT) * _ALIGNMENT
