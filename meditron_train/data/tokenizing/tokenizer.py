"""Text to token ids: those that the published model's tokenizer will give.

What a directory's tokenizer means is what transformers makes of it (`meditron_train.tokenizer`): its added tokens are
used. Special tokens become their id only where they were asked for; any other text that looks like one (a literal
"<s>") is ordinary text, as with `split_special_tokens=True` of transformers. sentencepiece's own tokenizer.model
encodes, where it gives the very same ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np

from meditron_train.errors import UserError
from meditron_train.files import describe_missing_directory
from meditron_train.tokenizer.compare import encoding_digest
from meditron_train.tokenizer.complete import sentencepiece_agreement, sentencepiece_backend
from meditron_train.tokenizer.files import (
    CONFIG,
    JSON,
    MODEL,
    added_token,
    content_digest,
    has_tokenizer,
    is_sentencepiece_alone,
    read_json_object,
    stated_tokens,
    tokenizer_config,
)
from meditron_train.tokenizer.reading import read_tokenizer
from meditron_train.tokenizer.sentencepiece import load_sentencepiece, sentencepiece_named_tokens


@dataclass(frozen=True)
class Definition:
    """All that makes a tokenizer: plain data, which a worker process can be given.

    Attributes:
        backend: content of tokenizer.json.
        adds_bos: None where nothing says it.
        sentencepiece: where the directory's tokenizer.model gives the same ids: never, always, or for texts
            that do not begin with a space.
    """

    directory: str
    backend: str
    special_tokens: tuple[str, ...]
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool | None
    sentencepiece: Literal["never", "always", "no leading space"]
    fingerprint: str
    base_size: int
    """One more than the largest id without special_tokens."""


def load_tokenizer(directory: Path | str, special_tokens: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer of a directory, with special_tokens added after its vocabulary (those it has keep their id).

    Raises:
        UserError: the directory has no tokenizer or an unreadable one, or the special tokens are not
            distinct.
    """
    directory = Path(directory)
    special_tokens = tuple(special_tokens)
    if len(set(special_tokens)) < len(special_tokens) or "" in special_tokens:
        raise UserError(f"special tokens must be different and not empty: {list(special_tokens)}")
    if has_tokenizer(directory):
        ids = [_config_id(directory, name) for name in ("bos_token", "eos_token")]
        return _load(_Source(f"{content_digest(directory)} {ids}", special_tokens, directory))
    if directory.is_file() and has_tokenizer(directory.parent):
        raise UserError(f"{directory} is a file: give the directory it lies in, {directory.parent}")
    if not directory.is_dir():
        raise UserError(f"no tokenizer: {describe_missing_directory(directory)}")
    raise UserError(
        f"no tokenizer in {directory}: it has neither {MODEL} nor {JSON}. Give the directory of a Hugging Face model "
        "or tokenizer"
    )


@dataclass(frozen=True)
class _Source:
    """Directories of the same content hold the same tokenizer."""

    digest: str
    special_tokens: tuple[str, ...]
    directory: Path = field(compare=False)


@lru_cache(maxsize=4)
def _load(source: _Source) -> Tokenizer:
    return tokenizer_of(_define(source.directory, source.special_tokens))


