"""PREFIX.meta.json: what a tokenized dataset was made from and with. Data from other tools has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from meditron_train.errors import UserError
from meditron_train.files import read_json

FORMAT = "meditron-train-data/1"
_MAX_BYTES = 256 << 20  # it has an entry for each source file

# What is read from it.
_KEYS: dict[str, type] = {"sha256": str, "special_tokens": list, "tokenizer": dict, "sources": list}
_CHAT_KEYS: dict[str, type] = {
    "template": str,
    "template_sha256": str,
    "loss_tokens": int,
    "loss_mask_sha256": str,
}
_TOKENIZER_KEYS: dict[str, type] = {"directory": str, "vocab_size": int, "fingerprint": str}
_SOURCE_KEYS: dict[str, type] = {"path": str, "documents": int, "tokens": int}


def meta_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.meta.json")


def ids_path(prefix: Path | str) -> Path:
    """One JSON value (the id in the source, or null) per document and line; absent when no document has an
    id."""
    return Path(f"{prefix}.ids.jsonl")


def loss_mask_path(prefix: Path | str) -> Path:
    """A byte for each token, in the order of the .bin: 1 for the assistant's; absent where there are no
    conversations."""
    return Path(f"{prefix}.loss_mask.bin")


def read_meta(prefix: Path | str) -> dict[str, Any] | None:
    """The sidecar of a dataset; None when it has none.

    Raises:
        UserError: the sidecar is not ours.
    """
    path = meta_path(prefix)
    if not path.is_file():
        return None
    try:
        meta = read_json(path, _MAX_BYTES)
    except UserError as error:
        raise UserError(f"{error}; restore it, or tokenize again") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise UserError(f"{path} does not have the format {FORMAT!r}: restore it, or tokenize again")
    sources = meta.get("sources")
    wrong = _wrong_keys(meta, _KEYS)
    wrong += [f"tokenizer.{key}" for key in _wrong_keys(meta.get("tokenizer"), _TOKENIZER_KEYS)]
    if "chat" in meta:  # of conversations alone
        wrong += [f"chat.{key}" for key in _wrong_keys(meta["chat"], _CHAT_KEYS)]
    for source in sources if isinstance(sources, list) else []:
        wrong += [f"sources.{key}" for key in _wrong_keys(source, _SOURCE_KEYS)]
    if wrong:
        raise UserError(
            f"{path} lacks {', '.join(dict.fromkeys(wrong))}, or has another kind of value there: restore it, or "
            "tokenize again"
        )
    return meta


def _wrong_keys(section: Any, kinds: dict[str, type]) -> list[str]:
    """The keys that are missing or hold another kind of value."""
    values = section if isinstance(section, dict) else {}
    return [key for key, kind in kinds.items() if not isinstance(values.get(key), kind)]
