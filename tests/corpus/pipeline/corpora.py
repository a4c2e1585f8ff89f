"""Small corpora of invented sentences, with duplicates and contamination planted at known places."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from meditron_train.corpus.declaration import Corpus

_SYLLABLES = "ba ce di fo gu ha ji ko lu me ni po qua re si to u va we xi yo za bre cla dro fli gre plo sta tri".split()
_LINKS = "of the,and the,to the,with a,that have,which were,in the,for a,by some,from each".split(",")


def word(rng: random.Random) -> str:
    return "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 4)))


def article(seed: int, sentences: int = 12) -> str:
    """English by its small words, and no two of its longer ones are likely to be those of another seed."""
    rng = random.Random(seed)
    parts = []
    for _ in range(sentences):
        middle = " ".join(f"{word(rng)} {rng.choice(_LINKS)} {word(rng)}" for _ in range(4))
        parts.append(f"The {word(rng)} {rng.choice(('was', 'is', 'had', 'will be'))} {middle}.")
    return " ".join(parts)


def nearly(text: str, seed: int) -> str:
    """The same text with one word changed."""
    words = text.split()
    words[random.Random(seed).randrange(len(words))] = "surprisingly"
    return " ".join(words)


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def source(name: str, path: Path | None, part: str = "papers", **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "part": part,
        "reader": "jsonl",
        "path": None if path is None else str(path),
        "options": {"id_key": "id", "metadata": {key: key for key in ("license", "url", "pmid", "doi")}},
        "license": "CC-BY-4.0",
        "redistribution": True,
        "citation": f"Invented by the tests: {name}",
        **more,
    }


def corpus(output: Path, sources: list[dict[str, Any]], **more: Any) -> Corpus:
    return Corpus.model_validate({"name": "test", "output": output, "sources": sources, **more})
