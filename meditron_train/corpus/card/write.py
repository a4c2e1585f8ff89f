"""`corpus card`: writes all forms of the card."""

from __future__ import annotations

import json
from pathlib import Path

from meditron_train.corpus.card.croissant import croissant
from meditron_train.corpus.card.facts import Facts
from meditron_train.corpus.card.pages import dataset_card, html, markdown
from meditron_train.corpus.declaration import load_corpus
from meditron_train.corpus.manifest import FinishedCorpus
from meditron_train.files import replace_text


def write_cards(root: Path, output: Path) -> list[Path]:
    """card.md, card.html, README.md (for the Hugging Face Hub) and croissant.json in `output`; returns their paths."""
    corpus = FinishedCorpus.open(root)
    facts = Facts.of(corpus, load_corpus(root / "corpus.yaml"))
    output.mkdir(parents=True, exist_ok=True)
    pages = {
        "card.md": markdown(facts),
        "card.html": html(facts),
        "README.md": dataset_card(facts),
        "croissant.json": json.dumps(croissant(facts), indent=1, ensure_ascii=False) + "\n",
    }
    for name, text in pages.items():
        replace_text(output / name, text)
    return [output / name for name in pages]
