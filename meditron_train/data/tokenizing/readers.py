"""Documents from JSONL and text files (plain, gzip, zstd) and Parquet files, in chunks whose cuts depend on the
content alone."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from meditron_train.errors import UserError
from meditron_train.files import DAMAGED, decompressed
from meditron_train.units import format_num_bytes

SUFFIXES = (*(f"{kind}{packed}" for kind in (".jsonl", ".txt") for packed in ("", ".gz", ".zst")), ".parquet")
_LOOK_LINES, _LOOK_BYTES = 100, 1 << 20  # how much of a file is looked at before the work starts
_PARQUET_ROWS = 2048
# Of one document as it is stored. Encoding takes about forty times as much memory, and hardly more than linear time:
# 3 s for 2 MiB by the slower of the encoders, so minutes at this bound.
MAX_DOCUMENT_BYTES = 32 << 20


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
    """A line or row that is not a document; the message says why."""


class MissingKeyError(BadLineError):
    """A line that has no such key."""


class PlainText(bytes):
    """A document as it stands in a text file."""


class TooLong(bytes):
    """In place of a line of more than MAX_DOCUMENT_BYTES, which may be all that a small compressed file holds."""


def check_source(path: Path) -> None:
    """Check that the file is there and of a known kind.

    Raises:
        UserError: it is not.
    """
    if path.is_dir():
        raise UserError(f"{path} is a directory: name its files, such as {path / '*.jsonl'}")
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    if path.name.endswith((".json", ".json.gz", ".json.zst")):
        first = _first_lines(path)
        if first[:1] and _is_array(first):
            raise UserError(_array_message(path))
        raise UserError(
            f"{path}: one JSON object on each line is read, from a file whose name ends in .jsonl"
        )
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{path}: cannot tell its kind; the name must end in one of {', '.join(SUFFIXES)}")


def check_records(path: Path, parse_record: Callable[[Any], object | None], remedy: str) -> None:
    """Check the first records of a file of lines.

    Args:
        path: the file.
        parse_record: gives None for a blank line; MissingKeyError says that a record lacks what all need.
        remedy: what a message about that ends with.

    Raises:
        UserError: all of them lack the key, or the file is one array; a single message says so.
    """
    if path.suffix == ".parquet" or _is_text(path):
        return
    lines = _first_lines(path)
    if _is_array(lines):
        raise UserError(_array_message(path))
    missing = []
    for line in lines:
        try:
            if parse_record(line) is not None:
                return
        except MissingKeyError as error:
            missing.append(str(error))
        except BadLineError:
            return
    if missing:
        raise UserError(f"{path}: {missing[0]}. {remedy}")


def _is_text(path: Path) -> bool:
    return path.name.endswith((".txt", ".txt.gz", ".txt.zst"))


def _first_lines(path: Path) -> list[bytes]:
    try:
        with open(path, "rb") as stored:
            return io.BytesIO(decompressed(stored, path.suffix).read(_LOOK_BYTES)).readlines()[:_LOOK_LINES]
    except DAMAGED:
        return []  # which is said where the file is read


def _is_array(lines: list[bytes]) -> bool:
    """Whether a file is one JSON array: it begins like one, and the first line does not end it, or ends the file."""
    first = next((line.strip() for line in lines if line.strip()), b"")
    if not first.removeprefix(b"\xef\xbb\xbf").startswith(b"["):
        return False
    try:
        return isinstance(json.loads(first), list) and sum(bool(line.strip()) for line in lines) == 1
    except (ValueError, RecursionError):
        return True


def _array_message(path: Path) -> str:
    return (
        f"{path} is one JSON array; one object on each line is read. Convert it: "
        f"jq -c '.[]' {path.name} > {path.name.split('.')[0]}.jsonl"
    )


def read_chunks(
    path: Path, source: int, columns: tuple[str, str], chunk_bytes: int, txt: Literal["line", "file"] = "line"
) -> Iterator[Chunk]:
    """The chunks of a file.

    Args:
        path: the file.
        source: its number.
        columns: the keys of the text and of the id.
        chunk_bytes: size to aim at.
        txt: what a document of a text file is.

    Raises:
        UserError: the file is damaged.
    """
    try:
        if path.suffix == ".parquet":
            yield from _read_parquet(path, source, columns)
        elif _is_text(path) and txt == "file":
            with open(path, "rb") as stored:
                text = PlainText(decompressed(stored, path.suffix).read(MAX_DOCUMENT_BYTES + 1))
                yield Chunk(
                    source, 1, [text if len(text) <= MAX_DOCUMENT_BYTES else TooLong()], stored.tell()
                )
        else:
            yield from _read_lines(path, source, chunk_bytes)
    except DAMAGED as error:
        raise UserError(f"{path} is damaged or cut off ({error}): copy it again") from error


def parse(record: Any, text_key: str, id_key: str) -> Document | None:
    """The document of one record of a chunk; None for a blank line.

    Raises:
        BadLineError: the record is not a document.
    """
    if isinstance(record, PlainText):
        return Document(_decoded(record).rstrip("\r\n"), None)
    record = parse_object(record)
    if record is None:
        return None
    if text_key not in record:
        raise MissingKeyError(
            f"no key {text_key!r}; it has {', '.join(map(repr, list(record)[:8])) or 'none'}"
        )
    text = record[text_key]
    if not isinstance(text, str):
        raise BadLineError(f"{text_key!r} is not text but {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadLineError(f"{text_key!r} is not valid Unicode ({error.reason})") from error
    return Document(text, record.get(id_key))


def parse_object(record: Any) -> dict[str, Any] | None:
    """The JSON object in a line, or the row of a Parquet file; None for a blank line.

    Raises:
        BadLineError: the line holds none.
    """
    if isinstance(record, TooLong):
        raise BadLineError(f"more than {format_num_bytes(MAX_DOCUMENT_BYTES)} in one document: split it")
    if not isinstance(record, bytes):
        return dict(record)
    line = _decoded(record)
    if not line.strip():
        return None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadLineError(f"not JSON ({error})") from error
    if not isinstance(value, dict):
        raise BadLineError(f"a JSON object is needed, not {type(value).__name__}")
    return value


def _decoded(record: bytes) -> str:
    try:
        return record.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadLineError(f"not UTF-8 ({error.reason} at byte {error.start})") from error


def _read_lines(path: Path, source: int, chunk_bytes: int) -> Iterator[Chunk]:
    with open(path, "rb") as stored:
        lines = decompressed(stored, path.suffix)
        first_line = 1
        while records := _some_lines(lines, chunk_bytes):
            if _is_text(path):
                records = [line if isinstance(line, TooLong) else PlainText(line) for line in records]
            yield Chunk(source, first_line, records, stored.tell())
            first_line += len(records)


def _some_lines(lines: IO[bytes], num_bytes: int) -> list[bytes]:
    """The next lines, at least `num_bytes` of them and whole, [] at the end; as `readlines`, in bounded memory."""
    block = lines.read(num_bytes)
    if block and not block.endswith(b"\n"):
        block += lines.readline(MAX_DOCUMENT_BYTES)
    found: list[bytes] = io.BytesIO(block).readlines()
    if found and len(found[-1]) > MAX_DOCUMENT_BYTES:
        rest = found[-1]
        while rest and not rest.endswith(b"\n"):
            rest = lines.readline(num_bytes)
    return [line if len(line) <= MAX_DOCUMENT_BYTES else TooLong() for line in found]


def _read_parquet(path: Path, source: int, columns: tuple[str, str]) -> Iterator[Chunk]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text_key, id_key = columns
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_key not in names:
                raise UserError(
                    f"{path} has no column {text_key!r}; it has {', '.join(map(repr, names))}: use --text-key"
                )
            kind = file.schema_arrow.field(text_key).type
            if not _is_string(kind):
                what = "bytes" if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else str(kind)
                raise UserError(
                    f"{path}: the column {text_key!r} holds {what}, not text: cast it to string, or name another "
                    "column by --text-key"
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
        raise UserError(f"{path} cannot be read as Parquet ({error}): copy it again") from error


def _is_string(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _is_string(kind.value_type)
    is_view = getattr(pa.types, "is_string_view", None)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or (is_view and is_view(kind)))


def _without_times(column: Any) -> Any:
    """Dates and times as text, durations as their count: Python has no nanoseconds and fewer years."""
    import pyarrow as pa

    if pa.types.is_duration(column.type):
        return column.cast(pa.int64())
    return column.cast(pa.string()) if pa.types.is_temporal(column.type) else column
