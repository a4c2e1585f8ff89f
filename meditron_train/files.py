"""Files on disk: atomic replacement, durable names, hashes, compression, outputs beside inputs, and what an OSError
says about the disk."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import os
import re
import socket
import stat
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal, cast

from meditron_train.errors import DISK_FAULT, DISK_FULL, UserError

try:  # reads gzip three times as fast; installed with the extra `corpus`
    from isal import igzip, isal_zlib

    _GzipFile: type[gzip.GzipFile] = igzip.IGzipFile
    _ISAL_ERRORS: tuple[type[Exception], ...] = (cast("type[Exception]", isal_zlib.error),)
except ImportError:
    _GzipFile, _ISAL_ERRORS = gzip.GzipFile, ()

_CHUNK_BYTES = 1 << 20
_MAX_ZSTD_WINDOW_BYTES = 1 << 31  # what `zstd --long=31` needs; zstd itself refuses more than 128 MiB
DAMAGED: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error, *_ISAL_ERRORS)
"""What reading a file of `decompressed` raises where the file is damaged or cut off."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NO_FLOCK = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL})


def is_disk_full(error: OSError) -> bool:
    """Whether the disk, or the user's share of it, has no room left."""
    return error.errno in DISK_FULL


def is_disk_fault(error: OSError) -> bool:
    """Whether the disk is full, read-only or failing: another path on it would not help."""
    return error.errno in DISK_FAULT


def has_no_locks(error: OSError) -> bool:
    """Whether `flock` failed because the file system has no locks."""
    return error.errno in _NO_FLOCK


@contextmanager
def replacing(path: Path, *, durable: bool = True, shared: bool = False) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` when the block ends without an error.

    A reader, or a start after a kill, sees the old file or the new one, never a part. An error removes the
    temporary file and is raised again.

    Args:
        path: the file to replace.
        durable: sync the file, so that it also survives a power cut.
        shared: several processes may replace the file at the same time, so the temporary name is this
            thread's own.
    """
    own = f".{path.name}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}.tmp"
    temporary = path.with_name(own if shared else path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_directory(path.parent)


def shipped(name: Literal["configs", "launch"]) -> Path:
    """A directory that comes with the program: of the wheel, or of the clone around the package."""
    package = Path(__file__).parent
    inside = package / "shipped" / name
    return inside if inside.is_dir() else package.parent / name


def replace_text(path: Path, text: str, *, durable: bool = True, shared: bool = False) -> None:
    """Replace the content of `path` by `text` (UTF-8), as `replacing` does."""
    with replacing(path, durable=durable, shared=shared) as file:
        file.write(text.encode())


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` durable: fsync of a file does not cover its directory entry."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def overlap(output: Path, source: Path) -> str | None:
    """How an output is placed relative to an input: "is", "lies inside" or "contains"; None when they are apart.

    Links are resolved, and what exists is compared as the file system does, so that two spellings of one
    place (bind mounts, capitals where they do not matter) are one.
    """
    outputs, sources = _with_parents(output), _with_parents(source)
    if outputs[0] & sources[0]:
        return "is"
    if any(outputs_at & sources[0] for outputs_at in outputs[1:]):
        return "lies inside"
    return "contains" if any(outputs[0] & sources_at for sources_at in sources[1:]) else None


def _with_parents(path: Path) -> list[set[object]]:
    """What identifies the path, then each of its parents: real name and, if it exists, device and inode."""
    found: list[set[object]] = []
    real = Path(os.path.realpath(path))
    for place in (real, *real.parents):
        names: set[object] = {str(place)}
        with suppress(OSError):
            status = place.stat()
            names.add((status.st_dev, status.st_ino))
        found.append(names)
    return found


def decompressed(stored: IO[bytes], suffix: str) -> IO[bytes]:
    """The content of an open file whose name ends in `suffix`: .gz, .zst, or anything else for a plain file.

    Reading a compressed file that is damaged or cut off fails with one of DAMAGED.
    """
    if suffix == ".gz":
        return cast(IO[bytes], _GzipFile(fileobj=stored))
    if suffix == ".zst":
        return io.BufferedReader(_ZstdReader(stored), buffer_size=_CHUNK_BYTES)
    return stored


class _ZstdReader(io.RawIOBase):
    """Decompresses all frames of a file.

    Raises:
        EOFError: the file ends inside a frame (zstandard's own reader says nothing).
    """

    def __init__(self, stored: IO[bytes]) -> None:
        import zstandard

        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW_BYTES)
        self._stored, self._new_frame = stored, decompressor.decompressobj
        self._error = zstandard.ZstdError
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            data = data or self._stored.read(1 << 16)
            if not data:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._new_frame()
            try:
                self._ready = memoryview(self._frame.decompress(data))
            except self._error as error:
                raise EOFError(str(error)) from error
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def describe_missing_directory(directory: Path) -> str:
    """Why `directory` is not a directory: a file lies there, it is the id of a model on the Hub (with the
    command that fetches it), or nothing is there.
    """
    if directory.exists():
        return f"{directory} is a file; a directory is wanted"
    if _HUB_ID.fullmatch(str(directory)) and not directory.parent.exists():
        return (
            f"there is no directory {directory}. If it is a model on the Hugging Face Hub, fetch it first: "
            f"hf download {directory} --local-dir models/{directory.name}"
        )
    return f"there is no directory {directory}"


def open_regular(path: Path) -> io.BufferedReader:
    """The file, open for reading.

    Raises:
        OSError: the file cannot be opened.
        ValueError: this is not a regular file; a pipe, for example, would block forever.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path} is not a file")
    return open(path, "rb")


def read_whole(path: Path, max_bytes: int) -> bytes:
    """The whole content of a small file; its size is checked first.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a regular file, or is larger than `max_bytes`.
    """
    with open_regular(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes > max_bytes:
            raise ValueError(f"its {num_bytes:,} bytes are more than such a file needs ({max_bytes:,})")
        return file.read(num_bytes)


def read_json(path: Path, max_bytes: int = 16 << 20) -> Any:
    """The value in a JSON file that may come from anyone.

    Raises:
        UserError: the file cannot be read, is too large, or is not JSON. Deep nesting and endless digits
            count as invalid JSON.
    """
    try:
        return json.loads(read_whole(path, max_bytes).decode("utf-8"))
    except RecursionError:
        raise UserError(f"{path} is not valid JSON: it is nested too deeply") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # not JSON, not UTF-8, not a file, too large, a number of thousands of digits
        raise UserError(f"{path} is not valid JSON: {error}") from None


def read_json_object(path: Path, max_bytes: int = 16 << 20) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: as `read_json`, and when the value is not an object.
    """
    value = read_json(path, max_bytes)
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value
