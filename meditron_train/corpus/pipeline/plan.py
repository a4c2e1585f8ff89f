"""What is to be built: the shards of every source, and the units in which later stages work.

A shard is what a reader reads at a time. Documents are numbered through all shards in their order, which is the order
of priority: sources as declared, shards as the reader lists them, documents as they stand. A unit is one or more
neighboring shards of one source; there are few of them, as the merge of MinHash signatures opens a file for each.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from meditron_train import __version__
from meditron_train.corpus.declaration import Corpus, SourceSection
from meditron_train.corpus.document import Problem, Reason, Shard
from meditron_train.corpus.json_files import read_json, write_json
from meditron_train.corpus.options import NoInputError
from meditron_train.corpus.pipeline.work import WorkDirectory
from meditron_train.errors import UserError
from meditron_train.files import sha256_file

_MAX_UNITS = 256
_FORMAT = "meditron-train-corpus-build/3"
# What may change without building again: it concerns the use of the documents, not which ones there are.
_NOT_IN_FINGERPRINT: Any = {
    **dict.fromkeys(
        ("output", "slurm", "tokenize", "phases", "title", "description", "version", "url"), True
    ),
    "sources": {"__all__": {"weight": True, "token_budget": True}},
}


@dataclass(frozen=True)
class PlannedShard:
    """A shard without its paths, of which there may be millions: they lie in a file of their own."""

    number: int
    source: int
    """Number of the source in the declaration."""
    name: str
    num_bytes: int
    leader: int
    """Number of the shard with the same files whose source stands first: they are read once for all of them, and
    `select` says which source a record belongs to. A shard that shares nothing leads itself."""


@dataclass(frozen=True)
class Unit:
    """The shards first, ..., last."""

    number: int
    source: int
    first: int
    last: int

    @property
    def shards(self) -> range:
        return range(self.first, self.last + 1)


@dataclass(frozen=True)
class Plan:
    """Everything that the result depends on; of the sources' files, size and time of change stand for the content."""

    corpus: Corpus
    shards: tuple[PlannedShard, ...]
    units: tuple[Unit, ...]
    problems: tuple[tuple[str, Problem], ...]
    """Sources that are not there, by name."""
    benchmarks: dict[str, str]
    """SHA-256 of each benchmark's file, by name."""
    fingerprint: str

    def source(self, number: int) -> SourceSection:
        return self.corpus.sources[number]

    @cached_property
    def leaders(self) -> tuple[PlannedShard, ...]:
        """The shards that are read, each of them once."""
        return tuple(shard for shard in self.shards if shard.leader == shard.number)

    @cached_property
    def led_by(self) -> dict[int, list[PlannedShard]]:
        """By number of the leader, the shards that are read with it, itself among them."""
        found: dict[int, list[PlannedShard]] = {}
        for shard in self.shards:
            found.setdefault(shard.leader, []).append(shard)
        return found


def reader(source: SourceSection) -> Any:
    """The module that reads a source.

    Raises:
        UserError: there is none of that name.
    """
    name = f"meditron_train.corpus.readers.{source.reader}"
    if not source.reader.isidentifier() or importlib.util.find_spec(name) is None:
        package = importlib.util.find_spec("meditron_train.corpus.readers")
        folders = list(package.submodule_search_locations or []) if package else []
        known = sorted(path.stem for folder in folders for path in Path(folder).glob("[a-z]*.py"))
        raise UserError(
            f"source {source.name!r}: there is no reader {source.reader!r}; use one of {', '.join(known)}"
        )
    return importlib.import_module(name)


def reader_options(source: SourceSection) -> dict[str, Any]:
    """What the reader is given: its options, and the path."""
    return {**source.options, "path": str(source.path)}


def make_plan(corpus: Corpus, work: WorkDirectory) -> Plan:
    """List the shards of all sources, and write them down.

    Raises:
        UserError: a source names a reader that does not exist.
    """
    shards: list[PlannedShard] = []
    first_of: dict[str, int] = {}
    problems: list[tuple[str, Problem]] = []
    digest = hashlib.sha256()
    for number, source in enumerate(corpus.sources):
        module = reader(source)
        if source.path is None:
            continue
        if not source.path.exists():
            detail = f"the path of source {source.name!r} does not exist"
            problem = Problem(str(source.path), "", Reason.MISSING, detail, is_record=False)
            problems.append((source.name, problem))
            continue
        try:
            listed = module.shards(reader_options(source))
        except NoInputError as error:
            problem = Problem(str(source.path), "", Reason.MISSING, str(error), is_record=False)
            problems.append((source.name, problem))
            continue
        same_files = json.dumps([source.reader, reader_options(source)], sort_keys=True, default=str)
        ahead = len(shards) - first_of.setdefault(same_files, len(shards))
        for shard in listed:
            num_bytes = 0
            for path in _inputs(module, shard, source):
                stat = path.stat()
                digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
                num_bytes += stat.st_size
            planned = PlannedShard(len(shards), number, shard.name, num_bytes, len(shards) - ahead)
            write_json(
                _shard_path(work, planned.number),
                {"name": shard.name, "paths": [str(path) for path in shard.paths]},
            )
            shards.append(planned)
    benchmarks = {
        benchmark.name: sha256_file(benchmark.path) for benchmark in corpus.decontamination.benchmarks
    }
    settings = {
        "format": _FORMAT,
        "benchmarks": benchmarks,
        "corpus": corpus.model_dump(mode="json", exclude=_NOT_IN_FINGERPRINT),
        "versions": {"meditron-train": __version__, "datatrove": version("datatrove")},
    }
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return Plan(corpus, tuple(shards), tuple(_units(shards)), tuple(problems), benchmarks, digest.hexdigest())


def _inputs(module: Any, shard: Shard, source: SourceSection) -> Iterator[Path]:
    """Every file that the reader opens for a shard: its own, those in its folders, and those beside them."""
    for path in shard.paths:
        if path.is_dir():
            yield from sorted(file for file in path.iterdir() if file.is_file())
        elif path.exists():  # a link to nothing is a problem that the reader reports
            yield path
    sidecars = getattr(module, "sidecars", None)
    if sidecars is not None:
        yield from (path for path in sidecars(shard, reader_options(source)) if path.is_file())


def planned_paths(work: WorkDirectory, shard: PlannedShard) -> Shard:
    """The shard as its reader gave it."""
    stored = read_json(_shard_path(work, shard.number))
    return Shard(stored["name"], tuple(Path(path) for path in stored["paths"]))


def _shard_path(work: WorkDirectory, number: int) -> Path:
    return work.root / "shards" / f"{number:06d}.json"


def _units(shards: list[PlannedShard]) -> Iterator[Unit]:
    """Neighboring shards of one source, about equal in bytes, at most _MAX_UNITS and one more for each source."""
    largest = sum(shard.num_bytes for shard in shards) // _MAX_UNITS + 1
    group: list[PlannedShard] = []
    count = 0
    for shard in shards:
        full = sum(other.num_bytes for other in group) + shard.num_bytes > largest
        if group and (full or group[0].source != shard.source):
            yield Unit(count, group[0].source, group[0].number, group[-1].number)
            count, group = count + 1, []
        group.append(shard)
    if group:
        yield Unit(count, group[0].source, group[0].number, group[-1].number)


def plan_record(plan: Plan) -> dict[str, Any]:
    """What is kept of a plan, so that an interrupted build is continued only by the same one."""
    return {"fingerprint": plan.fingerprint, "shards": [asdict(shard) for shard in plan.shards]}
