"""`corpus remove`: the same corpus without some documents, and what runs have seen of them."""

from __future__ import annotations

import copy
import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from meditron_train.corpus.declaration import load_corpus
from meditron_train.corpus.json_files import json_line, open_zstd, read_json_lines, write_json
from meditron_train.corpus.manifest import DOCUMENTS_SCHEMA, Dataset, FinishedCorpus, locked, touched_items
from meditron_train.corpus.pipeline.index import known_identifiers
from meditron_train.errors import UserError
from meditron_train.flows.corpus.build import finish_corpus
from meditron_train.flows.corpus.runs import Found, who_saw


def read_ids(path: Path) -> list[tuple[str | None, str]]:
    """(source or None, id) of each line of a file: `ID`, or `SOURCE<tab>ID` where several sources have the id.

    Raises:
        UserError: the file cannot be read or holds no ids.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the ids in {path}: {error}") from None
    wanted: list[tuple[str | None, str]] = []
    for line in lines:
        source, tab, doc_id = line.strip().partition("\t")
        if source:
            wanted.append((source, doc_id) if tab else (None, source))
    if not wanted:
        raise UserError(f"{path} holds no ids: write one in each line")
    return wanted


def remove_documents(
    root: Path,
    ids: Path,
    output: Path,
    *,
    runs: Sequence[Path] = (),
    workers: int = 1,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Write a corpus to `output` that has all documents of `root` but those with the ids in the file.

    Where the id is that of a duplicate, the document that stands for it goes, as it is the same text.

    Datasets without any of them are linked, the others written and tokenized again.

    Returns:
        The documents removed (and the duplicates they stood for), the ids that no document has, what each run saw.

    Raises:
        UserError: the output is not empty, or nothing is found.
    """
    finished = FinishedCorpus.open(root)
    wanted = read_ids(ids)
    documents, stood_for = _find(finished, wanted)
    if not documents:
        raise UserError(f"no document of {root} has one of the {len(wanted)} ids in {ids}")
    if output.exists() and (not output.is_dir() or any(path.name != ".lock" for path in output.iterdir())):
        raise UserError(f"{output} is there already and not empty: give another --output")
    corpus = load_corpus(root / "corpus.yaml").model_copy(update={"output": output})
    output.mkdir(parents=True, exist_ok=True)
    with locked(output):
        manifest = _write_without(finished, documents, output)
        write_json(output / "manifest.json", manifest)
    finish_corpus(FinishedCorpus.open(output), corpus, workers=workers, show_progress=show_progress)
    removed = sorted(document.key for document in documents)
    known = {*removed, *(key for keys in stood_for.values() for key in keys)}
    return {
        "corpus": str(output),
        "removed": [_keys_record(key) | _stood_for_record(stood_for[key]) for key in removed],
        "not_found": [doc_id for source, doc_id in wanted if not _is_known(source, doc_id, known)],
        "runs": who_saw(documents, runs),
    }


def _keys_record(key: tuple[str, str]) -> dict[str, Any]:
    return {"id": key[1], "source": key[0]}


def _stood_for_record(keys: list[tuple[str, str]]) -> dict[str, Any]:
    return {"stood_for": [_keys_record(key) for key in keys]} if keys else {}


def _is_known(source: str | None, doc_id: str, known: set[tuple[str, str]]) -> bool:
    if source is not None:
        return (source, doc_id) in known
    return any(other == doc_id for _, other in known)


def _find(
    finished: FinishedCorpus, wanted: list[tuple[str | None, str]]
) -> tuple[list[Found], dict[tuple[str, str], list[tuple[str, str]]]]:
    """The documents to remove; and by source and id of each the wanted duplicates that it stands for."""
    pairs = set(wanted)

    def is_wanted(source: str, doc_id: str) -> bool:
        return (None, doc_id) in pairs or (source, doc_id) in pairs

    duplicates: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for record in finished.duplicates():
        if is_wanted(record["source"], record["id"]):
            duplicates[record["kept_source"], record["kept"]].append((record["source"], record["id"]))
    ids = {doc_id for _, doc_id in (*wanted, *duplicates)}
    documents = [
        Found(dataset, number, row)
        for dataset in finished.datasets
        for number, row in dataset.find("id", ids)
        if is_wanted(row["source"], row["id"]) or (row["source"], row["id"]) in duplicates
    ]
    return documents, {document.key: duplicates[document.key] for document in documents}


