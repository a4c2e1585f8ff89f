"""Stage `write`: the documents that are left, split into training and validation, unit by unit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from datatrove.data import Document

from meditron_train.corpus.json_files import json_line, open_zstd, read_json_lines, write_json
from meditron_train.corpus.manifest import DOCUMENTS_SCHEMA
from meditron_train.corpus.pipeline.fates import Fate, Fates
from meditron_train.corpus.pipeline.index import Index, identifiers, known_identifiers
from meditron_train.corpus.pipeline.plan import Plan, Unit
from meditron_train.corpus.pipeline.store import ProgressFile
from meditron_train.corpus.pipeline.work import whole_directory
from meditron_train.corpus.pipeline.worker import CorpusStep, prepare_worker

SPLITS = ("train", "validation")
_BATCH_ROWS = 8192


def split_of(doc_id: str, source: str, validation: float, seed: int) -> str:
    """Where a document belongs: decided by its id alone, so that it stays there in the next build."""
    draw = xxhash.xxh64_intdigest(f"{source}\0{doc_id}", seed=seed & 0xFFFFFFFFFFFFFFFF)
    return "validation" if draw < validation * 2**64 else "train"


class WriteUnits(CorpusStep):
    """Writes units rank, rank + tasks, ..."""

    name = "write"
    STAGE = "write"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        prepare_worker()
        progress = ProgressFile(self._work.progress(self.STAGE), rank)
        todo = [
            unit for unit in self._plan.units[rank::world_size] if not self._work.unit(unit.number).is_dir()
        ]
        for unit in todo:
            with whole_directory(self._work.unit(unit.number)) as directory, ExitStack() as stack:
                writer = _UnitWriter(directory, stack, self._plan, unit)
                self._write(unit, writer, progress)
                stack.close()
                write_json(directory / "counts.json", writer.counts)
        progress.end()
        yield from ()

    def _write(self, unit: Unit, writer: _UnitWriter, progress: ProgressFile) -> None:
        fates = Fates.load(self._work.clusters)
        index = Index(self._plan, self._work)
        number = index.offsets[unit.first]
        for shard in unit.shards:
            for record in read_json_lines(self._work.shard(shard) / "documents.jsonl.zst"):
                fate = Fate(int(fates.fate[number]))
                if fate is not Fate.KEPT:
                    kept = fates.stands_for(number)
                    kept_source = self._plan.source(index.source_of(kept)).name
                    writer.drop(record, fate.rule, index.id(kept), kept_source)
                else:
                    writer.keep(record)
                progress.add()
                number += 1


class _UnitWriter:
    """The files of a unit: per split the documents and their rows of the manifest; dropped documents; hits."""

    def __init__(self, directory: Path, stack: ExitStack, plan: Plan, unit: Unit) -> None:
        self._source, self._seed = plan.source(unit.source), plan.corpus.seed
        self._documents = {
            split: stack.enter_context(open_zstd(directory / f"{split}.jsonl.zst")) for split in SPLITS
        }
        self._tables = {
            split: stack.enter_context(pq.ParquetWriter(directory / f"{split}.parquet", DOCUMENTS_SCHEMA))
            for split in SPLITS
        }
        self._rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        self._dropped = stack.enter_context(open(directory / "dropped.jsonl", "wb"))  # noqa: SIM115 (it is one)
        self._hits = stack.enter_context(open(directory / "contamination.jsonl", "wb"))  # noqa: SIM115
        stack.callback(self._flush)
        self._dropped_by: Counter[str] = Counter()
        self._splits: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}

    @property
    def counts(self) -> dict[str, Any]:
        return {
            "dropped": dict(sorted(self._dropped_by.items())),
            "splits": {split: dict(sorted(counts.items())) for split, counts in self._splits.items()},
        }

    def keep(self, record: dict[str, Any]) -> None:
        source, metadata, text = self._source, record["metadata"], record["text"]
        split = split_of(record["id"], source.name, source.validation, self._seed)
        known = {
            "id": record["id"],
            "source": source.name,
            "license": metadata["license"],
            "url": metadata.get("url"),
        }
        rest = {key: value for key, value in metadata.items() if key not in known}
        self._documents[split].write(json_line({**known, "text": text, "metadata": rest}))
        num_bytes = len(text.encode())
        self._rows[split].append(
            {
                **known,
                **identifiers(metadata),
                "sha256": sha256(text.encode()).digest(),
                "num_chars": len(text),
                "num_bytes": num_bytes,
                "contaminated": "hits" in record,
                "num_tokens": None,
            }
        )
        for hit in record.get("hits", ()):
            flagged = {"id": record["id"], "source": source.name, **hit, "removed": False}
            self._hits.write(json_line(flagged))
        self._splits[split].update(documents=1, chars=len(text), bytes=num_bytes)
        if len(self._rows[split]) == _BATCH_ROWS:
            self._flush()

    def drop(self, record: dict[str, Any], rule: str, kept: str, kept_source: str) -> None:
        self._dropped_by[rule] += 1
        dropped = {"id": record["id"], "source": self._source.name, "rule": rule}
        stands_for_it = {"kept": kept, "kept_source": kept_source}
        self._dropped.write(json_line(dropped | stands_for_it | known_identifiers(record["metadata"])))

    def _flush(self) -> None:
        for split, rows in self._rows.items():
            if rows:
                self._tables[split].write_table(pa.Table.from_pylist(rows, schema=DOCUMENTS_SCHEMA))
                rows.clear()
