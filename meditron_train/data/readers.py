"""Documents from JSONL (plain, gzip, zstd) and Parquet files, in chunks whose cuts depend on the content
alone."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from meditron_train.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_PARQUET_ROWS = 2048
_MAX_ZSTD_WINDOW_BYTES = 1 << 31  # what `zstd --long=31` needs; zstd itself refuses more than 128 MiB


@dataclass(frozen=True)
class Chunk:
    """Some consecutive lines (JSONL, as bytes) or rows (Parquet, as {column: value}) of one file."""

    source: int
    """Number of the file."""
    first_line: int
    """From 1; the number of the row in Parquet."""
    records: list[Any]
    bytes_read: int
    """How far the file as stored has been read."""


@dataclass(frozen=True)
class Document:
    text: str
    id: Any
    """What stood under the id key: any JSON value, None when absent."""


class BadLineError(ValueError):
    """A line or row that is no document; the message says why."""


def check_source(path: Path) -> None:
    """UserError unless the file is there and of a known kind."""
    if not path.is_file():
        raise UserError(f"No such file: {path}.")
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{path}: cannot tell its kind; the name must end in one of {', '.join(SUFFIXES)}.")


def read_chunks(path: Path, source: int, columns: tuple[str, str], chunk_bytes: int) -> Iterator[Chunk]:
    """The chunks of a file. columns: the keys of the text and of the id. UserError for a damaged file."""
    try:
        if path.suffix == ".parquet":
            yield from _read_parquet(path, source, columns)
        else:
            yield from _read_lines(path, source, chunk_bytes)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged or cut off ({error}): copy it again.") from error


def parse(record: Any, text_key: str, id_key: str) -> Document | None:
    """The document of one record of a chunk; None for a blank line. BadLineError when it is none."""
    if isinstance(record, bytes):
        try:
            line = record.decode("utf-8-sig")
            if not line.strip():
                return None
            record = json.loads(line)
        except UnicodeDecodeError as error:
            raise BadLineError(f"not UTF-8 ({error.reason} at byte {error.start})") from error
        except (ValueError, RecursionError) as error:
            raise BadLineError(f"not JSON ({error})") from error
        if not isinstance(record, dict):
            raise BadLineError(f"a JSON object is needed, not {type(record).__name__}")
    if text_key not in record:
        raise BadLineError(f"no key {text_key!r}; it has {', '.join(map(repr, list(record)[:8])) or 'none'}")
    text = record[text_key]
    if not isinstance(text, str):
        raise BadLineError(f"{text_key!r} is not text but {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadLineError(f"{text_key!r} is not valid Unicode ({error.reason})") from error
    return Document(text, record.get(id_key))


def _read_lines(path: Path, source: int, chunk_bytes: int) -> Iterator[Chunk]:
    with open(path, "rb") as stored:
        lines: IO[bytes] = stored
        if path.suffix == ".gz":
            lines = cast(IO[bytes], gzip.GzipFile(fileobj=stored))
        elif path.suffix == ".zst":
            lines = io.BufferedReader(_ZstdReader(stored), buffer_size=1 << 20)
        first_line = 1
        while records := lines.readlines(chunk_bytes):
            yield Chunk(source, first_line, records, stored.tell())
            first_line += len(records)


class _ZstdReader(io.RawIOBase):
    """Decompresses all frames of a file; EOFError when it ends inside one (zstandard's own reader says
    nothing)."""

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


def _read_parquet(path: Path, source: int, columns: tuple[str, str]) -> Iterator[Chunk]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text_key, id_key = columns
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_key not in names:
                raise UserError(
                    f"{path} has no column {text_key!r}; it has {', '.join(map(repr, names))}: use "
                    "--text-key."
                )
            wanted = [text_key] + ([id_key] if id_key in names and id_key != text_key else [])
            first_line, num_rows, num_bytes = 1, file.metadata.num_rows, path.stat().st_size
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=wanted):
                done = first_line - 1 + batch.num_rows
                if id_key in wanted[1:]:
                    number = batch.schema.get_field_index(id_key)
                    batch = batch.set_column(number, id_key, _without_times(batch.column(number)))
                yield Chunk(source, first_line, batch.to_pylist(), num_bytes * done // max(1, num_rows))
                first_line = done + 1
    except (pa.ArrowException, ValueError, OverflowError, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet ({error}): copy it again.") from error


def _without_times(column: Any) -> Any:
    """Dates and times as text, durations as their count: Python has no nanoseconds and fewer years."""
    import pyarrow as pa

    if pa.types.is_duration(column.type):
        return column.cast(pa.int64())
    return column.cast(pa.string()) if pa.types.is_temporal(column.type) else column
