"""What stage `read` leaves of a shard: the documents kept, the ones dropped with the rule, problems, and counts."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datatrove.data import Document

from meditron_train.corpus.document import Document as RawDocument
from meditron_train.corpus.document import Problem, Reason
from meditron_train.corpus.json_files import json_line, open_zstd, write_json
from meditron_train.corpus.pipeline.contamination import Hit
from meditron_train.corpus.pipeline.index import IndexWriter, known_identifiers
from meditron_train.corpus.pipeline.work import WorkDirectory, whole_directory
from meditron_train.errors import UserError

_MAX_LABELS = 20


class ProgressFile:
    """How many documents a task has been through in this run, for the process that watches: written once a second."""

    def __init__(self, directory: Path, rank: int) -> None:
        self._path = directory / f"{rank:05d}.json"
        self._documents, self._written_s = 0, time.monotonic()
        self._write(ended=False)

    def add(self, documents: int = 1) -> None:
        self._documents += documents
        now_s = time.monotonic()
        if now_s - self._written_s >= 1.0:
            self._write(ended=False)
            self._written_s = now_s

    def end(self) -> None:
        """The task is done."""
        self._write(ended=True)

    def _write(self, ended: bool) -> None:
        write_json(self._path, {"documents": self._documents, "pid": os.getpid(), "ended": ended})


class ShardStore:
    """Shared by the steps of one task, which has one shard open at a time."""

    def __init__(self, work: WorkDirectory, strict: bool) -> None:
        self._work, self._strict = work, strict

    @contextmanager
    def shard(self, number: int, source: str) -> Iterator[None]:
        """Everything written inside the block belongs to this shard, and takes effect if the block ends
        without an error.
        """
        with whole_directory(self._work.shard(number)) as directory, ExitStack() as stack:
            self._source = source
            self._counts: Counter[str] = Counter()
            self._dropped_by: Counter[str] = Counter()
            self._problems_by: Counter[str] = Counter()
            self._left_out_by: Counter[str] = Counter()
            self._skipped: Counter[str] = Counter()
            self._removed: Counter[str] = Counter()
            self._index = stack.enter_context(IndexWriter(directory / "index.arrow"))
            self._documents = stack.enter_context(open_zstd(directory / "documents.jsonl.zst"))
            self._dropped = stack.enter_context(open(directory / "dropped.jsonl", "wb"))
            self._problems = stack.enter_context(open(directory / "problems.jsonl", "wb"))
            self._hits = stack.enter_context(open(directory / "contamination.jsonl", "wb"))
            yield
            stack.close()
            counts = {
                **self._counts,
                "dropped": dict(sorted(self._dropped_by.items())),
                "removed_chars": {rule: count for rule, count in sorted(self._removed.items()) if count},
                "left_out": dict(sorted(self._left_out_by.items())),
                "not_selected": dict(sorted(self._skipped.items())),
                "problems": dict(sorted(self._problems_by.items())),
            }
            write_json(directory / "counts.json", counts)

    def read(self, document: RawDocument) -> None:
        self._counts["read"] += 1
        self._counts["read_chars"] += len(document.text)
        self._removed.update(document.removed_chars)

    def skip(self, label: str) -> None:
        """A record that no source selects.

        Args:
            label: what it has where sources select.
        """
        if len(self._skipped) >= _MAX_LABELS and label not in self._skipped:
            label = "others"
        self._skipped[label] += 1

    def keep(self, document: Document, hits: Sequence[Hit]) -> None:
        """A document for the next stages.

        Args:
            hits: the benchmark items in it, with which it stays.
        """
        self._counts["kept"] += 1
        self._counts["kept_chars"] += len(document.text)
        self._index.add(document.id, document.text, document.metadata)
        record = {"id": document.id, "text": document.text, "metadata": document.metadata}
        flagged = {"hits": [asdict(hit) for hit in hits]} if hits else {}
        self._documents.write(json_line({**record, **flagged}))

    def drop_contaminated(self, document: Document, hits: Sequence[Hit]) -> None:
        self.drop(document, "contaminated")
        for hit in hits:
            record = {"id": document.id, "source": self._source, **asdict(hit), "removed": True}
            self._hits.write(json_line(record))

    def drop(self, document: Document | RawDocument, rule: str) -> None:
        self._dropped_by[rule] += 1
        record = {"id": document.id, "rule": rule, **known_identifiers(document.metadata)}
        self._dropped.write(json_line(record))

    def left_out(self, problem: Problem) -> None:
        """A problem of the reader: a record that becomes no document, or damage to a file."""
        self.problem(problem)
        if problem.is_record:
            self._left_out_by[problem.reason.value] += 1

    def problem(self, problem: Problem) -> None:
        """Record what is wrong with the input.

        Raises:
            UserError: it is damage, and --strict is on.
        """
        if self._strict and problem.reason.is_damage:
            raise UserError(describe(problem))
        self._problems_by[problem.reason.value] += 1
        self._problems.write(json_line({"source": self._source, **problem_record(problem)}))


class DroppedBy:
    """What datatrove's filters call an exclusion writer: it is given the documents that a filter drops."""

    def __init__(self, store: ShardStore, stage: str) -> None:
        self._store, self._stage = store, stage

    def __enter__(self) -> DroppedBy:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def write(self, document: Document, rank: int = 0) -> None:
        reason = document.metadata.get("filter_reason")
        self._store.drop(document, f"{self._stage}.{reason}" if reason else self._stage)


def describe(problem: Problem) -> str:
    where = f"{problem.file}, {problem.position}" if problem.position else str(problem.file)
    return f"{where}: {problem.reason.value}" + (f" ({problem.detail})" if problem.detail else "")


def problem_record(problem: Problem) -> dict[str, Any]:
    return asdict(problem) | {"reason": problem.reason.value}


def recorded_problem(record: dict[str, Any]) -> Problem:
    """The problem of a line of problems.jsonl, which has a source besides."""
    values = {name: value for name, value in record.items() if name != "source"}
    return Problem(**values | {"reason": Reason(record["reason"])})
