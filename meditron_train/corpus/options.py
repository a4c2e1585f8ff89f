"""The options that every reader has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from meditron_train.config.section import Count, Section
from meditron_train.corpus.text.rules import TextRules
from meditron_train.errors import UserError

_Options = TypeVar("_Options", bound="ReaderOptions")


class NoInputError(UserError):
    """The path of a source holds nothing that its reader reads."""


class ReaderOptions(Section):
    """Base of the options of a reader."""

    path: Path
    """File or directory."""
    max_record_bytes: Count = 16 << 20
    """A larger article, citation, line or page is reported as too_large and left out. An article takes about twelve
    times as much memory."""
    text: TextRules = TextRules()


def parse_options(kind: type[_Options], options: Mapping[str, Any]) -> _Options:
    """The options of a reader.

    Raises:
        UserError: lists everything wrong in them.
    """
    try:
        return kind.model_validate(options)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
        raise UserError(f"options of the source {options.get('path', '')}: {'; '.join(problems)}") from None


def existing(path: Path) -> Path:
    """The path, which must exist.

    Raises:
        UserError: it does not.
    """
    if not path.exists():
        raise UserError(f"there is no file or directory {path}")
    return path
