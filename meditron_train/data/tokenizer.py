"""Text to token ids: sentencepiece's tokenizer.model, or Hugging Face's tokenizer.json.

Special tokens become their id only where they were asked for; any other text that looks like one (a literal
"<s>") is ordinary text. With both files present tokenizer.model is used, because it is the exact one.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from meditron_train.errors import UserError

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")


def load_tokenizer(directory: Path | str, special_tokens: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer of a directory, with special_tokens added after its vocabulary (those it has keep their
    id).

    UserError when the directory holds no tokenizer, an unreadable one, or the special tokens are not
    distinct.
    """
    directory = Path(directory)
    special_tokens = tuple(special_tokens)
    if len(set(special_tokens)) < len(special_tokens) or "" in special_tokens:
        raise UserError(f"special tokens must be different and not empty: {list(special_tokens)}")
    for name, kind in zip(TOKENIZER_FILES, (_SentencePiece, _HuggingFace), strict=True):
        if (directory / name).is_file():
            return kind(directory, special_tokens)
    if directory.name in TOKENIZER_FILES and directory.is_file():
        raise UserError(f"{directory} is a file: give the directory it lies in, {directory.parent}.")
    found = "does not exist" if not directory.is_dir() else f"has neither {' nor '.join(TOKENIZER_FILES)}"
    raise UserError(
        f"No tokenizer in {directory}: it {found}. Give the directory of a Hugging Face model or tokenizer."
    )


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where ids fit, else int32: megatron-core's rule and threshold."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


class Tokenizer(ABC):
    """Encodes text to ids and back. Ids run from 0 to vocab_size - 1, special tokens included."""

    directory: Path
    special_tokens: tuple[str, ...]
    special_ids: dict[str, int]
    """The id of each of special_tokens."""
    vocab_size: int
    bos_id: int | None
    eos_id: int | None

    def __init__(self, directory: Path, special_tokens: Sequence[str], base_size: int) -> None:
        self.directory, self.special_tokens = directory, tuple(special_tokens)
        self._added = _added_tokens(directory)
        self.vocab_size = max([base_size, *(number + 1 for number in self._added.values())])
        self.special_ids = {}
        for token in self.special_tokens:
            known = self._added.get(token, self._base_id(token))
            if known is None:
                known = self.vocab_size
                self.vocab_size += 1
            self.special_ids[token] = known
        longest_first = sorted(self.special_tokens, key=lambda token: (-len(token), token))
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None

    @abstractmethod
    def _base_id(self, piece: str) -> int | None:
        """The id of a vocabulary entry of the file, or None."""

    @abstractmethod
    def _base_pieces(self) -> dict[int, str]:
        """The vocabulary of the file by id."""

    @abstractmethod
    def _encode_text(self, text: str) -> list[int]:
        """Ids of text without special tokens, without BOS and EOS."""

    @abstractmethod
    def _decode_ids(self, ids: list[int]) -> str:
        """Text of ids of the file's vocabulary; BOS and EOS leave no text."""

    @property
    def dtype(self) -> np.dtype:
        """How ids are stored."""
        return token_dtype(self.vocab_size)

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal hash of what ids mean: every vocabulary entry, BOS and EOS. The file format does not
        count."""
        pieces = self._base_pieces()
        pieces.update({number: token for token, number in {**self._added, **self.special_ids}.items()})
        content = [self.vocab_size, self.bos_id, self.eos_id, sorted(pieces.items())]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def encode(self, text: str, bos: bool = True, eos: bool = True) -> list[int]:
        """Ids of a text, begun by BOS and ended by EOS. UserError when one is asked for that does not
        exist."""
        ids = [self._required(self.bos_id, "BOS")] if bos else []
        for part in self._split.split(text) if self._split else [text]:
            if part in self.special_ids:
                ids.append(self.special_ids[part])
            elif part:
                ids.extend(self._encode_text(part))
        if eos:
            ids.append(self._required(self.eos_id, "EOS"))
        return ids

    def _required(self, number: int | None, what: str) -> int:
        if number is None:
            raise UserError(
                f"The tokenizer in {self.directory} has no {what} token: switch it off (--no-{what.lower()})."
            )
        return number

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens stand as they are written, BOS and EOS leave nothing. ValueError for
        an id outside the vocabulary."""
        names = {number: token for token, number in {**self._added, **self.special_ids}.items()}
        silent = {self.bos_id, self.eos_id}
        numbers = [int(number) for number in ids]
        outside = [number for number in numbers if not 0 <= number < self.vocab_size]
        if outside:
            raise ValueError(f"token id {outside[0]} is outside 0..{self.vocab_size - 1}")
        text = []
        for is_named, group in groupby(numbers, key=lambda number: number in names and number not in silent):
            run = list(group)
            text.append("".join(names[number] for number in run) if is_named else self._decode_ids(run))
        return "".join(text)


