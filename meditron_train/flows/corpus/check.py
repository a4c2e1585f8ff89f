"""`corpus check`: is a corpus what it was built as, what has been retracted since, does it contain benchmarks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from meditron_train.corpus.declaration import Benchmark, load_corpus
from meditron_train.corpus.document import Problem
from meditron_train.corpus.json_files import read_json_lines
from meditron_train.corpus.manifest import FinishedCorpus
from meditron_train.corpus.retractions import Retraction, read_retractions
from meditron_train.files import sha256_file
from meditron_train.flows.corpus.runs import Found, who_saw


def check_corpus(
    root: Path,
    *,
    retractions: Sequence[Path] = (),
    benchmarks: Sequence[Benchmark] = (),
    runs: Sequence[Path] = (),
) -> dict[str, Any]:
    """Compare all files with their hashes, look for documents that the files `retractions` call retracted or deleted,
    and for the items of further benchmarks; and say which steps of `runs` saw the documents found.

    `ok` in the report is whether nothing was found, and all of `retractions` could be read.
    """
    finished = FinishedCorpus.open(root)
    hashes = changed_files(finished)
    stated = [item for path in retractions for item in read_retractions(path)]
    unread = [asdict(item) for item in stated if isinstance(item, Problem)]
    retracted = find_retracted(finished, (item for item in stated if isinstance(item, Retraction)))
    contaminated, hits = find_contaminated(finished, benchmarks)
    return {
        "corpus": str(root),
        "changed_files": hashes,
        "recorded_contamination": finished.manifest["benchmarks"],
        "flagged_documents": _num_flagged(finished),
        "contamination": hits,
        "retracted": [document.row | {"why": document.why} for document in map(_readable, retracted)],
        "problems": unread,
        "runs": who_saw(retracted + contaminated, runs) if retracted or contaminated else [],
        "ok": not (hashes or retracted or hits or unread),
    }


def changed_files(finished: FinishedCorpus) -> list[dict[str, str]]:
    """Files that are missing or do not have the hash of the manifest."""
    problems = []
    for name, recorded in finished.manifest["files"].items():
        path = finished.root / name
        if not path.is_file():
            problems.append({"file": name, "problem": "missing"})
        elif sha256_file(path) != recorded:
            problems.append({"file": name, "problem": "changed"})
    return problems


def find_retracted(finished: FinishedCorpus, retractions: Iterable[Retraction]) -> list[Found]:
    """The documents with an identifier of a retracted article, and those that stand for a duplicate with one."""
    by_kind: dict[str, dict[str, Retraction]] = defaultdict(dict)
    for retraction in retractions:
        by_kind[retraction.kind].setdefault(retraction.value, retraction)
    found: dict[tuple[str, str, int], Found] = {}
    for dataset in finished.datasets:
        for kind, known in by_kind.items():
            for number, row in dataset.find(kind, known):
                retraction = known[row[kind]]
                why = f"{retraction.what} according to {retraction.file}"
                found.setdefault((dataset.source, dataset.split, number), Found(dataset, number, row, why))
    stand_ins = _stand_ins(finished, by_kind) if by_kind else {}
    for dataset in finished.datasets:
        ids = [doc_id for source, doc_id in stand_ins if source == dataset.source]
        for number, row in dataset.find("id", ids):
            why = stand_ins[dataset.source, row["id"]]
            found.setdefault((dataset.source, dataset.split, number), Found(dataset, number, row, why))
    return list(found.values())


def _stand_ins(
    finished: FinishedCorpus, by_kind: Mapping[str, Mapping[str, Retraction]]
) -> dict[tuple[str, str], str]:
    """Source and id of the documents that stand for a retracted duplicate, and why they are reported."""
    found: dict[tuple[str, str], str] = {}
    for record in finished.duplicates():
        for kind, known in by_kind.items():
            if retraction := known.get(record.get(kind, "")):
                what = f"stands for {record['source']} {record['id']}, {retraction.what}"
                key = (record["kept_source"], record["kept"])
                found.setdefault(key, f"{what} according to {retraction.file}")
    return found


def find_contaminated(
    finished: FinishedCorpus, benchmarks: Sequence[Benchmark]
) -> tuple[list[Found], list[dict[str, Any]]]:
    """The documents that contain items of these benchmarks, by the rules of the declaration, and every hit."""
    if not benchmarks:
        return [], []
    from meditron_train.corpus.pipeline.contamination import BenchmarkIndex

    rules = load_corpus(finished.root / "corpus.yaml").decontamination
    index = BenchmarkIndex(rules.model_copy(update={"benchmarks": tuple(benchmarks)}))
    documents, hits = [], []
    for dataset in finished.datasets:
        for number, record in enumerate(read_json_lines(dataset.documents)):
            found = index.find(record["text"])
            if found:
                documents.append(Found(dataset, number, dataset.row(number), "contains benchmark items"))
                hits += [{"id": record["id"], "source": record["source"], **asdict(hit)} for hit in found]
    return documents, hits


def _num_flagged(finished: FinishedCorpus) -> int:
    return sum(
        batch.column("contaminated").true_count
        for dataset in finished.datasets
        for batch in dataset.rows(["contaminated"])
    )


def _readable(document: Found) -> Found:
    row = {**document.row, "sha256": document.row["sha256"].hex()}
    return Found(document.dataset, document.number, row, document.why)
