"""Which documents contain the questions of evaluation sets. Every hit is reported, with the words that are shared.

Two rules, on words (letters and digits of normalized text):
- ngram: n consecutive words are shared (13, as in the GPT-3 paper, arXiv 2005.14165; an item of fewer words: all).
- aligned: the n-grams of the item that the document also has cover at least a share of the item's words (8-grams and
  one half, the rule the EPFL group published in 2026).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from meditron_train.corpus.declaration import Benchmark, DecontaminationSection
from meditron_train.corpus.json_files import read_json_lines
from meditron_train.corpus.pipeline.words import word_blocks, words
from meditron_train.errors import UserError

_BLOCK_WORDS = 1 << 16
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bits are lost in its powers
_MAX_KNOWN_WORDS = 1 << 18


@dataclass(frozen=True)
class Item:
    """A question of a benchmark."""

    benchmark: str
    id: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Hit:
    """A document contains an item, by a rule."""

    benchmark: str
    item: str
    rule: str
    share: float
    """Of the item's words that lie in shared n-grams."""
    shared: tuple[str, ...]
    """The runs of words that are shared, normalized."""


@dataclass
class _Table:
    """The n-grams of all items, by hash; sorted."""

    n: int
    hashes: NDArray[np.uint64]
    items: NDArray[np.int64]
    positions: NDArray[np.int64]


@dataclass
class WordHashes:
    """64-bit hashes of words, remembered."""

    _known: dict[str, int] = field(default_factory=dict)

    def __call__(self, sequence: list[str] | tuple[str, ...]) -> NDArray[np.uint64]:
        known = self._known
        if len(known) > _MAX_KNOWN_WORDS:
            known.clear()
        found = []
        for word in sequence:
            value = known.get(word)
            if value is None:
                value = known[word] = xxhash.xxh64_intdigest(word)
            found.append(value)
        return np.array(found, np.uint64)


def ngram_hashes(word_hashes: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """One hash for each run of n words: a polynomial modulo 2^64."""
    count = len(word_hashes) - n + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for offset in range(n):
        total = total * _FACTOR + word_hashes[offset : offset + count]
    return total


def load_items(benchmark: Benchmark) -> Iterator[Item]:
    """The items of a benchmark's file.

    Raises:
        UserError: the file cannot be read or lacks the fields.
    """
    if not benchmark.path.is_file():
        raise UserError(f"benchmark {benchmark.name!r}: there is no file {benchmark.path}")
    try:
        for number, record in enumerate(read_json_lines(benchmark.path), 1):
            missing = [key for key in benchmark.keys if key not in record]
            if missing:
                raise UserError(
                    f"benchmark {benchmark.name!r}: {benchmark.path}, line {number} has no {missing[0]!r}; it has "
                    f"{', '.join(map(repr, record))}"
                )
            text = " ".join(_text(record[key]) for key in benchmark.keys)
            yield Item(benchmark.name, str(record.get(benchmark.id_key, number)), tuple(words(text)))
    except (ValueError, TypeError) as error:
        raise UserError(f"benchmark {benchmark.name!r}: {benchmark.path} is not JSONL ({error})") from error


def _text(value: Any) -> str:
    if isinstance(value, dict):
        value = list(value.values())
    return " ".join(map(_text, value)) if isinstance(value, list) else str(value)


class BenchmarkIndex:
    """Finds items in documents."""

    def __init__(self, section: DecontaminationSection) -> None:
        self._section = section
        self.items = [item for benchmark in section.benchmarks for item in load_items(benchmark)]
        self._hash = WordHashes()
        # An item shorter than n words is one n-gram of all its words, so several tables may be needed.
        by_n: dict[int, list[int]] = defaultdict(list)
        for number, item in enumerate(self.items):
            if len(item.words) >= section.ngram.min_words:
                for n in self._lengths(item):
                    by_n[n].append(number)
        self._tables = [self._table(n, numbers) for n, numbers in sorted(by_n.items())]

    def _lengths(self, item: Item) -> set[int]:
        lengths = set()
        if self._section.ngram.enabled:
            lengths.add(min(self._section.ngram.n, len(item.words)))
        if self._section.aligned.enabled and len(item.words) >= self._section.aligned.n:
            lengths.add(self._section.aligned.n)
        return lengths

    def _table(self, n: int, numbers: list[int]) -> _Table:
        hashes = [ngram_hashes(self._hash(self.items[number].words), n) for number in numbers]
        items = np.concatenate([np.full(len(h), number) for h, number in zip(hashes, numbers, strict=True)])
        positions = np.concatenate([np.arange(len(h)) for h in hashes])
        flat = np.concatenate(hashes)
        order = np.argsort(flat, kind="stable")
        return _Table(n, flat[order], items[order], positions[order])

    def find(self, text: str) -> list[Hit]:
        """All items that the document contains, in the order of the benchmarks."""
        if not self._tables:
            return []
        # (item, n) -> positions of shared n-grams
        matched: dict[tuple[int, int], set[int]] = defaultdict(set)
        longest = max(table.n for table in self._tables)
        tail: list[str] = []
        for block in word_blocks(text, _BLOCK_WORDS):
            sequence = tail + block
            hashes = self._hash(sequence)
            for table in self._tables:
                self._match(table, sequence, hashes, matched)
            tail = sequence[-(longest - 1) :] if longest > 1 else []
        return list(self._hits(matched))

    def _match(
        self,
        table: _Table,
        sequence: list[str],
        hashes: NDArray[np.uint64],
        matched: dict[tuple[int, int], set[int]],
    ) -> None:
        grams = ngram_hashes(hashes, table.n)
        first = np.searchsorted(table.hashes, grams, side="left")
        last = np.searchsorted(table.hashes, grams, side="right")
        for place in np.flatnonzero(first < last).tolist():
            gram = tuple(sequence[place : place + table.n])
            for row in range(int(first[place]), int(last[place])):
                item, position = int(table.items[row]), int(table.positions[row])
                if self.items[item].words[position : position + table.n] == gram:  # hashes may meet by chance
                    matched[item, table.n].add(position)

    def _hits(self, matched: dict[tuple[int, int], set[int]]) -> Iterator[Hit]:
        for item, n in sorted(matched):
            found, positions = self.items[item], sorted(matched[item, n])
            covered = sorted({position + offset for position in positions for offset in range(n)})
            share = len(covered) / len(found.words)
            for rule in self._rules(found, n, share):
                yield Hit(found.benchmark, found.id, rule, share, _runs(found.words, covered))

    def _rules(self, item: Item, n: int, share: float) -> Iterator[str]:
        ngram, aligned = self._section.ngram, self._section.aligned
        if ngram.enabled and n == min(ngram.n, len(item.words)):
            yield "ngram"
        if aligned.enabled and n == aligned.n and share >= aligned.min_share:
            yield "aligned"


def _runs(item: tuple[str, ...], covered: list[int]) -> tuple[str, ...]:
    """The covered words, joined where they are neighbors."""
    runs: list[list[str]] = []
    previous = -2
    for position in covered:
        if position != previous + 1:
            runs.append([])
        runs[-1].append(item[position])
        previous = position
    return tuple(" ".join(run) for run in runs)
