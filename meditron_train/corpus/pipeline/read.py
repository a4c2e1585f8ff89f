"""Stages `scan` and `read`: from shards of raw files to clean documents.

One pass notes which ids are claimed more than once; the second reads, and runs the filters of single documents.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.utils.text import split_into_parts

from meditron_train.corpus.declaration import SourceSection
from meditron_train.corpus.document import Document as RawDocument
from meditron_train.corpus.document import Problem, Reason
from meditron_train.corpus.pipeline.contamination import BenchmarkIndex
from meditron_train.corpus.pipeline.filters import filter_steps
from meditron_train.corpus.pipeline.licenses import accepted_licenses
from meditron_train.corpus.pipeline.plan import Plan, PlannedShard, planned_paths, reader, reader_options
from meditron_train.corpus.pipeline.store import ProgressFile, ShardStore
from meditron_train.corpus.pipeline.work import WorkDirectory, whole_directory
from meditron_train.corpus.pipeline.worker import CorpusStep, prepare_worker
from meditron_train.corpus.record_claims import load_losers, resolve, write_claims

SCAN, READ = "scan", "read"
_LONG_CHARS = 1 << 18


class ScanShards(CorpusStep):
    """Notes which ids the records of shards rank, rank + tasks, ... claim."""

    name = "scan for ids"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        prepare_worker()
        progress = ProgressFile(self._work.progress(SCAN), rank)
        for shard in self._plan.leaders[rank::world_size]:
            path = self._work.claims(shard.number)
            if path.exists():
                continue
            source = self._plan.source(shard.source)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}")
            stored = planned_paths(self._work, shard)
            count = write_claims(temporary, reader(source).scan(stored, reader_options(source)))
            temporary.replace(path)
            progress.add(count)
        progress.end()
        yield from ()


def resolve_claims(plan: Plan, work: WorkDirectory) -> None:
    """Decide, source by source, which record keeps an id that several claim."""
    for number in range(len(plan.corpus.sources)):
        shards = [shard for shard in plan.leaders if shard.source == number]
        if shards and not work.losers(number).is_dir():
            with whole_directory(work.losers(number)) as directory:
                claims = [work.claims(shard.number) for shard in shards]
                resolve(claims, [planned_paths(work, shard) for shard in shards], directory)


class ReadShards(CorpusStep):
    """Reads shards rank, rank + tasks, ..., each once for all the sources that share its files. Every document goes
    through the filters of its source, and is searched for benchmark items.

    The filters are datatrove's steps, called here and not listed behind this one, as the sources of one task have
    filters of their own.
    """

    name = "read and filter"

    def __init__(self, plan: Plan, work: WorkDirectory, strict: bool) -> None:
        super().__init__(plan, work)
        self._strict = strict
        self._removes = plan.corpus.decontamination.action == "remove"
        self._first_of_source = {shard.source: shard.number for shard in reversed(plan.leaders)}

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        prepare_worker()
        progress = ProgressFile(self._work.progress(READ), rank)
        accepted = accepted_licenses(self._plan.corpus)
        todo = [
            leader
            for leader in self._plan.leaders[rank::world_size]
            if not all(self._work.shard(s.number).is_dir() for s in self._plan.led_by[leader.number])
        ]
        benchmarks = BenchmarkIndex(self._plan.corpus.decontamination) if todo else None
        for leader in todo:
            assert benchmarks is not None
            with ExitStack() as stack:
                ways = [self._way(shard, stack) for shard in self._plan.led_by[leader.number]]
                self._read(leader, ways, accepted, benchmarks, progress)
        progress.end()
        yield from ()

    def _way(self, shard: PlannedShard, stack: ExitStack) -> _Way:
        source = self._plan.source(shard.source)
        store = ShardStore(self._work, self._strict)
        stack.enter_context(store.shard(shard.number, source.name))
        return _Way(source, store, filter_steps(self._plan.corpus.filters_of(source), store))

    def _read(
        self,
        leader: PlannedShard,
        ways: list[_Way],
        accepted: frozenset[str],
        benchmarks: BenchmarkIndex,
        progress: ProgressFile,
    ) -> None:
        """Read the files of a shard. What is wrong with them, and what no source selects, is the first source's."""
        source, stored = ways[0].source, planned_paths(self._work, leader)
        # Which of several files a document comes from only its id tells, which the problem names.
        files = str(stored.paths[0] if len(stored.paths) == 1 else source.path)
        losers = load_losers(
            self._work.losers(leader.source), leader.number - self._first_of_source[leader.source]
        )
        for item in reader(source).read(stored, reader_options(source), losers):
            if isinstance(item, Problem):
                ways[0].store.left_out(item)
                continue
            takers = [way for way in ways if way.takes(item)]
            if not takers:
                keys = sorted({key for way in ways for key in way.source.select})
                ways[0].store.skip(", ".join(f"{key}: {item.metadata.get(key)}" for key in keys))
            for way in takers:
                progress.add()
                way.store.read(item)
                problem, document = self._checked(item, way.source, accepted, files)
                if problem is not None:
                    way.store.problem(problem)
                if document is None:
                    way.store.drop(item, f"invalid.{problem.reason.value}" if problem else "invalid")
                elif way.passes(document):
                    hits = benchmarks.find(document.text)
                    if hits and self._removes:
                        way.store.drop_contaminated(document, hits)
                    else:
                        way.store.keep(document, hits)

    def _checked(
        self, item: RawDocument, source: SourceSection, accepted: frozenset[str], files: str
    ) -> tuple[Problem | None, Document | None]:
        """What is wrong with a document, and the document if it can be kept."""
        where = f"document {item.id}"
        try:
            item.text.encode()
        except UnicodeEncodeError as error:
            return Problem(files, where, Reason.INVALID_UTF8, f"not valid Unicode: {error.reason}"), None
        if not item.text.strip():
            return Problem(files, where, Reason.EMPTY, "no text"), None
        problem = None
        license = str(item.metadata.get("license") or source.license)
        if license not in accepted:
            problem = Problem(files, where, Reason.UNKNOWN_LICENSE, f"unknown license {license!r}")
            if self._plan.corpus.licenses.unknown == "drop":
                return problem, None
        metadata = {**item.metadata, "license": license}
        return problem, Document(text=item.text, id=item.id, metadata=metadata)


@dataclass(frozen=True)
class _Way:
    """Where the documents of a source go."""

    source: SourceSection
    store: ShardStore
    filters: Sequence[BaseFilter]

    def takes(self, item: RawDocument) -> bool:
        return all(str(item.metadata.get(key)) == value for key, value in self.source.select.items())

    def passes(self, document: Document) -> bool:
        """Whether no filter drops the document."""
        documents: Any = iter([document])
        for step in self.filters:
            documents = step.run(documents)
        kept = next(documents, None) is not None
        if len(document.text) > _LONG_CHARS:
            split_into_parts.cache_clear()  # in which datatrove keeps the words of the last five texts
        return kept
