"""Which files of a model directory are its tokenizer's, and how they are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from meditron_train.errors import UserError
from meditron_train.files import read_json_object as read_bounded_object

MODEL, JSON, CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"

# Every file from which transformers (4.x or 5.x) or mistral-common builds a tokenizer.
_PATTERNS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.*", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "vocab.bpe", "encoder.json", "spiece.model",
    "sentencepiece*.model", "spm.model", "source.spm", "target.spm", "tekken.json", "*.tiktoken",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
_BESIDE = ("special_tokens_map.json", "added_tokens.json", "chat_template.*", "additional_chat_templates/*")
_MAX_BYTES = 1 << 28  # of one file; the largest known vocabulary (256k tokens) takes 35 MB


def tokenizer_files(directory: str | Path) -> dict[str, Path]:
    """Name (relative, with slashes) -> path of every tokenizer file of a directory, sorted.

    Raises:
        UserError: one of them is not a regular file, or is larger than any tokenizer's.
    """
    found = dict(_named(Path(directory)))
    for path in found.values():
        if not path.is_file():
            raise UserError(f"{path} is not a regular file, as a tokenizer's is")
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(
                f"{path} has {path.stat().st_size:,} bytes: a tokenizer's files have at most {_MAX_BYTES:,}"
            )
    return found


def _named(directory: Path) -> Iterator[tuple[str, Path]]:
    if not directory.is_dir():
        return
    for path in sorted([*directory.iterdir(), *directory.glob("additional_chat_templates/*")]):
        name = path.relative_to(directory).as_posix()
        if any(fnmatch(name, pattern) for pattern in _PATTERNS):
            yield name, path


def has_tokenizer(directory: str | Path) -> bool:
    """Whether the directory holds a tokenizer, readable or not: more than templates and lists of names."""
    return any(not any(fnmatch(name, pattern) for pattern in _BESIDE) for name, _ in _named(Path(directory)))


def is_sentencepiece_alone(directory: str | Path) -> bool:
    """Whether tokenizer.model is all there is, apart from lists of named and added tokens.

    What transformers makes of such a directory depends on its version; 5.x tokenizes every text wrongly.
    """
    names = {name for name, _ in _named(Path(directory))}
    return MODEL in names and all(
        name == MODEL or any(fnmatch(name, pattern) for pattern in _BESIDE) for name in names
    )


def content_digest(directory: str | Path) -> str:
    """Hexadecimal SHA-256 of everything in a directory that decides what its tokenizer means."""
    digest = hashlib.sha256()
    for name, path in tokenizer_files(directory).items():
        content = path.read_bytes()
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    config = _read_if_there(Path(directory) / "config.json")
    keys = ["model_type", "model_name", "tokenizer_class", "auto_map"]
    if "tral" in str(config.get("model_type")):
        keys.append("transformers_version")  # by which transformers recognizes Mistral's wrong pre-tokenizers
    kinds = [config.get(key) for key in keys]
    digest.update(json.dumps([config != {}, *kinds], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a tokenizer.

    Raises:
        UserError: the file does not hold one.
    """
    return read_bounded_object(path, _MAX_BYTES)


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def tokenizer_config(directory: str | Path) -> dict[str, Any]:
    """tokenizer_config.json of a directory; empty without."""
    return _read_if_there(Path(directory) / CONFIG)


def stated_tokens(directory: str | Path) -> dict[str, str | None]:
    """The named tokens (bos_token, …) that tokenizer_config.json or special_tokens_map.json states; None for null."""
    directory = Path(directory)
    stated = {**_read_if_there(directory / "special_tokens_map.json"), **tokenizer_config(directory)}
    found: dict[str, str | None] = {}
    for key, value in stated.items():
        content = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and (content is None or isinstance(content, str)):
            found[key] = content
    return found


def added_token(content: str, number: int, **flags: bool) -> dict[str, Any]:
    """An entry of tokenizer.json's added_tokens; a special token unless flags say otherwise."""
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": content, **usual, **flags}


def stated_added_tokens(directory: str | Path) -> dict[str, tuple[int, dict[str, Any]]]:
    """Token -> (id, flags) that added_tokens.json and tokenizer_config.json put beside the vocabulary.

    Raises:
        UserError: the files do not have that shape, or an id is not an id.
    """
    directory = Path(directory)
    found: dict[str, tuple[int, dict[str, Any]]] = {}
    path = directory / "added_tokens.json"
    for content, number in _read_if_there(path).items():
        if type(number) is not int or not 0 <= number < MAX_ID:
            raise UserError(
                f'{path} must be an object like {{"<pad>": 32000}}; it says {content!r}: {number!r}'
            )
        found[content] = (number, {})
    path = directory / CONFIG
    decoder = tokenizer_config(directory).get("added_tokens_decoder") or {}
    for key, token in decoder.items() if isinstance(decoder, dict) else [("", decoder)]:
        number = int(key) if key.isascii() and key.isdigit() and len(key) < 20 else -1
        text = token.get("content") if isinstance(token, dict) else None
        if not isinstance(text, str) or not 0 <= number < MAX_ID:
            raise UserError(
                f'{path}: added_tokens_decoder must be an object like {{"32000": {{"content": "<pad>"}}}}, with ids '
                f"below {MAX_ID}; it says {key!r}: {token!r}"
            )
        found[text] = (number, token)
    return found


MAX_ID = 1 << 31
