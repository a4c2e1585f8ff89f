"""What is made of a sentencepiece model in the child process: the files that it lacks, and how far another
tokenizer.json agrees with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from meditron_train.errors import UserError
from meditron_train.tokenizer.compare import encoding_digest
from meditron_train.tokenizer.files import (
    CONFIG,
    JSON,
    MODEL,
    added_token,
    stated_added_tokens,
    stated_tokens,
)
from meditron_train.tokenizer.probes import PROBE_TEXTS
from meditron_train.tokenizer.sentencepiece import (
    convert_sentencepiece,
    is_sentencepiece_bpe,
    load_sentencepiece,
    sentencepiece_named_tokens,
)

_NO_LIMIT = 10**30  # transformers' way to say that a tokenizer has no maximum length
_INPUTS = ["input_ids", "attention_mask"]  # a Llama takes no token_type_ids
_FIRST = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}

Agreement = Literal["never", "always", "no leading space"]


def files_beside_sentencepiece(directory: Path) -> dict[str, dict[str, Any]]:
    """The files that a directory with tokenizer.model alone lacks: name -> content.

    Raises:
        UserError: no tokenizer.json gives the ids that sentencepiece gives, or those that are stated.
    """
    model_file = directory / MODEL
    tokenizer = convert_sentencepiece(model_file)
    if not _agrees_with_sentencepiece(tokenizer, model_file):
        raise UserError(
            f"{model_file}: no tokenizer.json gives the ids that sentencepiece gives. Train the model with "
            "normalization_rule_name=identity, remove_extra_whitespaces=false and byte_fallback=true"
        )
    known = {token["content"] for token in tokenizer["added_tokens"]}
    stated = {token: number for token, (number, _) in stated_added_tokens(directory).items()}
    tokenizer["added_tokens"] += [
        added_token(token, number)
        for token, number in sorted(stated.items(), key=lambda item: item[1])
        if token not in known
    ]
    _require_ids(tokenizer, stated, directory)
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
    return files


def _require_ids(tokenizer: dict[str, Any], stated: Mapping[str, int], directory: Path) -> None:
    """The library numbers added tokens itself, one after the other from the end of the vocabulary on."""
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(json.dumps(tokenizer))
    for token, number in stated.items():
        if made.token_to_id(token) != number:
            raise UserError(
                f"{directory / 'added_tokens.json'} says that {token!r} has the id {number}, but it gets "
                f"{made.token_to_id(token)} beside {MODEL}. Use the model's own tokenizer.json, or number its added "
                f"tokens from {len(tokenizer['model']['vocab'])} on, without gaps"
            )


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


def agreement(directory: Path, backend: str) -> Agreement:
    """For which texts a tokenizer.json that stands beside tokenizer.model encodes by the same pieces, merges and
    normalizer: none, all, or those that do not begin with a space."""
    model, content = directory / MODEL, json.loads(backend)
    if not is_sentencepiece_bpe(model):
        return "never"
    load_sentencepiece(model)
    own = {**convert_sentencepiece(model), "added_tokens": content["added_tokens"]}
    theirs = encoding_digest(backend)
    if encoding_digest(json.dumps(own)) == theirs:
        return "always"
    only_spaces = [step["type"] for step in own["normalizer"]["normalizers"]] == ["Prepend", "Replace"]
    first = {**own, "normalizer": None, "pre_tokenizer": _FIRST}
    return "no leading space" if only_spaces and encoding_digest(json.dumps(first)) == theirs else "never"
