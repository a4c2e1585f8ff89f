"""Splitting text into words: for datatrove's filters and MinHash, for hashes of content, and for benchmark overlap."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from hashlib import blake2b
from itertools import pairwise

from datatrove.utils.word_tokenizers import WordTokenizer

_WORD = re.compile(r"[^\W_]+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class SpacedWords(WordTokenizer):
    """What stands between white space, as Gopher counts words. Marks such as [bib_ref] and commas are not separate
    words, or an article with many citations would seem to be made of symbols."""

    def __init__(self) -> None:
        super().__init__("en")

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return [part for part in _SENTENCE_END.split(text) if part.strip()]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        bounds = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
        return list(pairwise(bounds))


def normalize(text: str) -> str:
    """Unicode NFKC without case."""
    return unicodedata.normalize("NFKC", text).casefold() if not text.isascii() else text.lower()


def words(text: str) -> list[str]:
    """Letters and digits of normalized text, in words."""
    return _WORD.findall(normalize(text))


def word_blocks(text: str, num_words: int) -> Iterator[list[str]]:
    """The same in blocks, so that a long text does not become a long list."""
    block = []
    for match in _WORD.finditer(normalize(text)):
        block.append(match.group())
        if len(block) == num_words:
            yield block
            block = []
    if block:
        yield block


def pieces(text: str, num_chars: int) -> Iterator[str]:
    """A text cut at spaces into pieces of hardly more than so many characters: their words are those of the text."""
    start = 0
    while len(text) - start > num_chars and (cut := text.find(" ", start + num_chars)) >= 0:
        yield text[start:cut]
        start = cut + 1
    yield text[start:]


def content_hash(text: str) -> bytes:
    """16 bytes that are equal for texts equal up to case, punctuation, white space and Unicode form."""
    digest = blake2b(digest_size=16)
    for block in word_blocks(text, 4096):
        digest.update(" ".join(block).encode())
        digest.update(b" ")
    return digest.digest()