def _write_without(finished: FinishedCorpus, documents: list[Found], output: Path) -> dict[str, Any]:
    """All files but the tokenized ones of changed datasets; returns the manifest."""
    gone: dict[str, set[int]] = defaultdict(set)
    for document in documents:
        gone[document.dataset.stem].add(document.number)
    manifest = copy.deepcopy(finished.manifest)
    for folder in ("documents", "manifest", "tokenized", "tokenizer"):
        if (finished.root / folder).is_dir():
            (output / folder).mkdir(exist_ok=True)
    for dataset in finished.datasets:
        target = Dataset(dataset.source, dataset.split, output)
        if len(gone[dataset.stem]) == _num_documents(finished.manifest, dataset):
            continue
        if gone[dataset.stem]:
            _copy_without(dataset, target, gone[dataset.stem])
        else:
            for folder in ("documents", "manifest", "tokenized"):
                for path in (finished.root / folder).glob(f"{dataset.stem}.*"):
                    if path.is_file():
                        _link(path, output / folder / path.name)
    for path in (finished.root / "tokenizer").glob("*"):
        _link(path, output / "tokenizer" / path.name)
    _link(finished.root / "problems.jsonl", output / "problems.jsonl")
    removed = {document.key for document in documents}
    with open(output / "contamination.jsonl", "wb") as file:
        for hit in read_json_lines(finished.root / "contamination.jsonl"):
            if hit["removed"] or (hit["source"], hit["id"]) not in removed:
                file.write(json_line(hit))
    num_items = {benchmark["name"]: benchmark["items"] for benchmark in manifest["benchmarks"]}
    touched = touched_items(output / "contamination.jsonl", num_items)
    manifest["benchmarks"] = [benchmark | touched[benchmark["name"]] for benchmark in manifest["benchmarks"]]
    with open_zstd(output / "dropped.jsonl.zst") as file:
        for record in read_json_lines(finished.root / "dropped.jsonl.zst"):
            file.write(json_line(record))
        for document in documents:
            record = {"id": document.row["id"], "source": document.row["source"], "rule": "removed"}
            file.write(json_line(record | known_identifiers(document.row)))
    for document in documents:
        _uncount(manifest, document)
    # Not what a build of the declaration would give: it must not be taken for that, nor for another removal.
    keys = "".join(f"{source}\0{doc_id}\n" for source, doc_id in sorted(removed))
    manifest["fingerprint"] += f" without {sha256(keys.encode()).hexdigest()}"
    return manifest


def _num_documents(manifest: dict[str, Any], dataset: Dataset) -> int:
    source = next(source for source in manifest["sources"] if source["name"] == dataset.source)
    return int(source["splits"][dataset.split]["documents"])


def _uncount(manifest: dict[str, Any], document: Found) -> None:
    source = next(source for source in manifest["sources"] if source["name"] == document.dataset.source)
    counts, row = source["splits"][document.dataset.split], document.row
    counts["documents"] -= 1
    counts["chars"] -= row["num_chars"]
    counts["bytes"] -= row["num_bytes"]
    if "tokens" in counts:
        counts["tokens"] -= row["num_tokens"]
    source["dropped"]["removed"] = source["dropped"].get("removed", 0) + 1


def _copy_without(dataset: Dataset, target: Dataset, gone: set[int]) -> None:
    with open_zstd(target.documents) as file:
        for number, record in enumerate(read_json_lines(dataset.documents)):
            if number not in gone:
                file.write(json_line(record))
    first = 0
    with pq.ParquetWriter(target.manifest, DOCUMENTS_SCHEMA) as writer:
        for batch in dataset.rows():
            kept = pa.array(number not in gone for number in range(first, first + batch.num_rows))
            writer.write_batch(batch.filter(kept))
            first += batch.num_rows


def _link(path: Path, target: Path) -> None:
    """A second name for a file that is never changed in place; a copy where the file system has none."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)
