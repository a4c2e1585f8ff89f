"""A tiny sentencepiece tokenizer with byte fallback, trained on generated text, as Llama's is."""

from __future__ import annotations

import functools
import random
import tempfile
from pathlib import Path
from typing import Any

_SYLLABLES = ("ka", "mo", "ri", "ten", "zu", "pa", "lex", "or", "in", "dex", "ta", "vi", "ro", "ne", "é", "ß")
VOCAB_SIZE = 400


def generated_texts(number: int, seed: int = 0) -> list[str]:
    """Sentences of invented words."""
    dice = random.Random(seed)
    words = ["".join(dice.choices(_SYLLABLES, k=dice.randint(1, 4))) for _ in range(300)]
    return [
        " ".join(dice.choices(words, k=dice.randint(3, 12))) + dice.choice([".", "!", " 12 mg"])
        for _ in range(number)
    ]


def awkward_texts(number: int, seed: int = 1) -> list[str]:
    """Strings of spaces, newlines, characters beyond the vocabulary, and known syllables in any order."""
    dice = random.Random(seed)
    alphabet = [*_SYLLABLES, " ", "  ", "\n", "\t", "漢", "🧬", "▁", ".", "½", "\u00a0", "Ä"]
    return ["".join(dice.choices(alphabet, k=dice.randint(0, 12))) for _ in range(number)]


def write_tokenizer_model(directory: Path, **options: Any) -> Path:
    """Write `directory/tokenizer.model`; options go to sentencepiece's trainer. Returns `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(_train(tuple(sorted(options.items()))))
    return directory


@functools.cache
def _train(options: tuple[tuple[str, Any], ...]) -> bytes:
    import sentencepiece

    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "split_digits": True, "allow_whitespace_only_pieces": True,
        "minloglevel": 2, **dict(options),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        prefix = str(Path(directory) / "tokenizer")
        sentences = iter(generated_texts(1500))
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=sentences, model_prefix=prefix, **settings)
        return Path(prefix + ".model").read_bytes()
