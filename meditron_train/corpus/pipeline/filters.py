"""The filters that look at one document at a time, as datatrove steps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.utils.text import split_into_words

from meditron_train.corpus.declaration import FiltersSection
from meditron_train.corpus.declaration import LanguageFilter as LanguageSection
from meditron_train.corpus.declaration import LengthFilter as LengthSection
from meditron_train.corpus.pipeline.store import DroppedBy, ShardStore
from meditron_train.corpus.pipeline.words import SpacedWords
from meditron_train.corpus.text.rules import SPECIAL_TOKENS

_SAMPLE_CHARS = 4096
_MAX_REPETITION_CHARS = 1 << 18
_SPANS = re.compile(rf"\[({'|'.join(token[1:-1] for token in SPECIAL_TOKENS[::2])})\].*?\[/\1\]", re.S)
_SIGNS = re.compile(r"^(?:#+ |[ \t]+$)", re.M)


def filter_steps(filters: FiltersSection, store: ShardStore) -> list[BaseFilter]:
    """The filters that are switched on, each telling the store what it drops."""
    language = SpacedWords()
    length, quality = filters.length, filters.quality
    steps: list[tuple[bool, Any]] = [
        (length.enabled, lambda: TextLength(length, DroppedBy(store, "length"))),
        (filters.language.enabled, lambda: TextLanguage(filters.language, DroppedBy(store, "language"))),
        (
            filters.repetition.enabled,
            lambda: Repetition(filters.repetition.min_words, language, DroppedBy(store, "repetition")),
        ),
        (
            quality.enabled,
            lambda: Quality(
                min_doc_words=quality.min_words,
                max_doc_words=quality.max_words,
                min_stop_words=quality.min_stop_words,
                exclusion_writer=DroppedBy(store, "quality"),
                language=language,
            ),
        ),
    ]
    return [make() for enabled, make in steps if enabled]


class TextLength(BaseFilter):
    """Drops what is too short or too long, in characters."""

    name = "length"

    def __init__(self, section: LengthSection, exclusion_writer: Any) -> None:
        super().__init__(exclusion_writer)
        self._section = section

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        length = len(doc.text)
        if length < self._section.min_chars:
            return False, "short"
        return (False, "long") if length > self._section.max_chars else True


def prose(text: str) -> str:
    """The text without what the pipeline itself put in: spans between special tokens, and signs of headers.

    Gopher's rules would take the separators of table rows for symbols, headers for hashtags, and a work that is cited
    often for repetition.
    """
    return _SIGNS.sub("", _SPANS.sub("", text))


class Quality(GopherQualityFilter):
    """Gopher's rules, on the prose of a document."""

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        result: bool | tuple[bool, str] = super().filter(Document(text=prose(doc.text), id=doc.id))
        return result


class Repetition(GopherRepetitionFilter):
    """Gopher's rules, on the prose of documents that are long enough for them. A very long one is cut into equal parts,
    each of which is judged: datatrove's lists of n-grams take about a hundred times the memory of a text."""

    def __init__(self, min_words: int, language: SpacedWords, exclusion_writer: Any) -> None:
        super().__init__(exclusion_writer=exclusion_writer, language=language)
        self._min_words = min_words

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        text = prose(doc.text)
        if len(text) < _MAX_REPETITION_CHARS and (
            len(split_into_words(text, self.language)) < self._min_words
        ):
            return True
        for part in _equal_parts(text, _MAX_REPETITION_CHARS):
            result: bool | tuple[bool, str] = super().filter(Document(text=part, id=doc.id))
            if result is not True:
                return result
        return True


def _equal_parts(text: str, max_chars: int) -> Iterator[str]:
    """A text in as few parts as have at most max_chars, with nothing left out."""
    count = max(1, -(-len(text) // max_chars))
    bounds = [len(text) * number // count for number in range(count + 1)]
    yield from (text[first:last] for first, last in pairwise(bounds))


class TextLanguage(BaseFilter):
    """Drops what is in another language, judged by the beginning and the middle of the text."""

    name = "language"

    def __init__(self, section: LanguageSection, exclusion_writer: Any) -> None:
        super().__init__(exclusion_writer)
        self._section = section

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        language, probability = identify_language(doc.text)
        if language in self._section.keep and probability >= self._section.min_probability:
            return True
        return False, language if probability >= self._section.min_probability else "unknown"


def identify_language(text: str) -> tuple[str, float]:
    """ISO 639-1 code and probability of the language of a text."""
    middle = max(_SAMPLE_CHARS, len(text) // 2)
    language, probability = _identifier().classify(
        text[:_SAMPLE_CHARS] + " " + text[middle : middle + _SAMPLE_CHARS]
    )
    return str(language), float(probability)


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
