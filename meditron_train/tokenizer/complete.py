"""The files that a tokenizer directory lacks for transformers 4.x and 5.x to read it alike.

For `tokenizer.model` alone these are: a `tokenizer.json` whose normalizer prepends and replaces spaces (Metaspace, as
5.x writes it, gets leading spaces wrong), checked against sentencepiece on probe texts, and a `tokenizer_config.json`
whose class reads tokenizer.json as it stands (of LlamaTokenizer, 5.x rebuilds the normalizer).
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

from meditron_train.errors import UserError
from meditron_train.tokenizer.bounded import ask
from meditron_train.tokenizer.files import (
    CONFIG,
    JSON,
    MODEL,
    content_digest,
    is_sentencepiece_alone,
    stated_tokens,
    tokenizer_files,
)


def missing_files(directory: str | Path) -> dict[str, dict[str, Any]]:
    """The JSON files to add to a copy of a directory's tokenizer files: name -> content; empty when nothing
    is missing.

    Raises:
        UserError: no tokenizer.json gives the ids that sentencepiece gives, or those that are stated.
    """
    directory = Path(directory)
    if is_sentencepiece_alone(directory):
        return json.loads(_beside_sentencepiece(content_digest(directory), directory))
    names = tokenizer_files(directory)
    if JSON in names and CONFIG not in names and not (directory / "config.json").is_file():
        return {CONFIG: {**stated_tokens(directory), "tokenizer_class": "PreTrainedTokenizerFast"}}
    return {}


def sentencepiece_backend(directory: Path) -> dict[str, Any]:
    """The tokenizer.json of a directory that has tokenizer.model alone.

    Raises:
        UserError: as `missing_files`.
    """
    return missing_files(directory)[JSON]


def sentencepiece_agreement(directory: Path, backend: str) -> Literal["never", "always", "no leading space"]:
    """For which texts the directory's tokenizer.model gives the ids of this tokenizer.json."""
    if not (directory / MODEL).is_file():
        return "never"
    try:
        found = ask("agreement", directory, backend=backend)
    except UserError:  # tokenizer.json is the tokenizer, whatever lies beside it
        return "never"
    return cast('Literal["never", "always", "no leading space"]', found)


@lru_cache(maxsize=8)
def _beside_sentencepiece(digest: str, directory: Path) -> str:
    return json.dumps(ask("complete", directory))
