"""The filters of single documents, where datatrove's own would need too much memory."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import pytest

pytest.importorskip("datatrove")

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.dedup import MinhashDedupSignature
from datatrove.pipeline.filters import GopherRepetitionFilter

from meditron_train.corpus.declaration import FiltersSection, LanguageFilter, LengthFilter, MinHash
from meditron_train.corpus.pipeline import filters, near
from meditron_train.corpus.pipeline.filters import Repetition, filter_steps, prose
from meditron_train.corpus.pipeline.near import BoundedSignature, minhash_config
from meditron_train.corpus.pipeline.words import SpacedWords, pieces
from tests.corpus.pipeline.corpora import article, word


def repetition() -> Repetition:
    return Repetition(50, SpacedWords(), None)


def long_text(num_chars: int) -> str:
    rng = random.Random(0)
    return " ".join(f"{rng.getrandbits(24):x}" for _ in range(num_chars // 7))


def test_repetition_is_judged_as_by_datatrove() -> None:
    theirs, ours = GopherRepetitionFilter(language=SpacedWords()), repetition()
    texts = [article(seed, 20) for seed in range(5)]
    texts += [f"{text} {text[:500]}" for text in texts] + [f"{text}\n\n{text}" for text in texts]
    found = [ours.filter(Document(text=text, id="")) for text in texts]
    assert found == [theirs.filter(Document(text=text, id="")) for text in texts]
    assert True in found and (False, "dup_para_frac") in found


def test_a_long_text_is_judged_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "_MAX_REPETITION_CHARS", 4000)
    clean = " ".join(article(seed, 20) for seed in range(8))
    assert repetition().filter(Document(text=clean, id="")) is True
    repeated = clean + " " + "the same words again " * 1000
    assert repetition().filter(Document(text=repeated, id="")) == (False, "top_3_gram")
    assert "".join(filters._equal_parts(clean, 4000)) == clean


def test_signatures_of_a_text_in_pieces_are_datatroves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(near, "_PIECE_CHARS", 200)
    text = (
        "Ünder 3.5 mg, then 4 mg " * 5
        + "  \n\n "
        + article(3, 30)
        + " " * 300
        + "naïve e\u0301nd "
        + "x" * 500
    )
    config = minhash_config(MinHash())
    steps = [kind(str(tmp_path), config, SpacedWords()) for kind in (BoundedSignature, MinhashDedupSignature)]
    ours, theirs = (step.get_shingles(text) for step in steps)
    assert len(ours) > 400 and np.array_equal(ours, theirs)
    assert " ".join(pieces(text, 200)) == text


ROW = "\n7 | 8.5 (2.1) | < 0.01 | 12 | 3"
CITED = " [bib_ref] A trial of zelapril in adults with fever of unknown origin, Quist [/bib_ref]"
GOOD = {
    "table": article(1, 12) + "\n[table] Table 1: Doses." + ROW * 60 + " [/table]\n" + article(2, 3),
    "headers": "\n".join(f"## {word(random.Random(i))}\n{article(i, 1)[:60]}" for i in range(12)),
    "citations": "".join(f"{sentence}{CITED}." for sentence in article(3, 20).split(".")[:-1]),
    "formulas": "\n".join(
        f"{article(i, 2)}\n[formula] a = b [/formula] [formula] x [/formula]" for i in range(9)
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_markup_of_the_pipeline_is_not_judged(name: str) -> None:
    """datatrove's rules on symbols, hashtags and repetition would drop each of them."""
    section = FiltersSection(length=LengthFilter(enabled=False), language=LanguageFilter(enabled=False))
    steps = filter_steps(section, None)  # type: ignore[arg-type]  # nothing is dropped
    assert [step.filter(Document(text=GOOD[name], id="")) for step in steps] == [True, True]
    assert not any(token in prose(GOOD[name]) for token in ("[", "#", "|"))


@pytest.mark.long
def test_the_memory_for_a_long_text() -> None:
    document = Document(text=long_text(750_000), id="")
    tracemalloc.start()
    assert repetition().filter(document) is True
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6, f"{peak / 1e6:.0f} MB"
