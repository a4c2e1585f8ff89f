"""Which articles newer files say are retracted or deleted: MEDLINE citation files, or PMC's metadata JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meditron_train.corpus.document import Problem
from meditron_train.corpus.json_files import read_json_lines
from meditron_train.corpus.pipeline.index import identifiers
from meditron_train.errors import UserError


@dataclass(frozen=True)
class Retraction:
    """An article, by one of its identifiers (pmid, pmcid or doi), and what happened to it."""

    kind: str
    value: str
    what: str
    file: str


def read_retractions(path: Path) -> Iterator[Retraction | Problem]:
    """Of a .xml or .xml.gz file of MEDLINE, a .json or .jsonl file of PMC metadata, or a directory of such files.

    Damage to the files comes as problems: what they hide is not known.

    Raises:
        UserError: the path is anything else.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _kind(file))
        if not files:
            raise UserError(
                f"{path} holds neither MEDLINE files (.xml, .xml.gz) nor PMC metadata (.json, .jsonl)"
            )
        for file in files:
            yield from read_retractions(file)
    elif not path.is_file():
        raise UserError(f"there is no file {path}")
    elif _kind(path) == "medline":
        yield from _medline(path)
    elif _kind(path) == "pmc":
        yield from _pmc(path)
    else:
        raise UserError(f"{path}: expected a MEDLINE file (.xml, .xml.gz) or PMC metadata (.json, .jsonl)")


def _kind(path: Path) -> str | None:
    if path.name.endswith((".xml", ".xml.gz")):
        return "medline"
    return "pmc" if path.name.endswith((".json", ".jsonl", ".jsonl.zst")) else None


def _medline(path: Path) -> Iterator[Retraction | Problem]:
    import meditron_train.corpus.readers.medline as medline

    options = {"path": str(path), "keep_retracted": True, "require_abstract": False}
    for shard in medline.shards(options):
        for claim in medline.scan(shard, options):
            if claim.deletes:
                yield Retraction("pmid", str(claim.key), "deleted", str(path))
        for item in medline.read(shard, options):
            if isinstance(item, Problem):
                if item.reason.is_damage:
                    yield item
            elif item.metadata.get("retracted"):
                yield from _of(item.metadata, "retracted", path)


def _pmc(path: Path) -> Iterator[Retraction]:
    records: Any = read_json_lines(path)
    try:
        if path.suffix == ".json":
            stored = json.loads(path.read_bytes())
            records = stored if isinstance(stored, list) else [stored]
        for record in records:
            if isinstance(record, dict) and record.get("is_retracted") is True:
                yield from _of(record, "retracted", path)
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from error


def _of(metadata: Any, what: str, path: Path) -> Iterator[Retraction]:
    for kind, value in identifiers(dict(metadata)).items():
        if value:
            yield Retraction(kind, value, what, str(path))
