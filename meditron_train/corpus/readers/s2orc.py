"""S2ORC v1: JSON lines (.gz) of papers with their text and annotations of it by offsets.

A shard is a file; a later record of the same corpusid replaces an earlier one, see `record_claims`. The license is
the paper's own where oainfo states one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from meditron_train.corpus.document import Document, Problem, Reason, Shard
from meditron_train.corpus.licenses import s2orc_license
from meditron_train.corpus.options import ReaderOptions, parse_options
from meditron_train.corpus.record_claims import NO_LOSERS, Claim, Losers, text_digest
from meditron_train.corpus.records import JSON_SUFFIXES, Record, file_shards, read_records
from meditron_train.corpus.text.rules import Removed
from meditron_train.corpus.text.s2orc import AnnotationError, paper_text, paper_title


class Options(ReaderOptions):
    """Of the reader s2orc."""


def shards(options: Mapping[str, Any]) -> list[Shard]:
    """One for each file."""
    return file_shards(parse_options(Options, options).path, JSON_SUFFIXES)


def scan(shard: Shard, options: Mapping[str, Any]) -> Iterator[Claim]:
    """The corpusid of each paper with a text."""
    settings = parse_options(Options, options)
    for record in read_records(shard.paths[0], settings.max_record_bytes):
        if (
            isinstance(record, Record)
            and isinstance(number := record.value.get("corpusid"), int)
            and number >= 0
            and (text := _content(record).get("text") or "").strip()
        ):
            yield Claim(number, record.position, digest=text_digest(text))


def read(
    shard: Shard, options: Mapping[str, Any], losers: Losers = NO_LOSERS
) -> Iterator[Document | Problem]:
    """The papers of a file."""
    settings = parse_options(Options, options)
    for record in read_records(shard.paths[0], settings.max_record_bytes):
        yield record if isinstance(record, Problem) else _document(record, settings, losers)


def _content(record: Record) -> dict[str, Any]:
    content = record.value.get("content")
    return content if isinstance(content, dict) and isinstance(content.get("text") or "", str) else {}


def _document(record: Record, options: Options, losers: Losers) -> Document | Problem:
    number = record.value.get("corpusid")
    if not isinstance(number, int) or number < 0:
        return record.problem(Reason.BROKEN_FILE, f"corpusid is {number!r}; a number is needed")
    name = f"S2:{number}"
    if loss := losers.get(record.position):
        return record.problem(loss.reason, f"{name}: {loss}", name)
    content = _content(record)
    if not (content.get("text") or "").strip():
        return record.problem(Reason.EMPTY, f"{name} has no text", name)
    try:
        title = str(record.value.get("title") or "") or paper_title(content)
        removed = Removed()
        text = paper_text(content, title, options.text, removed)
    except AnnotationError as error:
        return record.problem(Reason.BROKEN_FILE, f"{name}: {error}", name)
    if not text:
        return record.problem(Reason.EMPTY, f"{name} has no text", name)
    return Document(name, text, _metadata(record, content, number, title), removed)


def _metadata(record: Record, content: Mapping[str, Any], number: int, title: str) -> dict[str, Any]:
    ids = record.value.get("externalids") or {}
    ids = {key.lower(): str(value) for key, value in ids.items() if value} if isinstance(ids, dict) else {}
    source = content.get("source")
    access = source.get("oainfo") if isinstance(source, dict) else None
    code = access.get("license") if isinstance(access, dict) else None
    pmcid = ids.get("pubmedcentral", "").upper().removeprefix("PMC")
    found = {
        "kind": "article",
        "title": title,
        "url": f"https://api.semanticscholar.org/CorpusID:{number}",
        "doi": ids.get("doi", "").lower(),
        "pmid": ids.get("pubmed"),
        "pmcid": f"PMC{pmcid}" if pmcid else None,
        "license": s2orc_license(code) if isinstance(code, str) and code.strip() else None,
        "license_code": code,
        "full_text": True,
    }
    return {key: value for key, value in found.items() if value}