def tokenizer_of(definition: Definition) -> Tokenizer:
    """The tokenizer that a definition describes."""
    return (
        Tokenizer(definition) if definition.sentencepiece == "never" else SentencePieceTokenizer(definition)
    )


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where ids fit, else int32: megatron-core's rule and threshold."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def _define(directory: Path, special_tokens: tuple[str, ...]) -> Definition:
    alone = is_sentencepiece_alone(directory)
    stated, config = stated_tokens(directory), tokenizer_config(directory)
    if alone:
        content = sentencepiece_backend(directory)
        named: Mapping[str, Any] = {**sentencepiece_named_tokens(directory / MODEL), **stated}
    else:
        reading = read_tokenizer(directory)
        if reading.backend is None:
            raise UserError(
                f"{directory}: transformers runs its tokenizer ({reading.kind}) in Python, which gives no {JSON}. Save "
                "it as a fast tokenizer (save_pretrained), and use that directory"
            )
        content, named = json.loads(reading.backend), reading.named_tokens
    ids = _vocabulary(content, directory)
    bos, eos = (_named_id(directory, name, named, stated, ids) for name in ("bos_token", "eos_token"))
    adds_bos: bool | None = bos is not None
    if bos is None and "bos_token" not in stated:
        adds_bos = None
    if config.get("add_bos_token") is False:
        adds_bos = False
    exact = "always" if alone else sentencepiece_agreement(directory, json.dumps(content))
    if any(not token.get("special") for token in content["added_tokens"]):
        exact = "never"  # the pieces around such a token are not sentencepiece's
    if exact == "no leading space" and special_tokens:
        exact = "never"  # what follows one has no space put before it
    backend = json.dumps(_with_special_tokens(content, ids, special_tokens))
    fingerprint = encoding_digest(backend, bos, eos, list(special_tokens))
    return Definition(
        str(directory), backend, special_tokens, bos, eos, adds_bos, exact, fingerprint, 1 + max(ids.values())
    )


def _vocabulary(content: dict[str, Any], directory: Path) -> dict[str, int]:
    vocabulary: dict[str, int] = _backend(json.dumps(content), directory).get_vocab(with_added_tokens=True)
    return vocabulary


def _named_id(
    directory: Path, name: str, named: Mapping[str, Any], stated: Mapping[str, Any], ids: Mapping[str, int]
) -> int | None:
    """The id of bos_token or eos_token: the tokenizer's own; where its files do not mention it, config.json's."""
    token = named.get(name)
    if token is not None or name in stated:
        if isinstance(token, str) and token not in ids:
            raise UserError(f"{directory}: {name} {token!r} is not in the vocabulary")
        return ids[token] if isinstance(token, str) else None
    number = _config_id(directory, name)
    if number is not None and not 0 <= number <= max(ids.values()):
        raise UserError(f"{directory / 'config.json'}: {name}_id {number} is not in the vocabulary")
    return number


def _config_id(directory: Path, name: str) -> int | None:
    """What config.json says of bos_token or eos_token; the first of several."""
    path = directory / "config.json"
    number = read_json_object(path).get(f"{name}_id") if path.is_file() else None
    number = number[0] if isinstance(number, list) and number else number
    return number if type(number) is int else None


def _with_special_tokens(
    content: dict[str, Any], ids: Mapping[str, int], special_tokens: Sequence[str]
) -> dict[str, Any]:
    """tokenizer.json in which those asked for, and no other special tokens, are recognized in a text: the library
    takes special ones for text (`encode_special_tokens`), so these are entered as ordinary added tokens."""
    known = {token["content"]: token for token in content["added_tokens"]}
    following = 1 + max(ids.values())
    for token in special_tokens:
        number = ids.get(token, following)
        following += number == following
        known[token] = {**known.get(token, added_token(token, number)), "special": False}
    return {**content, "added_tokens": sorted(known.values(), key=lambda token: token["id"])}


def _backend(content: str, directory: Path | str) -> Any:
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_str(content)
    except Exception as error:  # the library raises plain Exception for whatever is wrong
        raise UserError(f"{directory}: its tokenizer cannot be used ({error})") from None
    backend.encode_special_tokens = True  # a literal "<s>" in a text is text
    backend.no_truncation()
    backend.no_padding()
    return backend


