"""The chat template in a copied tokenizer, and the token that ends an answer in its generation settings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meditron_train.errors import UserError
from meditron_train.files import read_json_object as read_bounded_object
from meditron_train.tokenizer.files import CONFIG, read_json_object
from meditron_train.tokenizer.reading import Reading, read_tokenizer

_MAX_BYTES = 1 << 20  # of generation_config.json


@dataclass(frozen=True)
class ChatFormat:
    """How the exported model talks.

    Attributes:
        template: of the chat, in Jinja.
        end_token: with it an answer ends, so that generation stops there.
    """

    template: str
    end_token: str


def write_chat_template(directory: Path, template: str) -> None:
    """Make `template` the only chat template of the tokenizer in `directory`."""
    for path in [*directory.glob("chat_template.*"), *directory.glob("additional_chat_templates/*")]:
        path.unlink()
    config = directory / CONFIG
    content = read_json_object(config) if config.is_file() else {}
    if "chat_template" in content:
        del content["chat_template"]
        config.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def template_problems(reading: Reading, template: str, found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those of the differences `found` that remain when `template` is meant to take the place of what was there."""
    rest = [(what, text) for what, text in found if not what.startswith("chat_template")]
    names = {name: source for name, (source, *_) in reading.templates.items()}
    return rest if names == {"default": template} else [*rest, ("chat_template", "it is not the one written")]


def add_end_token(directory: Path, end_token: str) -> None:
    """Let generation_config.json in `directory` stop at `end_token` too.

    Raises:
        UserError: the directory's tokenizer has no such token.
    """
    number = read_tokenizer(directory).vocabulary.get(end_token)
    if number is None:
        raise UserError(f"{directory}: the tokenizer has no token {end_token!r}, with which an answer ends")
    path = directory / "generation_config.json"
    settings: dict[str, Any] = read_bounded_object(path, _MAX_BYTES)
    known = settings.get("eos_token_id")
    ends = known if isinstance(known, list) else [] if known is None else [known]
    settings["eos_token_id"] = [*ends, *([number] if number not in ends else [])]
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
