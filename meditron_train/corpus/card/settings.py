"""The tables of a data card that say how the corpus was made: thresholds, and where everything comes from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from meditron_train.corpus.card.facts import Facts
from meditron_train.corpus.card.table import Table
from meditron_train.corpus.declaration import Corpus, FiltersSection, MinHash


def parameters(corpus: Corpus) -> list[Table]:
    """Thresholds of the filters, of duplicates and of the search for benchmark items."""
    rows = list(_filter_rows("", corpus.filters))
    for source in corpus.sources:
        if source.filters is not None:
            rows += _filter_rows(source.name, source.filters)
    dedup, wanted = corpus.dedup, corpus.decontamination
    switches = [("exact", _switch(dedup.exact)), ("abstracts of papers", _switch(dedup.full_text))]
    duplicates = [("duplicates: " + name, "", text) for name, text in switches]
    duplicates.append(("duplicates: near", "", _settings(dedup.near.model_dump()) + _similarity(dedup.near)))
    items = [
        ("benchmark items: ngram", "", _settings(wanted.ngram.model_dump())),
        ("benchmark items: aligned", "", _settings(wanted.aligned.model_dump())),
        ("benchmark items", "", f"action {wanted.action}"),
    ]
    note = (
        "docs/guides/corpus.md explains the rules; a source without settings of its own has the general ones."
    )
    return [Table("Thresholds", note, ("rule", "source", "settings"), rows + duplicates + items)]


def provenance(facts: Facts) -> list[Table]:
    """Files and their hashes, as far as they are known."""
    rows = [("build", "fingerprint", facts.fingerprint), ("build", "meditron-train", facts.built_with)]
    if facts.tokenizer is not None:
        rows.append(("tokenizer", "fingerprint", facts.tokenizer["fingerprint"]))
        rows.append(("tokenizer", "vocabulary", f"{facts.tokenizer['vocab_size']:,}"))
        rows.append(("tokenizer", "special tokens", " ".join(facts.tokenizer["special_tokens"]) or "none"))
    rows += [(f"benchmark {item['name']}", "SHA-256", item["sha256"]) for item in facts.benchmarks]
    for source in facts.declared.sources:
        if source.path is not None:
            rows.append((source.name, "reader, path", f"{source.reader}, {source.path}"))
    for counted in facts.sources:
        rows += [(counted["name"], key, value) for key, value in _flat(counted.get("provenance", {}))]
    return [Table("Provenance", "manifest.json has the hashes of all files.", ("of", "what", "value"), rows)]


def _filter_rows(source: str, filters: FiltersSection) -> Iterator[tuple[str, str, str]]:
    for name, section in filters.model_dump().items():
        yield name, source, _settings(section)


def _settings(section: dict[str, Any]) -> str:
    if not section.pop("enabled", True):
        return "off"
    return ", ".join(f"{key} {_shown(value)}" for key, value in section.items())


def _shown(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return " ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _switch(is_on: bool) -> str:
    return "on" if is_on else "off"


def _similarity(near: MinHash) -> str:
    """The Jaccard similarity from which on two documents are more likely found than not."""
    if not near.enabled:
        return ""
    middle = (1 - 0.5 ** (1 / near.buckets)) ** (1 / near.hashes)
    return f": found with probability 1/2 at a Jaccard similarity of {middle:.2f}"


def _flat(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{key} of {inner}", shown) for inner, shown in _flat(value))
        else:
            yield key, str(value)
