"""What a model directory's tokenizer means: what transformers' AutoTokenizer makes of its files.

The one exception is a directory with `tokenizer.model` alone, of which transformers 5.x makes other ids than the
model was trained with: that means what sentencepiece makes of it, as for Llama-2, and is read from the files that
`complete` adds to it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from meditron_train.errors import UserError
from meditron_train.tokenizer.bounded import ask
from meditron_train.tokenizer.complete import missing_files
from meditron_train.tokenizer.files import (
    content_digest,
    has_tokenizer,
    is_sentencepiece_alone,
    tokenizer_files,
)


@dataclass(frozen=True)
class Reading:
    """What transformers makes of a directory's tokenizer.

    Attributes:
        backend: content of the tokenizer.json that it works with; None for a tokenizer written in Python.
        vocabulary: token -> id, added tokens included.
        added_tokens: token -> [id, special, lstrip, rstrip, single_word, normalized].
        ids, decoded: of probe texts, some of them with special and added tokens.
        templates: name -> [source, rendered chats].
    """

    transformers: str
    kind: str
    backend: str | None
    vocabulary: Mapping[str, int]
    added_tokens: Mapping[str, list[Any]]
    named_tokens: Mapping[str, Any]
    settings: Mapping[str, Any]
    ids: Mapping[str, list[int]]
    decoded: Mapping[str, list[str]]
    templates: Mapping[str, list[str]]

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self.vocabulary.values())

    def id_of(self, name: str) -> int | None:
        """The id of a named token ("bos_token"); None without."""
        token = self.named_tokens.get(name)
        return self.vocabulary.get(token) if isinstance(token, str) else None


def read_tokenizer(directory: str | Path) -> Reading:
    """Read the tokenizer of a directory with transformers, in a process with bounded memory and time.

    Raises:
        UserError: the directory has no tokenizer, or transformers cannot read it within the bounds.
    """
    directory = Path(directory)
    if not has_tokenizer(directory):
        raise UserError(f"{directory} has no tokenizer (tokenizer.model or tokenizer.json)")
    return _read(_Input(content_digest(directory), directory))


def open_tokenizer(directory: str | Path) -> Any:
    """transformers' own tokenizer of a directory, with the meaning that `read_tokenizer` gives it; opened only after a
    process with bounds has read its files.

    Raises:
        UserError: as `read_tokenizer`.
    """
    read_tokenizer(directory)
    from transformers import AutoTokenizer

    with _completed(Path(directory)) as whole:
        tokenizer = AutoTokenizer.from_pretrained(whole, local_files_only=True, trust_remote_code=False)
    tokenizer.name_or_path = str(directory)
    return tokenizer


def encode(directory: str | Path, text: str) -> list[int]:
    """The ids that transformers makes of a text, special tokens included; it is encoded in the process with bounds.

    Raises:
        UserError: as `read_tokenizer`.
    """
    with _completed(Path(directory)) as whole:
        return list(ask("encode", whole, named=Path(directory), text=text))


@dataclass(frozen=True)
class _Input:
    """Directories of the same content are read once."""

    digest: str
    directory: Path = field(compare=False)


@lru_cache(maxsize=8)
def _read(source: _Input) -> Reading:
    with _completed(source.directory) as whole:
        found = ask("read", whole, named=source.directory)
    return Reading(**{item.name: found[item.name] for item in fields(Reading)})


@contextmanager
def _completed(directory: Path) -> Iterator[Path]:
    """The directory, or where tokenizer.model stands alone a temporary one with all files that transformers needs."""
    if not is_sentencepiece_alone(directory):
        yield directory
        return
    with tempfile.TemporaryDirectory() as scratch:
        for name, path in tokenizer_files(directory).items():
            (Path(scratch) / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, Path(scratch) / name)
        for name, content in missing_files(directory).items():
            (Path(scratch) / name).write_text(json.dumps(content), encoding="utf-8")
        yield Path(scratch)
