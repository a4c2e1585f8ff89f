"""A finished corpus on disk.

manifest.json                      totals by source and stage of the funnel, hashes of all files; written last
corpus.yaml                        the declaration it was built from
documents/SOURCE.SPLIT.jsonl.zst   id, source, license, url, text, metadata
manifest/SOURCE.SPLIT.parquet      a row for each document, in the same order: what it is, its hash and tokens
dropped.jsonl.zst                  every document that is not there: identifiers, rule, and which one stands for it
problems.jsonl                     what was wrong with the input: file and position
contamination.jsonl                every benchmark item found, with the words shared
tokenized/SOURCE.SPLIT.bin/.idx    where there is a tokenizer; the Nth document is row N of the manifest
tokenizer/                         where it was trained on this corpus
"""

from __future__ import annotations

import fcntl
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from meditron_train.corpus.json_files import read_json, read_json_lines
from meditron_train.errors import UserError
from meditron_train.files import sha256_file

FORMAT = "meditron-train-corpus/1"
DOCUMENTS_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("license", pa.string()),
        ("url", pa.string()),
        ("pmid", pa.string()),
        ("pmcid", pa.string()),
        ("doi", pa.string()),
        ("sha256", pa.binary(32)),
        ("num_chars", pa.int64()),
        ("num_bytes", pa.int64()),
        ("contaminated", pa.bool_()),
        ("num_tokens", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Dataset:
    """The documents of one source and split."""

    source: str
    split: str
    root: Path

    @property
    def stem(self) -> str:
        return f"{self.source}.{self.split}"

    @property
    def documents(self) -> Path:
        return self.root / "documents" / f"{self.stem}.jsonl.zst"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest" / f"{self.stem}.parquet"

    @property
    def tokenized(self) -> Path:
        """Prefix of .bin and .idx."""
        return self.root / "tokenized" / self.stem

    def rows(self, columns: Iterable[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The manifest in batches."""
        with pq.ParquetFile(self.manifest) as file:
            yield from file.iter_batches(columns=list(columns) if columns is not None else None)

    def find(self, column: str, values: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number and row of the documents that have one of the values in a column."""
        wanted = pa.array(sorted(set(values)), pa.string())
        first = 0
        for batch in self.rows():
            hits = pc.is_in(batch.column(column), value_set=wanted)
            for position in pc.indices_nonzero(hits).to_pylist():
                yield first + position, batch.slice(position, 1).to_pylist()[0]
            first += batch.num_rows

    def row(self, number: int) -> dict[str, Any]:
        """The manifest's row of the document with this number.

        Raises:
            IndexError: there is no such document.
        """
        with pq.ParquetFile(self.manifest) as file:
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if number < size:
                    return dict(file.read_row_group(group).slice(number, 1).to_pylist()[0])
                number -= size
        raise IndexError(f"{self.manifest} has no row {number}")


@dataclass(frozen=True)
class FinishedCorpus:
    """A corpus directory with a manifest."""

    root: Path

    @classmethod
    def open(cls, root: Path | str) -> FinishedCorpus:
        """The finished corpus in a directory.

        Raises:
            UserError: there is none.
        """
        corpus = cls(Path(root))
        if not corpus.manifest_path.is_file():
            state = (
                "its build is not finished"
                if (Path(root) / ".build").is_dir()
                else "there is no manifest.json"
            )
            raise UserError(
                f"{root} is not a finished corpus: {state}. Run `meditron-train corpus build` first"
            )
        if corpus.manifest.get("format") != FORMAT:
            raise UserError(f"{corpus.manifest_path} does not have the format {FORMAT!r}")
        return corpus

    @property
    def manifest_path(self) -> Path:
        return self.root / "manifest.json"

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return dict(read_json(self.manifest_path))

    @cached_property
    def datasets(self) -> tuple[Dataset, ...]:
        """Those that hold a document."""
        return tuple(
            Dataset(source["name"], split, self.root)
            for source in self.manifest["sources"]
            for split, counts in source["splits"].items()
            if counts["documents"]
        )

    def duplicates(self) -> Iterator[dict[str, Any]]:
        """The dropped documents that another one stands for: id, source and identifiers, kept and kept_source."""
        for record in read_json_lines(self.root / "dropped.jsonl.zst"):
            if "kept" in record:
                yield record


def touched_items(contamination: Path, num_items: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """How much of each benchmark documents contain, by its name and the number of its items."""
    touched: dict[tuple[str, str], set[str]] = {}
    documents: dict[str, set[tuple[str, str]]] = {}
    for hit in read_json_lines(contamination):
        touched.setdefault((hit["benchmark"], hit["rule"]), set()).add(hit["item"])
        documents.setdefault(hit["benchmark"], set()).add((hit["source"], hit["id"]))
    found = {}
    for name, items in num_items.items():
        by_rule = {rule: touched.get((name, rule), set()) for rule in ("ngram", "aligned")}
        either = set().union(*by_rule.values())
        found[name] = {
            "touched": len(either),
            "touched_by_rule": {rule: len(those) for rule, those in by_rule.items()},
            "touched_share": len(either) / items if items else 0.0,
            "documents": len(documents.get(name, ())),
        }
    return found


def file_hashes(root: Path) -> dict[str, str]:
    """SHA-256 of every file of a corpus but its manifest.json, its cards and an unfinished build."""
    folders = ("documents", "manifest", "tokenized", "tokenizer")
    loose = (
        "corpus.yaml",
        "dropped.jsonl.zst",
        "problems.jsonl",
        "contamination.jsonl",
        "data.yaml",
        "phases.yaml",
    )
    paths = [root / name for name in loose] + [path for name in folders for path in (root / name).glob("*")]
    return {
        path.relative_to(root).as_posix(): sha256_file(path)
        for path in sorted(paths)
        if path.is_file() and path.suffix != ".tmp"
    }


def count_licenses(datasets: Iterable[Dataset]) -> dict[str, dict[str, int]]:
    """Documents and tokens (0 where there are none yet) by the license that the documents state, sorted."""
    documents: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for dataset in datasets:
        for batch in dataset.rows(["license", "num_tokens"]):
            groups = pa.Table.from_batches([batch]).group_by("license")
            for row in groups.aggregate([("license", "count"), ("num_tokens", "sum")]).to_pylist():
                documents[row["license"]] += row["license_count"]
                tokens[row["license"]] += row["num_tokens_sum"] or 0
    return {name: {"documents": documents[name], "tokens": tokens[name]} for name in sorted(documents)}


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Keep other processes from changing a corpus directory until the block ends.

    Raises:
        UserError: one of them is changing it.
    """
    with open(root / ".lock", "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another build is running in {root}: wait for it, or give another output"
            ) from None
        yield


def dataset_of_prefix(prefix: Path | str) -> Dataset | None:
    """The corpus dataset that a prefix of tokenized files belongs to; None where it does not come from a corpus."""
    path = Path(prefix)
    source, dot, split = path.name.rpartition(".")
    dataset = Dataset(source, split, path.parent.parent)
    known = dot and path.parent.name == "tokenized" and dataset.manifest.is_file()
    return dataset if known else None
