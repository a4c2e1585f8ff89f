"""Records of JSON lines and Parquet files, one at a time, with what cannot be read as problems."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import orjson

from meditron_train.corpus.document import Problem, Reason, Shard
from meditron_train.corpus.options import NoInputError, existing
from meditron_train.files import DAMAGED, decompressed

JSON_SUFFIXES = (".jsonl", ".json", ".gz", ".zst")
_BATCH_ROWS, _BATCH_BYTES = 64, 4 << 20


@dataclass(frozen=True)
class Record:
    """One line or row of a file.

    Attributes:
        position: its number, from 0, blank lines included.
    """

    file: str
    position: int
    value: dict[str, Any]

    @property
    def where(self) -> str:
        return f"line {self.position + 1}"

    def problem(self, reason: Reason, detail: str, id: str = "") -> Problem:
        return Problem(self.file, self.where, reason, detail, id)


def file_shards(path: Path, suffixes: tuple[str, ...]) -> list[Shard]:
    """One shard for each file with one of the suffixes in a directory and those below, or for one file.

    Order and name are those of the path below the directory.

    Raises:
        UserError: there is no such file.
    """
    if existing(path).is_file():
        return [Shard(path.name, (path,))]
    found = sorted(
        (file.relative_to(path).as_posix(), file)
        for file in path.rglob("*")
        if file.name.endswith(suffixes) and not file.name.startswith(".") and file.is_file()
    )
    if not found:
        raise NoInputError(f"there is no file *{', *'.join(suffixes)} in {path}")
    return [Shard(name, (file,)) for name, file in found]


def read_records(path: Path, max_bytes: int, columns: Iterable[str] = ()) -> Iterator[Record | Problem]:
    """The records of a file of JSON lines (also .gz and .zst) or Parquet.

    Args:
        path: the file.
        max_bytes: of one line or row.
        columns: those to read of a Parquet file, where it has them; all by default.
    """
    if path.name.endswith(".parquet"):
        yield from _parquet_records(path, max_bytes, set(columns))
        return
    file, position = str(path), 0
    try:
        for position, line in enumerate(_lines(path, max_bytes)):
            if line is None:
                detail = f"the line is longer than {max_bytes} bytes"
                yield Problem(file, f"line {position + 1}", Reason.TOO_LARGE, detail)
            elif line.strip():
                yield _record(file, position, line)
    except DAMAGED as error:
        where, detail = f"after line {position + 1}", f"damaged or cut off ({error})"
        yield Problem(file, where, Reason.TRUNCATED, detail, is_record=False)
    except OSError as error:
        detail = f"cannot be read: {error.strerror or error}"
        yield Problem(file, "", Reason.MISSING, detail, is_record=False)


def _record(file: str, position: int, line: bytes) -> Record | Problem:
    where = f"line {position + 1}"
    try:
        value = orjson.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except orjson.JSONDecodeError as error:
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as wrong:
            return Problem(
                file, where, Reason.INVALID_UTF8, f"{wrong.reason} at byte {wrong.start} of the line"
            )
        return Problem(file, where, Reason.BROKEN_JSON, str(error))
    if not isinstance(value, dict):
        return Problem(file, where, Reason.BROKEN_JSON, f"an object is needed, not {type(value).__name__}")
    return Record(file, position, value)


def _lines(path: Path, max_bytes: int) -> Iterator[bytes | None]:
    """The lines of a file; None for one that is longer than max_bytes."""
    with open(path, "rb") as stored:
        lines = decompressed(stored, path.suffix)
        while line := lines.readline(max_bytes + 1):
            if len(line) <= max_bytes:
                yield line
                continue
            yield None
            while line and not line.endswith(b"\n"):
                line = lines.readline(1 << 20)


def _parquet_records(path: Path, max_bytes: int, columns: set[str]) -> Iterator[Record | Problem]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    position = 0
    try:
        with pq.ParquetFile(path) as file:
            wanted = [name for name in file.schema_arrow.names if name in columns or not columns]
            for group in range(file.num_row_groups):
                rows = _batch_rows(file.metadata.row_group(group))
                batches = file.iter_batches(rows, row_groups=[group], columns=wanted, use_threads=False)
                for batch in batches:
                    for row in map(batch.slice, range(batch.num_rows), repeat(1)):
                        yield _parquet_record(path, position, row, max_bytes)
                        position += 1
    except (pa.ArrowException, ValueError, OverflowError, OSError) as error:
        reason = Reason.BROKEN_FILE if path.exists() else Reason.MISSING
        where, detail = f"after row {position}", f"cannot be read as Parquet: {error}"
        yield Problem(str(path), where, reason, detail, is_record=False)


def _batch_rows(group: Any) -> int:
    """As many rows of a row group as have about _BATCH_BYTES, one at least."""
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES * group.num_rows // max(group.total_byte_size, 1)))


def _parquet_record(path: Path, position: int, row: Any, max_bytes: int) -> Record | Problem:
    if row.nbytes > max_bytes:
        where, detail = f"line {position + 1}", f"the row is longer than {max_bytes} bytes"
        return Problem(str(path), where, Reason.TOO_LARGE, detail)
    return Record(str(path), position, row.to_pylist()[0])
