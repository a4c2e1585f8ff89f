"""A directory of guidelines as web pages (.html, .htm) and PDF files.

A shard is so many files, in the order of their paths, which are also the ids. NAME.json beside a file may give its
metadata: title, url, license, date, language.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from meditron_train.config.section import Count
from meditron_train.corpus.document import Document, Problem, Reason, Shard
from meditron_train.corpus.options import NoInputError, ReaderOptions, existing, parse_options
from meditron_train.corpus.record_claims import NO_LOSERS, Claim, Losers
from meditron_train.corpus.text.html import page_text
from meditron_train.corpus.text.pdf import PdfError, pdf_text
from meditron_train.corpus.text.rules import Removed

_HTML, _PDF = (".html", ".htm", ".xhtml"), (".pdf",)
_KNOWN = ("title", "url", "license", "date", "language", "source", "doi")


class Options(ReaderOptions):
    """Of the reader pages."""

    files_per_shard: Count = 200
    source: str | None = None
    """Metadata `source` of all documents, as "who"."""


def shards(options: Mapping[str, Any]) -> list[Shard]:
    """One for each group of files.

    Raises:
        NoInputError: there are no files.
    """
    settings = parse_options(Options, options)
    path = existing(settings.path)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    files = sorted(
        (file for file in files if file.suffix.lower() in (*_HTML, *_PDF)), key=lambda file: file.as_posix()
    )
    if not files:
        raise NoInputError(
            f"there is no file {', '.join('*' + suffix for suffix in (*_HTML, *_PDF))} in {path}"
        )
    size = settings.files_per_shard
    return [Shard(f"{start:08d}", tuple(files[start : start + size])) for start in range(0, len(files), size)]


def sidecars(shard: Shard, options: Mapping[str, Any]) -> Iterator[Path]:
    """Files beside those of the shard that are read with them, where they are there."""
    return (path.with_suffix(".json") for path in shard.paths)


def scan(shard: Shard, options: Mapping[str, Any]) -> Iterator[Claim]:
    """No claims: ids are paths."""
    return iter(())


def read(
    shard: Shard, options: Mapping[str, Any], losers: Losers = NO_LOSERS
) -> Iterator[Document | Problem]:
    """The documents of the files."""
    settings = parse_options(Options, options)
    for path in shard.paths:
        yield _document(path, settings)


def _document(path: Path, options: Options) -> Document | Problem:
    root = options.path if options.path.is_dir() else options.path.parent
    name, removed = path.relative_to(root).as_posix(), Removed()

    def problem(reason: Reason, detail: str) -> Problem:
        return Problem(str(path), "", reason, detail, name)

    try:
        num_bytes = path.stat().st_size
        known = _known(path)
        if path.suffix.lower() in _PDF:
            # Text is a small part of a PDF; it is its amount that counts.
            text, found, empty_pages = pdf_text(path, options.max_record_bytes, options.text, removed)
            if not text and empty_pages:
                return problem(
                    Reason.OCR_ONLY, f"none of {empty_pages} pages has a text; they may be scanned"
                )
        elif num_bytes > options.max_record_bytes:
            return problem(
                Reason.TOO_LARGE, f"{num_bytes} bytes; max_record_bytes is {options.max_record_bytes}"
            )
        else:
            text, found = page_text(path.read_bytes(), known.get("url"), options.text, removed)
    except UnicodeDecodeError as error:
        return problem(Reason.INVALID_UTF8, f"{error.reason} at byte {error.start} ({error.encoding})")
    except PdfError as error:
        return problem(error.reason, str(error))
    except orjson.JSONDecodeError as error:
        described, where = str(path.with_suffix(".json")), f"line {error.lineno}"
        return Problem(described, where, Reason.BROKEN_JSON, str(error), name)
    except OSError as error:
        return problem(Reason.MISSING, f"cannot be read: {error.strerror or error}")
    if not text:
        return problem(Reason.EMPTY, "no text is left")
    source = {"source": options.source} if options.source else {}
    return Document(name, text, {"kind": "guideline", **source, **found, **known}, removed)


def _known(path: Path) -> dict[str, str]:
    """What NAME.json beside the file says."""
    described = path.with_suffix(".json")
    if not described.is_file():
        return {}
    value = orjson.loads(described.read_bytes())
    return {key: str(value[key]) for key in _KNOWN if value.get(key)} if isinstance(value, dict) else {}
