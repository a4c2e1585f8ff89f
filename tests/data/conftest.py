"""Tiny tokenizers and datasets, made once."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

WORDS = [
    "aspirin",
    "lowers",
    "fever",
    "and",
    "pain",
    "in",
    "adults",
    "while",
    "the",
    "trial",
    "of",
    "metoprolol",
]
WORDS += ["showed", "fewer", "strokes", "after", "two", "years", "patients", "with", "type", "2", "diabetes"]
WORDS += ["received", "insulin", "10", "mg", "daily", "naïve", "β-blockers", "Ärzte", "心臓", "dose"]


def random_text(generator: random.Random, num_words: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(num_words))


@pytest.fixture(scope="session")
def corpus_lines() -> list[str]:
    generator = random.Random(0)
    return [random_text(generator, generator.randint(5, 40)) for _ in range(300)]


@pytest.fixture(scope="session")
def sentencepiece_directory(tmp_path_factory: pytest.TempPathFactory, corpus_lines: list[str]) -> Path:
    """A Llama-like sentencepiece BPE model of 400 pieces with byte fallback."""
    import sentencepiece

    directory = tmp_path_factory.mktemp("sentencepiece")
    with open(directory / "tokenizer.model", "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus_lines),
            model_writer=model,
            vocab_size=400,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    return directory


@pytest.fixture(scope="session")
def hugging_face_directory(tmp_path_factory: pytest.TempPathFactory, corpus_lines: list[str]) -> Path:
    """A byte-level BPE tokenizer.json with <s> and </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus_lines, trainer)
    directory = tmp_path_factory.mktemp("hugging_face")
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
