"""JSON lines (also .gz and .zst) and Parquet, for replay and for your own texts.

A shard is a file. With `id_key` a later record with the same id replaces an earlier one, see `record_claims`;
without it a document is named by file and line, and nothing can clash. The text is kept as it is, but for literal
occurrences of the special tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field

from meditron_train.corpus.document import Document, Problem, Reason, Shard
from meditron_train.corpus.options import ReaderOptions, parse_options
from meditron_train.corpus.record_claims import NO_LOSERS, Claim, Losers, text_digest
from meditron_train.corpus.records import JSON_SUFFIXES, Record, file_shards, read_records
from meditron_train.corpus.text.rules import without_tokens


class Options(ReaderOptions):
    """Of the reader jsonl."""

    text_key: str = "text"
    id_key: str | None = None
    metadata: dict[str, str] = Field(default_factory=dict)
    """Metadata of the document: name -> key of the record, as {url: link}."""
    is_marked: bool = False
    """The texts come from such a pipeline, and their special tokens stay. By default "[table]" becomes "(table)"."""


def shards(options: Mapping[str, Any]) -> list[Shard]:
    """One for each file."""
    return file_shards(parse_options(Options, options).path, (*JSON_SUFFIXES, ".parquet"))


def scan(shard: Shard, options: Mapping[str, Any]) -> Iterator[Claim]:
    """The id of each record with a text; none without id_key."""
    settings = parse_options(Options, options)
    if settings.id_key is None:
        return
    for record in read_records(
        shard.paths[0], settings.max_record_bytes, (settings.text_key, settings.id_key)
    ):
        if isinstance(record, Problem):
            continue
        text, number = record.value.get(settings.text_key), record.value.get(settings.id_key)
        if isinstance(text, str) and text.strip() and number is not None:
            yield Claim(str(number), record.position, digest=text_digest(text))


def read(
    shard: Shard, options: Mapping[str, Any], losers: Losers = NO_LOSERS
) -> Iterator[Document | Problem]:
    """The documents of a file."""
    settings = parse_options(Options, options)
    keys = [settings.text_key, *settings.metadata.values(), *([settings.id_key] if settings.id_key else [])]
    for record in read_records(shard.paths[0], settings.max_record_bytes, keys):
        yield record if isinstance(record, Problem) else _document(record, shard, settings, losers)


def _document(record: Record, shard: Shard, options: Options, losers: Losers) -> Document | Problem:
    text = record.value.get(options.text_key)
    if not isinstance(text, str):
        detail = (
            f"{options.text_key!r} is not text; the keys are {', '.join(map(repr, list(record.value)[:8]))}"
        )
        return record.problem(Reason.BROKEN_FILE, detail)
    name = f"{shard.name}:{record.position + 1}"
    if options.id_key is not None:
        if record.value.get(options.id_key) is None:
            return record.problem(Reason.BROKEN_FILE, f"there is no {options.id_key!r}")
        name = str(record.value[options.id_key])
    if loss := losers.get(record.position):
        return record.problem(loss.reason, f"{name}: {loss}", name)
    if not text.strip():
        return record.problem(Reason.EMPTY, f"{name} has no text", name)
    found = {name: record.value.get(key) for name, key in options.metadata.items()}
    return Document(
        name,
        text if options.is_marked else without_tokens(text),
        {"kind": "text", **{key: _json(value) for key, value in found.items() if value is not None}},
    )


def _json(value: Any) -> Any:
    """Dates of Parquet and the like as text, in lists and structures as well."""
    if isinstance(value, dict):
        return {str(key): _json(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(part) for part in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
