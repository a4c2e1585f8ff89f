"""What a Hugging Face directory holds beside the weights: config.json, tokenizer, generation settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meditron_train.checkpoint.hf.config import generation_config_of, model_config_to_hf
from meditron_train.checkpoint.tokenizer.beside_model import check_tokenizer, copy_tokenizer
from meditron_train.checkpoint.tokenizer.chat import ChatFormat, add_end_token
from meditron_train.config.model_config import ModelConfig
from meditron_train.errors import UserError
from meditron_train.files import read_json_object

HF_SUBDIRECTORY = "hf"


def write_hf_files(
    directory: Path,
    model: ModelConfig,
    source: Path | None = None,
    special_tokens: Sequence[str] = (),
    chat: ChatFormat | None = None,
    *,
    generation_from: Path | None = None,
) -> None:
    """Write all that a Hugging Face directory holds beside the weights into the existing `directory`.

    Args:
        directory: where to write.
        model: becomes config.json.
        source: directory whose tokenizer files and generation_config.json are copied, as far as it has them
            (else a minimal generation_config.json is written).
        special_tokens: appended to the tokenizer.
        chat: the chat template that the tokenizer gets, and the token at which generation stops.
        generation_from: directory whose generation_config.json is copied where `source` has none.

    Raises:
        UserError: a file of `source` is damaged, or a token of the tokenizer that is written has no row in the
            model's embedding.
    """
    with_generation = [
        place
        for place in (source, generation_from)
        if place is not None and read_generation_config(place) is not None
    ]
    config = json.dumps(model_config_to_hf(model), indent=2) + "\n"
    (directory / "config.json").write_text(config, encoding="utf-8")
    generation = directory / "generation_config.json"
    if with_generation:
        copy_generation_config(with_generation[0], directory)
    else:
        generation.write_text(json.dumps(generation_config_of(model), indent=2) + "\n", encoding="utf-8")
    if source is not None:
        copy_tokenizer(source, directory, special_tokens, chat.template if chat else None)
    if chat is not None:
        add_end_token(directory, chat.end_token)
    if special_tokens:
        check_tokenizer(directory, model.vocab_size)


def copy_generation_config(source: Path, directory: Path) -> bool:
    """Copy generation_config.json, and say whether there is one."""
    path = source / "generation_config.json"
    if path.is_file():
        shutil.copyfile(path, directory / path.name)
    return path.is_file()


def read_generation_config(directory: Path) -> dict[str, Any] | None:
    """generation_config.json of the directory; None when there is none.

    Raises:
        UserError: transformers could not read it.
    """
    path = directory / "generation_config.json"
    return read_json_object(path) if path.is_file() else None


def end_token_ids(directory: Path) -> frozenset[int]:
    """Tokens at which transformers ends a text: those of generation_config.json, else of config.json.

    Raises:
        UserError: a file cannot be read, or has something else in their place.
    """
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        said = read_json_object(path).get("eos_token_id") if path.is_file() else None
        if said is None:
            continue
        ends = said if isinstance(said, list) else [said]
        if not all(type(end) is int for end in ends):
            raise UserError(f"{path}: eos_token_id is {said!r}; it must be an id or a list of ids")
        return frozenset(ends)
    return frozenset()
