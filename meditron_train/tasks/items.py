"""Items of benchmarks from local files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from meditron_train.errors import UserError
from meditron_train.files import read_json
from meditron_train.tasks.catalogue import Benchmark
from meditron_train.tasks.formats import Item, rows_of

_MAX_JSON_BYTES = 1 << 30

_EXTENSIONS = (".jsonl", ".json", ".parquet")
_SPLITS = {"test": ("test", "validation", "dev"), "train": ("train", "dev")}  # in their order


def find_file(directory: Path, benchmark: Benchmark, split: str = "test") -> Path | None:
    """The file of a split: DIR/NAME.ext for the test split, or DIR/NAME/SPLIT.ext. None without one.

    Of several, a test split is the one that the benchmark is scored on.
    """
    names = _SPLITS[split]
    if split == "test":
        names = tuple(dict.fromkeys((benchmark.split, *names)))
    stems = [directory / benchmark.file_name / name for name in names]
    if split == "test":
        stems.insert(0, directory / benchmark.file_name)
    for stem in stems:
        for extension in _EXTENSIONS:
            path = stem.with_name(stem.name + extension)
            if path.is_file():
                return path
    return None


def find_test_file(directory: Path, benchmark: Benchmark) -> Path:
    """The file of the questions.

    Raises:
        UserError: there is none; says which names are looked for.
    """
    path = find_file(directory, benchmark)
    if path is None:
        raise UserError(
            f"there is no file of {benchmark.name} in {directory}: expected {benchmark.file_name}.jsonl, .json or "
            f".parquet, or {benchmark.file_name}/{benchmark.split}.jsonl ({benchmark.title})"
        )
    return path


def read_items(path: Path, benchmark: Benchmark, limit: int | None = None) -> list[Item]:
    """All items of a file that are of the benchmark's categories, or the first `limit`.

    An item without an id gets its row's number.

    Raises:
        UserError: names the first row that is wrong.
    """
    items: list[Item] = []
    for number, row in enumerate(_rows(path), 1):
        try:
            item = benchmark.format(row)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            reason = f"it has no {error.args[0]!r}" if isinstance(error, KeyError) else str(error)
            raise UserError(
                f"{path}, row {number} is not of the format of {benchmark.name} ({benchmark.title}): {reason}"
            ) from None
        if benchmark.categories and item.category not in benchmark.categories:
            continue
        items.append(item if item.id else replace(item, id=str(number)))
        if limit is not None and len(items) == limit:
            break
    if not items:
        where = f" of the categories {', '.join(benchmark.categories)}" if benchmark.categories else ""
        raise UserError(f"{path} holds no items{where}")
    return items


def _rows(path: Path) -> Iterator[Any]:
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            for batch in pq.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
        elif path.suffix == ".json":
            yield from rows_of(read_json(path, _MAX_JSON_BYTES))
        else:
            with path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _parsed(path, number, line)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors or OSErrors
        raise UserError(f"{path} cannot be read: {error}") from None


def _parsed(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, row {number} is not JSON: {error}") from None
