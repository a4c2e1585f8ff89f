"""The last step of a build: joins what the units wrote into the finished corpus. manifest.json comes last."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import zstandard

from meditron_train import __version__
from meditron_train.config.load import dump_config
from meditron_train.corpus.declaration import SourceSection
from meditron_train.corpus.json_files import ZSTD_LEVEL, json_line, read_json, read_json_lines, write_json
from meditron_train.corpus.manifest import (
    DOCUMENTS_SCHEMA,
    FORMAT,
    Dataset,
    count_licenses,
    file_hashes,
    touched_items,
)
from meditron_train.corpus.pipeline.contamination import load_items
from meditron_train.corpus.pipeline.plan import Plan, reader, reader_options
from meditron_train.corpus.pipeline.store import problem_record
from meditron_train.corpus.pipeline.work import WorkDirectory
from meditron_train.corpus.pipeline.write import SPLITS
from meditron_train.files import replacing

_CHUNK_BYTES = 1 << 20


def publish(plan: Plan, work: WorkDirectory) -> dict[str, Any]:
    """Write the corpus into its directory; returns the manifest. Repeated after a kill, it writes the same."""
    root = plan.corpus.output
    (root / "documents").mkdir(parents=True, exist_ok=True)
    (root / "manifest").mkdir(exist_ok=True)
    sources = [_publish_source(plan, work, number) for number in range(len(plan.corpus.sources))]
    for name, problem in plan.problems:
        record = next(source for source in sources if source["name"] == name)
        record["problems"][problem.reason.value] = record["problems"].get(problem.reason.value, 0) + 1
    _compress(root / "dropped.jsonl.zst", _dropped(plan, work))
    places = [work.shard(shard.number) for shard in plan.shards] + [work.unit(u.number) for u in plan.units]
    _join(root / "contamination.jsonl", (place / "contamination.jsonl" for place in places))
    _write_problems(root / "problems.jsonl", plan, work)
    # The same file wherever it is built.
    dump_config(plan.corpus.model_copy(update={"output": Path(root.name)}), root / "corpus.yaml")
    manifest = {
        "format": FORMAT,
        "name": plan.corpus.name,
        "version": __version__,
        "fingerprint": plan.fingerprint,
        "sources": sources,
        "benchmarks": _benchmarks(plan, root / "contamination.jsonl"),
        "tokenizer": None,
        "files": file_hashes(root),
    }
    write_json(root / "manifest.json", manifest)
    return manifest


def _publish_source(plan: Plan, work: WorkDirectory, number: int) -> dict[str, Any]:
    """Join the files of a source; returns its part of the manifest."""
    source = plan.source(number)
    units = [unit for unit in plan.units if unit.source == number]
    shards = [shard for shard in plan.shards if shard.source == number]
    read: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    problems: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    not_selected: Counter[str] = Counter()
    removed: Counter[str] = Counter()
    splits: dict[str, Counter[str]] = {split: Counter(documents=0, chars=0, bytes=0) for split in SPLITS}
    for shard in shards:
        counts = read_json(work.shard(shard.number) / "counts.json")
        dropped.update(counts.pop("dropped"))
        problems.update(counts.pop("problems"))
        left_out.update(counts.pop("left_out"))
        not_selected.update(counts.pop("not_selected"))
        removed.update(counts.pop("removed_chars"))
        read.update(counts)
    for unit in units:
        counts = read_json(work.unit(unit.number) / "counts.json")
        dropped.update(counts["dropped"])
        for split, of_split in counts["splits"].items():
            splits[split].update(of_split)
    for split, of_split in splits.items():
        dataset = Dataset(source.name, split, plan.corpus.output)
        if of_split["documents"]:
            parts = [work.unit(unit.number) for unit in units]
            _join(dataset.documents, (part / f"{split}.jsonl.zst" for part in parts))
            _join_tables(dataset.manifest, (part / f"{split}.parquet" for part in parts))
        else:
            for path in (dataset.documents, dataset.manifest):
                path.unlink(missing_ok=True)
    return {
        **_declared(source),
        # Records are those of files that several sources share at the first of these sources, as far as no other
        # source takes them.
        "read": {
            "records": read["read"] + not_selected.total() + left_out.total(),
            "documents": read["read"],
            "chars": read["read_chars"],
        },
        "left_out": dict(sorted(left_out.items())),
        "not_selected": dict(sorted(not_selected.items())),
        "removed_chars": dict(sorted(removed.items())),
        "problems": dict(sorted(problems.items())),
        "dropped": dict(sorted(dropped.items())),
        "splits": {split: dict(counts) for split, counts in splits.items()},
        "licenses": count_licenses(
            Dataset(source.name, split, plan.corpus.output)
            for split, counts in splits.items()
            if counts["documents"]
        ),
        "provenance": _provenance(source),
    }


def _declared(source: SourceSection) -> dict[str, Any]:
    """What the declaration says of a source, for the card."""
    fields = "name part license redistribution citation url released articles".split()
    return source.model_dump(mode="json", include=set(fields)) | {"is_given": source.path is not None}


def _provenance(source: SourceSection) -> dict[str, Any]:
    """What the reader can say of where its files come from, such as the hash of an inventory."""
    provenance = getattr(reader(source), "provenance", None)
    if provenance is None or source.path is None or not source.path.exists():
        return {}
    return dict(provenance(reader_options(source)))


def _join(target: Path, parts: Iterable[Path]) -> None:
    """One file after the other. zstd files joined are a zstd file."""
    with replacing(target) as file:
        for part in parts:
            with open(part, "rb") as content:
                shutil.copyfileobj(content, file, _CHUNK_BYTES)


def _join_tables(target: Path, parts: Iterable[Path]) -> None:
    with replacing(target) as stored, pq.ParquetWriter(stored, DOCUMENTS_SCHEMA) as writer:
        for part in parts:
            with pq.ParquetFile(part) as file:
                for group in range(file.num_row_groups):
                    writer.write_table(file.read_row_group(group))


def _compress(target: Path, lines: Iterator[bytes]) -> None:
    compressor = zstandard.ZstdCompressor(ZSTD_LEVEL)
    with replacing(target) as stored, compressor.stream_writer(stored, closefd=False) as file:
        for line in lines:
            file.write(line)


def _dropped(plan: Plan, work: WorkDirectory) -> Iterator[bytes]:
    """Every dropped document: first those of the filters, then duplicates and contaminated ones."""
    for shard in plan.shards:
        for record in read_json_lines(work.shard(shard.number) / "dropped.jsonl"):
            yield json_line({"id": record["id"], "source": plan.source(shard.source).name, **record})
    for unit in plan.units:
        for record in read_json_lines(work.unit(unit.number) / "dropped.jsonl"):
            yield json_line(record)


def _write_problems(target: Path, plan: Plan, work: WorkDirectory) -> None:
    with replacing(target) as file:
        for shard in plan.shards:
            file.write((work.shard(shard.number) / "problems.jsonl").read_bytes())
        for name, problem in plan.problems:
            file.write(json_line({"source": name, **problem_record(problem)}))


def _benchmarks(plan: Plan, contamination: Path) -> list[dict[str, Any]]:
    """How much of each benchmark the corpus touches, by rule."""
    section = plan.corpus.decontamination
    lengths = {
        benchmark.name: [len(item.words) for item in load_items(benchmark)]
        for benchmark in section.benchmarks
    }
    touched = touched_items(contamination, {name: len(items) for name, items in lengths.items()})
    return [
        {
            "name": name,
            "sha256": plan.benchmarks[name],
            "items": len(items),
            "too_short": sum(length < section.ngram.min_words for length in items),
            **touched[name],
            "action": section.action,
        }
        for name, items in lengths.items()
    ]
