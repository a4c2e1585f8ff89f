"""Built sample indexes kept on disk: written once per node, then memory-mapped by all its ranks.

A file holds "MDTINDEX", the length and CRC-32 of a JSON header (uint32 each), the header (key, file size, and name,
dtype, number of elements and place of each array), and the arrays, each at a multiple of 64 bytes. Everything is
little-endian. What an index depends on is in its key, and the key in its name, so that a change gives another file.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
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

from meditron_train.log import get_logger

log = get_logger(__name__)

Arrays = Mapping[str, NDArray]

_MAGIC = b"MDTINDEX"
_FORMAT_VERSION = (
    1  # part of the key: raise it with any change of what is written or of what the same seed gives
)
_ALIGNMENT = 64
_MAX_HEADER_BYTES = 1 << 20
_ENTRIES_KEPT = 8  # per dataset: training and validation, two epochs each, of two configurations
_STALE_AFTER_S = 3600
_NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class IndexCache:
    """The indexes of one dataset.

    directory: where to keep them; None: `.index_cache` beside the data. Where that cannot be written, a directory of
    this user under the system's temporary one serves instead; where nothing can, indexes are built in memory.
    content: gives a hash of the dataset and the documents that take part; asked only when a file is looked for.
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
        for directory in self._directories:
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
                        log.info("built the sample index %s in %.1f s", path, built)
                        self._remove_old(directory)
                        found = _open(path, key)
                    if found is not None:
                        return found
            except OSError as error:
                log.warning("cannot keep sample indexes in %s (%s)", directory, error)
        return build()

    def _remove_old(self, directory: Path) -> None:
        """Leave the newest entries of this dataset, and no leftovers of writers that died."""
        pattern = re.compile(re.escape(self._name) + r"\.[0-9a-f]{32}\.index(\.[0-9]+\.tmp)?")
        entries, now = [], time.time()
        for path in directory.iterdir():
            if not pattern.fullmatch(path.name):
                continue
            modified = path.stat().st_mtime
            if path.suffix != ".tmp":
                entries.append((modified, path))
            elif now - modified > _STALE_AFTER_S:
                path.unlink(missing_ok=True)
        for _, path in sorted(entries, reverse=True)[_ENTRIES_KEPT:]:
            path.unlink(missing_ok=True)  # who has it mapped keeps it


def write_index_file(path: Path, key: str, arrays: Arrays) -> None:
    """Write and publish by rename; on an error nothing is left behind."""
    described = [[name, array.dtype.str, array.size] for name, array in arrays.items()]
    # The header's length depends on the places it names: room for them is left, in a multiple of the alignment.
    first = _rounded_up(len(_MAGIC) + 8 + len(json.dumps(described)) + 40 * len(described) + len(key) + 200)
    places, at = [], first
    for array in arrays.values():
        places.append(at)
        at = _rounded_up(at + array.nbytes)
    fields = [[*entry, place] for entry, place in zip(described, places, strict=True)]
    header = json.dumps({"key": key, "file_bytes": at, "arrays": fields}).encode()
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(tmp, "wb") as file:
            file.write(_MAGIC + struct.pack("<II", len(header), zlib.crc32(header)) + header)
            for array, place in zip(arrays.values(), places, strict=True):
                file.seek(place)
                file.write(np.ascontiguousarray(array).data)
            file.truncate(at)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
        _sync_directory(path.parent)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise


def read_index_file(path: Path, key: str) -> dict[str, NDArray]:
    """The arrays, memory-mapped read-only. ValueError says what is wrong with the file; OSError as `open` does."""
    size = path.stat().st_size
    with open(path, "rb") as file:
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
    return {name: _map(path, dtype, count, place, size) for name, dtype, count, place in fields["arrays"]}


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
        log.warning("cannot read the sample index %s (%s)", path, error)
        return None
    except ValueError as error:
        log.warning("the sample index %s is damaged (%s): it is built again", path, error)
        return None
    with suppress(OSError):  # read-only
        os.utime(path)  # used now: others are removed first
    return arrays


def _make_directory(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True, mode=0o700 if directory.parent == _temporary() else 0o777)
    if directory.parent == _temporary() and directory.stat().st_uid != os.getuid():
        raise OSError(f"{directory} belongs to another user")


def _temporary() -> Path:
    return Path(tempfile.gettempdir())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; where the file system has none, two may build, and the last rename stays."""
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
        yield


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rounded_up(place: int) -> int:
    return -(-place // _ALIGNMENT) * _ALIGNMENT
