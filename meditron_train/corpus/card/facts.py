"""The numbers of a data card, from a corpus's manifest."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from meditron_train.corpus.declaration import Corpus
from meditron_train.corpus.manifest import FinishedCorpus

PARTS = ("guidelines", "abstracts", "papers", "replay")
# Table 1 of the Meditron paper (arXiv 2311.16079): documents and tokens, train and validation.
PAPER = {
    "guidelines": (41_000, 2_284, 107_000_000, 6_000_000),
    "abstracts": (15_700_000, 487_000, 5_480_000_000, 170_000_000),
    "papers": (4_900_000, 142_000, 40_700_000_000, 1_230_000_000),
    "replay": (494_000, 0, 420_000_000, 0),
}
# The stages of the funnel in order, by what a rule's name begins with.
STAGES = {
    "not_selected": "of no source",
    "left_out": "left out by readers",
    "invalid": "invalid text or license",
    "length": "length",
    "language": "language",
    "repetition": "repetition",
    "quality": "quality",
    "contaminated": "benchmark items",
    "duplicate.full_text": "abstracts of papers present",
    "duplicate.exact_duplicate": "exact duplicates",
    "duplicate.near_duplicate": "near-duplicates",
    "removed": "removed later",
}


@dataclass(frozen=True)
class Counts:
    """Documents and tokens by split; no tokens where the corpus is not tokenized."""

    train_documents: int
    validation_documents: int
    train_tokens: int | None
    validation_tokens: int | None

    @property
    def documents(self) -> int:
        return self.train_documents + self.validation_documents

    @property
    def tokens(self) -> int | None:
        if self.train_tokens is None or self.validation_tokens is None:
            return None
        return self.train_tokens + self.validation_tokens


@dataclass(frozen=True)
class Facts:
    """What all forms of the card say."""

    declared: Corpus
    built_with: str
    """Version of meditron-train."""
    fingerprint: str
    sources: tuple[dict[str, Any], ...]
    benchmarks: tuple[dict[str, Any], ...]
    files: dict[str, str]
    tokenizer: dict[str, Any] | None

    @classmethod
    def of(cls, corpus: FinishedCorpus, declared: Corpus) -> Facts:
        manifest = corpus.manifest
        return cls(
            declared,
            manifest["version"],
            manifest["fingerprint"],
            tuple(manifest["sources"]),
            tuple(manifest["benchmarks"]),
            manifest["files"],
            manifest["tokenizer"],
        )

    @property
    def title(self) -> str:
        return self.declared.title or self.declared.name

    @property
    def description(self) -> str:
        return self.declared.description.strip()

    @property
    def languages(self) -> tuple[str, ...]:
        """Those that the filters keep."""
        return self.declared.filters.language.keep

    @property
    def is_tokenized(self) -> bool:
        return self.tokenizer is not None

    def counts(self, *parts: str) -> Counts:
        """Of all sources of these parts; of all sources where none is named."""
        chosen = [source for source in self.sources if not parts or source["part"] in parts]
        return sum_counts(chosen, self.is_tokenized)

    def funnel(self) -> list[tuple[str, int, int]]:
        """Rows of (stage, documents dropped there, documents left), from all records of the files to all kept."""
        dropped: Counter[str] = Counter()
        for source in self.sources:
            dropped["not_selected"] += not_selected(source).total()
            dropped["left_out"] += sum(left_out(source).values())
            for rule, count in source["dropped"].items():
                dropped[stage_of(rule)] += count
        left = sum(source["read"].get("records", source["read"]["documents"]) for source in self.sources)
        rows = [("records of the files", 0, left)]
        for stage, title in STAGES.items():
            if dropped[stage]:
                left -= dropped[stage]
                rows.append((title, dropped[stage], left))
        return rows

    @property
    def problems(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for source in self.sources:
            total.update(source["problems"])
        return total

    @property
    def licenses(self) -> list[str]:
        """Those that documents of the corpus state, not what the declaration says of documents that state none."""
        return sorted({license for source in self.sources for license in licenses(source)})


# Corpora that older versions built lack some of what is known of a source.


def licenses(source: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Documents and tokens by license; empty where it was not counted."""
    return dict(source.get("licenses", {}))


def left_out(source: dict[str, Any]) -> dict[str, int]:
    """Records that its reader left out, by reason; empty where it was not counted."""
    return dict(source.get("left_out", {}))


def not_selected(source: dict[str, Any]) -> Counter[str]:
    """Records that no source selects, by what they have where sources select; empty where it was not counted."""
    found = source.get("not_selected", {})
    return Counter(found if isinstance(found, dict) else {"": found})


def sum_counts(sources: list[dict[str, Any]], is_tokenized: bool) -> Counts:
    splits = [source["splits"] for source in sources]

    def total(split: str, what: str) -> int:
        return sum(counts[split].get(what, 0) for counts in splits)

    return Counts(
        total("train", "documents"),
        total("validation", "documents"),
        total("train", "tokens") if is_tokenized else None,
        total("validation", "tokens") if is_tokenized else None,
    )


def stage_of(rule: str) -> str:
    """The stage that a rule belongs to."""
    return next((stage for stage in STAGES if rule == stage or rule.startswith(stage + ".")), rule)