class Tokenizer:
    """Encodes text to ids and back. Ids run from 0 to vocab_size - 1, special tokens included."""

    def __init__(self, definition: Definition) -> None:
        self.definition = definition
        self.directory, self.special_tokens = Path(definition.directory), definition.special_tokens
        self.bos_id, self.eos_id, self.adds_bos = definition.bos_id, definition.eos_id, definition.adds_bos
        self._backend = _backend(definition.backend, self.directory)
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = 1 + max(vocabulary.values())
        self.special_ids: dict[str, int] = {token: vocabulary[token] for token in self.special_tokens}
        """The id of each of special_tokens."""
        self._added = {
            number: token.content for number, token in self._backend.get_added_tokens_decoder().items()
        }

    @property
    def dtype(self) -> np.dtype:
        """How ids are stored."""
        return token_dtype(self.vocab_size)

    @property
    def fingerprint(self) -> str:
        """Hexadecimal hash of all that decides ids: vocabulary, merges, how text is split and normalized, added
        tokens, BOS, EOS and special_tokens. The file format does not count."""
        return self.definition.fingerprint

    def has_token(self, token: str) -> bool:
        """Whether the vocabulary holds it, added tokens included."""
        return self._backend.token_to_id(token) is not None

    def encode(self, text: str, bos: bool = True, eos: bool = True) -> list[int]:
        """Ids of a text, preceded by BOS and followed by EOS.

        Raises:
            UserError: BOS or EOS is asked for and does not exist, or the library fails on the text.
        """
        ids = [self._required(self.bos_id, "BOS")] if bos else []
        try:
            ids += self._encode_text(text)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a panic of the Rust library is not an Exception
            if type(error).__name__ != "PanicException" and not isinstance(error, Exception):
                raise
            raise UserError(
                f"the tokenizer in {self.directory} fails at a text of {len(text)} characters that begins "
                f"{text[:40]!r}: {error}"
            ) from None
        if eos:
            ids.append(self._required(self.eos_id, "EOS"))
        return ids

    def _encode_text(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def _required(self, number: int | None, what: str) -> int:
        if number is None:
            key, example = f"{what.lower()}_token", "<s>" if what == "BOS" else "</s>"
            raise UserError(
                f"the tokenizer in {self.directory} does not say which of its tokens is {what}. Name it in "
                f'{self.directory / CONFIG}, for example {{"{key}": "{example}"}}. If the model was trained without '
                f"one, use --no-{what.lower()}"
            )
        return number

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens appear as they are written, BOS and EOS leave nothing.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        silent = {self.bos_id, self.eos_id}
        numbers = [int(number) for number in ids]
        outside = [number for number in numbers if not 0 <= number < self.vocab_size]
        if outside:
            raise ValueError(f"token id {outside[0]} is outside 0..{self.vocab_size - 1}")
        text = []
        for kind, group in groupby(
            (number for number in numbers if number not in silent), key=lambda number: number in self._added
        ):
            run = list(group)
            text.append("".join(self._added[number] for number in run) if kind else self._backend.decode(run))
        return "".join(text)


class SentencePieceTokenizer(Tokenizer):
    """The same ids, by sentencepiece: for a definition that says where they agree."""

    def __init__(self, definition: Definition) -> None:
        super().__init__(definition)
        self._model = load_sentencepiece(self.directory / MODEL)
        longest_first = sorted(self.special_tokens, key=lambda token: (-len(token), token))
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None
        self._leading = (" ", "▁") if definition.sentencepiece == "no leading space" else None

    def control_pieces(self) -> list[str]:
        """The pieces that stand for no text, such as <s>."""
        model = self._model
        return [
            model.id_to_piece(number)
            for number in range(model.vocab_size())
            if model.is_control(number) or model.is_unknown(number)
        ]

    def split(self, text: str) -> list[str]:
        """What is encoded as text: the parts between special tokens."""
        parts = self._split.split(text) if self._split else [text]
        return [part for part in parts if part and part not in self.special_ids]

    def _encode_text(self, text: str) -> list[int]:
        if self._leading is not None and text.startswith(self._leading):
            return super()._encode_text(text)
        ids: list[int] = []
        for part in self._split.split(text) if self._split else [text]:
            if part in self.special_ids:
                ids.append(self.special_ids[part])
            elif part:
                ids.extend(self._encode_part(part))
        return ids

    def _encode_part(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text, out_type=int)
        return ids