class _SentencePiece(Tokenizer):
    def __init__(self, directory: Path, special_tokens: Sequence[str]) -> None:
        from sentencepiece import SentencePieceProcessor

        path = directory / "tokenizer.model"
        try:
            self._model = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path} is not a sentencepiece model ({error}): copy it again.") from error
        self._base_size = self._model.vocab_size()
        super().__init__(directory, special_tokens, self._base_size)
        bos, eos = self._model.bos_id(), self._model.eos_id()
        self.bos_id, self.eos_id = (bos if bos >= 0 else None), (eos if eos >= 0 else None)

    def _base_id(self, piece: str) -> int | None:
        number = self._model.piece_to_id(piece)
        return number if self._model.id_to_piece(number) == piece else None

    def _base_pieces(self) -> dict[int, str]:
        return {number: self._model.id_to_piece(number) for number in range(self._base_size)}

    def _encode_text(self, text: str) -> list[int]:
        return self._model.encode(text, out_type=int)

    def _decode_ids(self, ids: list[int]) -> str:
        return self._model.decode([number for number in ids if number < self._base_size])


class _HuggingFace(Tokenizer):
    def __init__(self, directory: Path, special_tokens: Sequence[str]) -> None:
        from tokenizers import Tokenizer as Backend

        path = directory / "tokenizer.json"
        try:
            self._backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for whatever is wrong in the file
            raise UserError(f"{path} is not a Hugging Face tokenizer ({error}): copy it again.") from error
        self._backend.encode_special_tokens = True  # a literal "<s>" in a text is text
        self._backend.no_truncation()
        self._backend.no_padding()
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self._pieces = {number: piece for piece, number in vocabulary.items()}
        super().__init__(directory, special_tokens, max(self._pieces, default=-1) + 1)
        self.bos_id, self.eos_id = (self._named_token(name) for name in ("bos_token", "eos_token"))

    def _named_token(self, name: str) -> int | None:
        """The id of bos_token or eos_token, as the files beside tokenizer.json say it."""
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            token = _read_json(self.directory / file).get(name)
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str):
                number = self._added.get(content, self._base_id(content))
                if number is None:
                    raise UserError(f"{self.directory / file}: {name} {content!r} is not in the vocabulary.")
                return number
        number = _read_json(self.directory / "config.json").get(f"{name}_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and not 0 <= number < self.vocab_size:
            raise UserError(f"{self.directory / 'config.json'}: {name}_id {number} is not in the vocabulary.")
        return number if isinstance(number, int) else None

    def _base_id(self, piece: str) -> int | None:
        return self._backend.token_to_id(piece)

    def _base_pieces(self) -> dict[int, str]:
        return dict(self._pieces)

    def _encode_text(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def _decode_ids(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=True)


def _added_tokens(directory: Path) -> dict[str, int]:
    """Tokens that the files beside the vocabulary add to it or mark as special: text -> id."""
    readers: dict[str, Callable[[dict[str, Any]], Iterable[tuple[str, int]]]] = {
        "added_tokens.json": lambda content: content.items(),
        "tokenizer.json": lambda content: [
            (token["content"], token["id"]) for token in content.get("added_tokens", [])
        ],
        "tokenizer_config.json": lambda content: [
            (token["content"], int(number))
            for number, token in content.get("added_tokens_decoder", {}).items()
        ],
    }
    found: dict[str, int] = {}
    for name, read in readers.items():
        try:
            tokens = dict(read(_read_json(directory / name)))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{directory / name}: its added tokens are not a tokenizer's: copy it again."
            ) from error
        for token, number in tokens.items():
            if not isinstance(token, str) or type(number) is not int or number < 0:
                raise UserError(
                    f"{directory / name}: the added token {token!r} has the id {number!r}: copy it again."
                )
        found |= tokens
    return found


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): copy it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object: copy it again.")
    return content
