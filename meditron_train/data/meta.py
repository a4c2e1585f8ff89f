"""PREFIX.meta.json: what a tokenized dataset was made from and with. Data from other tools has none."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from meditron_train.errors import UserError

FORMAT = "meditron-train-data/1"
_CHUNK_BYTES = 1 << 24


def meta_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.meta.json")


def ids_path(prefix: Path | str) -> Path:
    """One JSON value (the id in the source, or null) per document and line; absent when no document has an
    id."""
    return Path(f"{prefix}.ids.jsonl")


def read_meta(prefix: Path | str) -> dict[str, Any] | None:
    """The sidecar of a dataset, or None when it has none. UserError when it is not ours."""
    path = meta_path(prefix)
    if not path.is_file():
        return None
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): restore it, or tokenize again.") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise UserError(f"{path} does not have the format {FORMAT!r}: restore it, or tokenize again.")
    return meta


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
