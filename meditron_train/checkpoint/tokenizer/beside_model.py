"""The tokenizer files of a Hugging Face directory: copied as they are, completed where some are missing.

A file that stays true is copied byte for byte. What `tokenizer.model` alone lacks is added, and special tokens are
added in place. The proof: transformers reads source and copy, and the readings are compared.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from meditron_train.checkpoint.tokenizer.chat import template_problems, write_chat_template
from meditron_train.errors import UserError
from meditron_train.log import get_logger
from meditron_train.tokenizer.compare import compare_fingerprints as compare_known_fingerprints
from meditron_train.tokenizer.compare import compare_readings, reading_fingerprint
from meditron_train.tokenizer.complete import missing_files
from meditron_train.tokenizer.files import (
    CONFIG,
    JSON,
    added_token,
    has_tokenizer,
    read_json_object,
    tokenizer_files,
)
from meditron_train.tokenizer.reading import Reading, read_tokenizer
from meditron_train.tokenizer.versions import version_notes

_log = get_logger(__name__)


def copy_tokenizer(
    source: str | Path,
    target: str | Path,
    special_tokens: Sequence[str] = (),
    chat_template: str | None = None,
) -> bool:
    """Write the tokenizer of directory `source` into the existing directory `target`.

    Args:
        source: directory with the tokenizer.
        target: where it is written.
        special_tokens: appended after the vocabulary in this order; those it has already keep their id.
        chat_template: takes the place of those it has; None keeps them.

    Returns:
        False if there is no tokenizer.

    Raises:
        UserError: the tokenizer cannot be read, or transformers would read the copy differently.
    """
    source, target = Path(source), Path(target)
    if not has_tokenizer(source):
        if special_tokens:
            raise UserError(f"{source} has no tokenizer to which {', '.join(special_tokens)} could be added")
        return False
    before = read_tokenizer(source)
    for name, path in tokenizer_files(source).items():
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target / name)
    for name, content in missing_files(source).items():
        _write_json(target / name, content)
    new = [token for token in special_tokens if token not in before.added_tokens]
    if new:
        _add_special_tokens(target, before, new)
    if chat_template is not None:
        write_chat_template(target, chat_template)
    for note in version_notes(target, before):
        _log.warning("%s: %s", source, note)
    if (target / "config.json").is_file() or not (source / "config.json").is_file():
        _prove(source, before, target, new, chat_template)
    return True


def check_tokenizer(directory: str | Path, vocab_size: int) -> None:
    """Check that the directory's tokenizer can be read and fits an embedding of `vocab_size` rows.

    Raises:
        UserError: it cannot be read, or a token has no row.
    """
    if not has_tokenizer(directory):
        return
    reading = read_tokenizer(directory)
    beyond = sorted((number, token) for token, number in reading.vocabulary.items() if number >= vocab_size)
    if beyond:
        number, token = beyond[0]
        raise UserError(
            f"{directory}: the tokenizer has {reading.vocab_size} ids, but the embedding has {vocab_size} rows "
            f"(config.json: vocab_size). The first id without a row is {number} ({token!r}). "
            "Use the tokenizer that belongs to the model, or resize its embedding"
        )


def compare_tokenizers(a: str | Path, b: str | Path) -> list[tuple[str, str]]:
    """What differs between what transformers makes of the tokenizers of two directories: (what, description) pairs,
    none when they mean the same."""
    if has_tokenizer(a) != has_tokenizer(b):
        return [("tokenizer", f"missing in {'A' if has_tokenizer(b) else 'B'}")]
    if not has_tokenizer(a):
        return []
    try:
        return compare_readings(read_tokenizer(a), read_tokenizer(b))
    except UserError as error:
        return [("tokenizer", str(error))]


def tokenizer_fingerprint(directory: str | Path) -> dict[str, Any] | None:
    """What identifies a directory's tokenizer in a manifest: JSON-ready; None without a tokenizer.

    Raises:
        UserError: it cannot be read.
    """
    return reading_fingerprint(read_tokenizer(directory)) if has_tokenizer(directory) else None


def compare_fingerprints(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """(what, description) of each difference between two fingerprints."""
    if a is None or b is None:
        return [] if a is b else [("tokenizer", f"missing in {'A' if a is None else 'B'}")]
    return compare_known_fingerprints(a, b)


def _add_special_tokens(directory: Path, before: Reading, new: Sequence[str]) -> None:
    """Add special tokens to the files that lie in `directory`, and change nothing else in them."""
    ids = dict(before.vocabulary)
    for token in new:
        ids.setdefault(token, 1 + max(ids.values()))
    entries = [added_token(token, ids[token]) for token in new]
    tokenizer, config, added = (directory / name for name in (JSON, CONFIG, "added_tokens.json"))
    if tokenizer.is_file():
        content = read_json_object(tokenizer)
        content["added_tokens"] = sorted(
            [*(content.get("added_tokens") or []), *entries], key=lambda e: e["id"]
        )
        _write_json(tokenizer, content)
    content = read_json_object(config) if config.is_file() else {}
    if "added_tokens_decoder" in content or not tokenizer.is_file():
        decoder = dict(content.get("added_tokens_decoder") or {})
        if not tokenizer.is_file():  # a class adds tokens of its own after those that are named here
            for token, (number, *flags) in before.added_tokens.items():
                decoder.setdefault(str(number), _entry(token, number, flags))
        more = {str(ids[token]): _entry(token, ids[token]) for token in new}
        _write_json(config, {**content, "added_tokens_decoder": {**decoder, **more}})
    if added.is_file():
        _write_json(
            added, {**read_json_object(added), **{entry["content"]: entry["id"] for entry in entries}}
        )


def _entry(token: str, number: int, flags: Sequence[bool] = ()) -> dict[str, Any]:
    """An entry of added_tokens_decoder."""
    names = ("special", "lstrip", "rstrip", "single_word", "normalized")
    entry = added_token(token, number, **dict(zip(names, flags, strict=False)))
    return {key: value for key, value in entry.items() if key != "id"}


def _prove(
    source: Path, before: Reading, target: Path, new: Sequence[str], chat_template: str | None
) -> None:
    after = read_tokenizer(target)
    found = compare_readings(before, after, new)
    if chat_template is not None:
        found = template_problems(after, chat_template, found)
    last = 1 + max(before.vocabulary.values())
    wanted = {}
    for token in new:
        wanted[token] = before.vocabulary.get(token, last)
        last += wanted[token] == last
    found += [
        (token, f"becomes the id {after.vocabulary.get(token)} instead of {number}")
        for token, number in wanted.items()
        if after.vocabulary.get(token) != number or token not in after.added_tokens
    ]
    if found:
        what, message = found[0]
        raise UserError(
            f"{source}: transformers {before.transformers} reads the copy of its tokenizer in another way "
            f"({what}: {message}). {_remedy(before, after, target)}"
        )


def _remedy(before: Reading, after: Reading, target: Path) -> str:
    config = target / "config.json"
    model_type = read_json_object(config).get("model_type") if config.is_file() else None
    if model_type is not None and after.kind != before.kind:
        return (
            f"For a model type {model_type} it takes the class {after.kind} whatever the tokenizer's files say: use "
            f"a tokenizer made for {model_type}, or train the model as another type"
        )
    return "Save the tokenizer with transformers' save_pretrained, and convert again"


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
