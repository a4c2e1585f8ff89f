"""A large file written front to back, past the page cache where the system allows it.

A conversion writes every byte once and reads none of them again, so a copy in the page cache only costs: finding room
for it took more time than the disk (docs/evidence/journal.md). With O_DIRECT the disk reads our own memory.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path
from types import TracebackType

_BUFFER_BYTES = 4 << 20  # a multiple of every block size that O_DIRECT may ask for
_O_DIRECT = getattr(os, "O_DIRECT", 0)
_NOT_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)  # how file systems without it say so


class DirectFile:
    """A new file (or an old one, emptied), open for appending.

    Bytes collect in an aligned buffer, and the disk gets it when it is full. A file system that refuses O_DIRECT, at
    once or at the first write, gets ordinary writes. What was appended is in the file, and durable, after `sync`;
    closing without it leaves an unfinished file.
    """

    def __init__(self, path: Path) -> None:
        # First of all, as the file would stay open if there were no memory. Pages are aligned, other memory is not.
        self._buffer = memoryview(mmap.mmap(-1, _BUFFER_BYTES))
        self._num_buffered = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            self._descriptor = os.open(path, flags | _O_DIRECT, 0o666)
        except OSError as error:
            if error.errno not in _NOT_DIRECT or not _O_DIRECT:
                raise
            self._descriptor = os.open(path, flags, 0o666)

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def append(self, data: memoryview) -> None:
        """Add bytes.

        Raises:
            OSError: the disk is full; also when earlier bytes did not fit.
        """
        while data:
            count = min(len(data), _BUFFER_BYTES - self._num_buffered)
            self._buffer[self._num_buffered : self._num_buffered + count] = data[:count]
            self._num_buffered += count
            data = data[count:]
            if self._num_buffered == _BUFFER_BYTES:
                self._write_buffer()

    def sync(self) -> None:
        """Write what is buffered and wait until all of the file is on the disk."""
        self._stop_direct()  # the end of a file has no whole blocks
        self._write_buffer()
        os.fsync(self._descriptor)

    def _write_buffer(self) -> None:
        rest = self._buffer[: self._num_buffered]
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except OSError as error:
                if error.errno not in _NOT_DIRECT or not self._stop_direct():
                    raise
        self._num_buffered = 0

    def _stop_direct(self) -> bool:
        """Write in the ordinary way from now on; false when it was so already."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        if not flags & _O_DIRECT:
            return False
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_O_DIRECT)
        return True
