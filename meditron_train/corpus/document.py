"""What a reader yields: documents and problems. And the shards that it reads independently of each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Document:
    """One text of a source."""

    id: str
    """Unique within the source and the same in every build: "PMC123456", "PMID:123", the id of a guideline."""
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """JSON values. Where they are known: title, url, license (an SPDX identifier or the publisher's own code), pmid,
    pmcid, doi, version, language (ISO 639-1), date (ISO 8601, perhaps only the year), retracted (bool), is_ocr (bool),
    full_text (bool), kind (article, abstract, book, guideline, text)."""
    removed_chars: Mapping[str, int] = field(default_factory=dict)
    """Characters that rules of the text took out, by rule (see `text.rules.Removed`)."""


class Reason(StrEnum):
    """Why a record became no document, or why a document needs a second look."""

    BROKEN_XML = "broken_xml"
    """Not well-formed. What comes before in the same file is kept, what follows is lost."""
    FORBIDDEN_XML = "forbidden_xml"
    """Declares or uses entities of its own, or nests too deeply: an entity bomb, or what could be one."""
    BROKEN_JSON = "broken_json"
    BROKEN_FILE = "broken_file"
    """An archive, PDF or Parquet file that its library cannot read, or a record without what the format demands."""
    TRUNCATED = "truncated"
    """The compressed file ends early or is damaged."""
    INVALID_UTF8 = "invalid_utf8"
    EMPTY = "empty"
    """No text is left."""
    TOO_LARGE = "too_large"
    DUPLICATE_ID = "duplicate_id"
    """Another record has the same id and is kept instead."""
    UNKNOWN_LICENSE = "unknown_license"
    RETRACTED = "retracted"
    OCR_ONLY = "ocr_only"
    SUPERSEDED = "superseded"
    """A newer version of the same record is kept instead."""
    DELETED = "deleted"
    """The publisher deleted the record in a later file."""
    CHECKSUM = "checksum"
    """The file does not have the checksum that came with it."""
    MISSING = "missing"
    """A file that should be there is not."""

    def __str__(self) -> str:
        return self.value

    @property
    def is_damage(self) -> bool:
        """Whether the input is not what it should be, rather than left out by a rule (such as RETRACTED)."""
        return self in _DAMAGE


_DAMAGE = frozenset(
    (
        *(Reason.BROKEN_XML, Reason.FORBIDDEN_XML, Reason.BROKEN_JSON, Reason.BROKEN_FILE, Reason.TRUNCATED),
        *(Reason.INVALID_UTF8, Reason.TOO_LARGE, Reason.CHECKSUM, Reason.MISSING),
    )
)


@dataclass(frozen=True)
class Problem:
    """A record that became no document, or a document to look at (UNKNOWN_LICENSE): nothing is dropped silently."""

    file: str
    position: str
    """Where in the file: "line 12", "record 3", "page 4", the member of an archive; "" for the whole file."""
    reason: Reason
    detail: str
    id: str = ""
    """Of the document that the record would have become, where it is known."""
    is_record: bool = True
    """One record of the source, and not a file of which nobody knows how many records are lost, or which is absent."""


@dataclass(frozen=True)
class Shard:
    """A unit of work that can be read independently of the others. The order of shards is that of their names."""

    name: str
    paths: tuple[Path, ...]
