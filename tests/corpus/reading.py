"""How tests read a source: all steps, as a build takes them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from meditron_train.corpus.document import Document, Problem
from meditron_train.corpus.record_claims import load_losers, resolve, write_claims

FIXTURES = Path(__file__).parent / "fixtures"


def read_source(
    reader: ModuleType, path: Path, backwards: bool = False, **options: Any
) -> tuple[list[Document], list[Problem]]:
    """Documents and problems of all shards in their order; backwards: the shards are read in the opposite order."""
    given = {"path": str(path), **options}
    shards = reader.shards(given)
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        claims = [work / f"{number}.claims" for number in range(len(shards))]
        for shard, target in zip(shards, claims, strict=True):
            write_claims(target, reader.scan(shard, given))
        (work / "losers").mkdir()
        resolve(claims, shards, work / "losers")
        items: dict[int, list[Document | Problem]] = {}
        for number in sorted(range(len(shards)), reverse=backwards):
            items[number] = list(reader.read(shards[number], given, load_losers(work / "losers", number)))
    found = [item for number in range(len(shards)) for item in items[number]]
    documents = [item for item in found if isinstance(item, Document)]
    return documents, [item for item in found if isinstance(item, Problem)]


def said(problems: list[Problem]) -> list[str]:
    """File name, position and reason of each problem."""
    return [f"{Path(problem.file).name} | {problem.position} | {problem.reason}" for problem in problems]


def expected(name: str) -> str:
    """A text that was written by hand."""
    return (FIXTURES / "expected" / name).read_text(encoding="utf-8").removesuffix("\n")
