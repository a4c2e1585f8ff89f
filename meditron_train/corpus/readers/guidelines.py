"""Guidelines as JSON lines with the fields of the public set epfl-llm/guidelines.

Fields: id, source, title, clean_text, raw_text, url, overview. The text is clean_text, or raw_text where that is empty,
under its title. A shard is a file; a later guideline with the same id replaces an earlier one, see `record_claims`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from meditron_train.corpus.document import Document, Problem, Reason, Shard
from meditron_train.corpus.options import ReaderOptions, parse_options
from meditron_train.corpus.record_claims import NO_LOSERS, Claim, Losers, text_digest
from meditron_train.corpus.records import JSON_SUFFIXES, Record, file_shards, read_records
from meditron_train.corpus.text.rules import BLANK, Removed, finish, plain_title, with_marks

_KEYS = ("id", "source", "title", "clean_text", "raw_text", "url", "overview")


class Options(ReaderOptions):
    """Of the reader guidelines."""

    overview: bool = False
    """The overview, where there is one, stands between title and text."""


def shards(options: Mapping[str, Any]) -> list[Shard]:
    """One for each file."""
    return file_shards(parse_options(Options, options).path, (*JSON_SUFFIXES, ".parquet"))


def scan(shard: Shard, options: Mapping[str, Any]) -> Iterator[Claim]:
    """The id of each guideline that has one, and a text."""
    settings = parse_options(Options, options)
    for record in read_records(shard.paths[0], settings.max_record_bytes, _KEYS):
        if isinstance(record, Record) and (number := record.value.get("id")) and _source_text(record).strip():
            yield Claim(str(number), record.position, digest=text_digest(_source_text(record)))


def read(
    shard: Shard, options: Mapping[str, Any], losers: Losers = NO_LOSERS
) -> Iterator[Document | Problem]:
    """The guidelines of a file."""
    settings = parse_options(Options, options)
    for record in read_records(shard.paths[0], settings.max_record_bytes, _KEYS):
        yield record if isinstance(record, Problem) else _document(record, shard, settings, losers)


def _source_text(record: Record) -> str:
    return str(record.value.get("clean_text") or record.value.get("raw_text") or "")


def _document(record: Record, shard: Shard, options: Options, losers: Losers) -> Document | Problem:
    if "clean_text" not in record.value and "raw_text" not in record.value:
        return record.problem(Reason.BROKEN_FILE, "has neither clean_text nor raw_text")
    name = str(record.value.get("id") or f"{shard.name}:{record.position + 1}")
    if loss := losers.get(record.position):
        return record.problem(loss.reason, f"{name}: {loss}", name)
    source_text, title = _source_text(record), str(record.value.get("title") or "")
    if not source_text.strip():
        return record.problem(Reason.EMPTY, f"{name} has no text", name)
    first_line, _, rest = source_text.strip().partition("\n")
    heading = title
    if title and plain_title(first_line) == plain_title(title):
        heading, source_text = first_line, rest
    parts = [heading if options.text.title else ""]
    parts += [str(record.value.get("overview") or "") if options.overview else "", source_text]
    removed = Removed()
    text = finish(BLANK.join(with_marks(part) for part in parts if part), options.text, removed)
    if not text:
        return record.problem(Reason.EMPTY, f"{name} has no text", name)
    found = {"kind": "guideline", "title": title, **{key: record.value.get(key) for key in ("source", "url")}}
    return Document(name, text, {key: value for key, value in found.items() if value}, removed)
