"""PREFIX.meta.json: what a tokenized dataset was made from and with. Data from other tools has none."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from meditron_train.errors import UserError

FORMAT = "meditron-train-data/1"
_CHUNK_BYTES = 1 << 24

# What is read from it.
_KEYS: dict[str, type] = {"sha256": str, "special_tokens": list, "tokenizer": dict, "sources": list}
_TOKENIZER_KEYS: dict[str, type] = {"directory": str, "vocab_size": int, "fingerprint": str}
_SOURCE_KEYS: dict[str, type] = {"path": str, "documents": int, "tokens": int}


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
    sources = meta.get("sources")
    wrong = _wrong_keys(meta, _KEYS)
    wrong += [f"tokenizer.{key}" for key in _wrong_keys(meta.get("tokenizer"), _TOKENIZER_KEYS)]
    for source in sources if isinstance(sources, list) else []:
        wrong += [f"sources.{key}" for key in _wrong_keys(source, _SOURCE_KEYS)]
    if wrong:
        raise UserError(
            f"{path} lacks {', '.join(dict.fromkeys(wrong))}, or has another kind of value there: restore it, or "
            "tokenize again."
        )
    return meta


def _wrong_keys(section: Any, kinds: dict[str, type]) -> list[str]:
    """The keys that are missing or hold another kind of value."""
    values = section if isinstance(section, dict) else {}
    return [key for key, kind in kinds.items() if not isinstance(values.get(key), kind)]


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
