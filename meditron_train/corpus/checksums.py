"""Checksums that publishers deliver with their files."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from meditron_train.corpus.document import Problem, Reason

_MD5 = re.compile(r"\b[0-9a-fA-F]{32}\b")
_CHUNK_BYTES = 1 << 20


def md5_file(path: Path) -> str:
    """MD5 of a file's content, hexadecimal."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def checksum_path(path: Path) -> Path:
    """Where the checksum of a file would be."""
    return path.with_name(path.name + ".md5")


def checksum_problem(path: Path) -> Problem | None:
    """What NAME.md5 beside a file has against it; None where they agree, and where there is no such file."""
    stated_in = checksum_path(path)
    if not stated_in.is_file():
        return None
    match = _MD5.search(stated_in.read_text(encoding="utf-8", errors="replace"))
    if match is None:
        detail = "contains no MD5 checksum; copy it again"
        return Problem(str(stated_in), "", Reason.BROKEN_FILE, detail, is_record=False)
    found = md5_file(path)
    if found == match.group().lower():
        return None
    detail = f"has the MD5 checksum {found}, but {stated_in.name} says {match.group().lower()}; copy it again"
    return Problem(str(path), "", Reason.CHECKSUM, detail, is_record=False)
