"""The files that a tokenizer directory lacks for transformers 4.x and 5.x to read it alike.

For `tokenizer.model` alone these are: a `tokenizer.json` whose normalizer prepends and replaces spaces (Metaspace, as
5.x writes it, gets leading spaces wrong), checked against sentencepiece on probe texts, and a `tokenizer_config.json`
whose class reads tokenizer.json as it stands (of LlamaTokenizer, 5.x rebuilds the normalizer).
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from meditron_train.errors import UserError
from meditron_train.tokenizer.child import PROBE_TEXTS
from meditron_train.tokenizer.files import (
    CONFIG,
    JSON,
    MODEL,
    content_digest,
    is_sentencepiece_alone,
    stated_added_tokens,
    stated_tokens,
    tokenizer_files,
)
from meditron_train.tokenizer.sentencepiece import (
    convert_sentencepiece,
    load_sentencepiece,
    sentencepiece_named_tokens,
)

_NO_LIMIT = 10**30  # transformers' way to say that a tokenizer has no maximum length
_INPUTS = ["input_ids", "attention_mask"]  # a Llama takes no token_type_ids


def missing_files(directory: str | Path) -> dict[str, dict[str, Any]]:
    """The JSON files to add to a copy of a directory's tokenizer files: name -> content; empty when nothing
    is missing.

    Raises:
        UserError: no tokenizer.json gives the ids that sentencepiece gives.
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


@lru_cache(maxsize=8)
def _beside_sentencepiece(digest: str, directory: Path) -> str:
    model_file = directory / MODEL
    tokenizer = convert_sentencepiece(model_file)
    if not _agrees_with_sentencepiece(tokenizer, model_file):
        raise UserError(
            f"{model_file}: no tokenizer.json gives the ids that sentencepiece gives. Train the model with "
            "normalization_rule_name=identity, remove_extra_whitespaces=false and byte_fallback=true"
        )
    known = {token["content"] for token in tokenizer["added_tokens"]}
    more = {token: stated for token, stated in stated_added_tokens(directory).items() if token not in known}
    tokenizer["added_tokens"] += [
        added_token(token, number) for token, (number, _) in sorted(more.items(), key=lambda item: item[1][0])
    ]
    named = {**sentencepiece_named_tokens(model_file), **stated_tokens(directory)}
    config = {
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in tokenizer["added_tokens"]
        },
        "clean_up_tokenization_spaces": False,
        "model_max_length": _NO_LIMIT,
        "model_input_names": _INPUTS,
        **named,
        "tokenizer_class": "PreTrainedTokenizerFast",
        # 5.x acts on these, 4.x on tokenizer.json's post-processor alone: the same is said in both places.
        "add_bos_token": tokenizer["post_processor"] is not None,
        "add_eos_token": False,
    }
    files = {JSON: tokenizer, CONFIG: config}
    if not (directory / "special_tokens_map.json").is_file():
        files["special_tokens_map.json"] = named
    return json.dumps(files)


def added_token(content: str, number: int, **flags: bool) -> dict[str, Any]:
    """An entry of tokenizer.json's added_tokens; a special token unless flags say otherwise."""
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": content, **usual, **flags}


def _agrees_with_sentencepiece(tokenizer: dict[str, Any], model_file: Path) -> bool:
    from tokenizers import Tokenizer

    processor = load_sentencepiece(model_file)
    try:
        fast = Tokenizer.from_str(json.dumps(tokenizer))
    except Exception:  # the library raises bare Exception for anything it cannot parse
        return False
    return all(
        fast.encode(text, add_special_tokens=False).ids == processor.encode(text) for text in PROBE_TEXTS
    )
