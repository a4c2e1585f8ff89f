"""The index of the documents that stage `read` kept: what later stages compare without reading any text.

One Arrow file per shard, memory-mapped; a document is found by its number, which counts through all shards.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from meditron_train.corpus.pipeline.plan import Plan
from meditron_train.corpus.pipeline.words import content_hash
from meditron_train.corpus.pipeline.work import WorkDirectory

IDENTIFIERS = ("pmid", "pmcid", "doi")
_PART_DOCUMENTS = 4_000_000
_BATCH_ROWS = 8192
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("content_low", pa.uint64()),
        ("content_high", pa.uint64()),
        *((f"{name}_hash", pa.uint64()) for name in IDENTIFIERS),
    ]
)


def identifiers(metadata: dict[str, Any]) -> dict[str, str | None]:
    """The PMID, PMCID and DOI of a document in one form each: digits, PMC and digits, lower case without a resolver."""
    pmid, pmcid, doi = (str(metadata.get(name) or "").strip() for name in IDENTIFIERS)
    pmcid = pmcid.upper().removeprefix("PMC").partition(".")[0]
    doi = doi.lower()
    for prefix in ("https://doi.org/", "http://dx.doi.org/", "doi:"):
        doi = doi.removeprefix(prefix)
    return {"pmid": pmid or None, "pmcid": f"PMC{pmcid}" if pmcid else None, "doi": doi.strip() or None}


def known_identifiers(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Those of `identifiers` that a document has."""
    return {name: value for name, value in identifiers(dict(metadata)).items() if value}


class IndexWriter:
    """Writes the rows of a shard, in batches."""

    def __init__(self, path: Path) -> None:
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, _SCHEMA)
        self._rows: list[list[Any]] = []

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._flush()
        self._writer.close()
        self._file.close()

    def add(self, doc_id: str, text: str, metadata: dict[str, Any]) -> None:
        content = content_hash(text)
        self._rows.append(
            [
                doc_id,
                int.from_bytes(content[:8], "little"),
                int.from_bytes(content[8:], "little"),
                *(
                    xxhash.xxh64_intdigest(f"{name}\0{value}") if value else 0
                    for name, value in identifiers(metadata).items()
                ),
            ]
        )
        if len(self._rows) == _BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            columns = zip(*self._rows, strict=True)
            arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
            self._writer.write_batch(pa.record_batch(arrays, schema=_SCHEMA))
            self._rows.clear()


@lru_cache(maxsize=64)
def _open(path: str) -> pa.Table:
    with pa.memory_map(path) as file:
        return pa.ipc.open_file(file).read_all()


@dataclass(frozen=True)
class Index:
    """The indexes of all shards."""

    plan: Plan
    work: WorkDirectory

    def _table(self, shard: int) -> pa.Table:
        return _open(str(self.work.shard(shard) / "index.arrow"))

    @cached_property
    def offsets(self) -> list[int]:
        """The number of the first document of each shard, and behind them the number of all documents."""
        offsets = [0]
        for shard in self.plan.shards:
            offsets.append(offsets[-1] + self._table(shard.number).num_rows)
        return offsets

    @property
    def num_documents(self) -> int:
        return self.offsets[-1]

    def locate(self, document: int) -> tuple[int, int]:
        """Shard and position of a document."""
        shard = bisect_right(self.offsets, document) - 1
        return shard, document - self.offsets[shard]

    def source_of(self, document: int) -> int:
        return self.plan.shards[self.locate(document)[0]].source

    def id(self, document: int) -> str:
        shard, position = self.locate(document)
        return str(self._table(shard)["id"][position].as_py())

    def columns(self, shard: int, *names: str) -> list[NDArray[Any]]:
        table = self._table(shard)
        return [table[name].to_numpy() for name in names]

    def parts(
        self,
        names: tuple[str, ...],
        keep: Callable[[int], bool] = lambda shard: True,
    ) -> Iterator[tuple[list[NDArray[Any]], NDArray[np.int64]]]:
        """Columns and document numbers, in parts of bounded size: documents whose first column has the same value come
        in the same part. Every part passes over the memory-mapped indexes once."""
        num_parts = self.num_documents // _PART_DOCUMENTS + 1
        for part in range(num_parts):
            found: list[list[NDArray[Any]]] = [[] for _ in names]
            numbers: list[NDArray[np.int64]] = []
            for shard in self.plan.shards:
                if not keep(shard.number):
                    continue
                columns = self.columns(shard.number, *names)
                chosen = np.flatnonzero(columns[0] % np.uint64(num_parts) == part)
                for column, values in zip(found, columns, strict=True):
                    column.append(values[chosen])
                numbers.append(chosen + self.offsets[shard.number])
            if numbers:
                yield [np.concatenate(column) for column in found], np.concatenate(numbers)
