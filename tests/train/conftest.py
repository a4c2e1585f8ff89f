"""A small tokenizer, model and corpus, made once for all tests of training."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import yaml

VOCAB_SIZE = 300
WORDS = (
    "the dose of mevatrin for adults with lumen fever is four grams a day and never more than nine".split()
)


def train_tokenizer(directory: Path) -> None:
    import sentencepiece

    generator = random.Random(0)
    text = directory / "text.txt"
    text.write_text("\n".join(" ".join(generator.choices(WORDS, k=12)) for _ in range(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    text.unlink()
    (directory / "tokenizer.vocab").unlink()


@pytest.fixture(scope="session")
def hf_dir(tmp_path_factory) -> Path:
    """A tiny Hugging Face Llama with its tokenizer: layers for two pipeline stages, heads that our kernels take."""
    from meditron_train.data.tokenizing.tokenizer import load_tokenizer
    from tests.train.reference import hf_model

    directory = tmp_path_factory.mktemp("hf")
    train_tokenizer(directory)
    vocab_size = load_tokenizer(directory).vocab_size
    hf_model(
        vocab_size=vocab_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        bos_token_id=1,
        eos_token_id=2,
    ).save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    return directory


def write_corpus(prefix: Path, vocab_size: int, *, num_documents: int, seed: int) -> None:
    """Documents of 5 to 90 tokens with some regularity to learn."""
    from tests.data.indexed_writer import IndexedDatasetWriter

    generator = np.random.default_rng(seed)
    writer = IndexedDatasetWriter(prefix, np.dtype(np.uint16))
    for _ in range(num_documents):
        length = int(generator.integers(5, 90))
        start, stride = int(generator.integers(3, vocab_size)), int(generator.integers(1, 4))
        tokens = 3 + (start + stride * np.arange(length)) % (vocab_size - 3)
        writer.add_document(np.concatenate([[1], tokens, [2]]).astype(np.uint16))
    writer.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, hf_dir) -> Path:
    """Directory with the datasets `one`, `two` and `validation`."""
    directory = tmp_path_factory.mktemp("corpus")
    for seed, (name, num_documents) in enumerate({"one": 400, "two": 150, "validation": 60}.items()):
        write_corpus(directory / name, VOCAB_SIZE, num_documents=num_documents, seed=seed)
    return directory


@pytest.fixture
def write_config(tmp_path, hf_dir, corpus):
    """write_config(section={key: value}, …) → path of a YAML file for a short run in tmp_path/run."""

    def write(name: str = "config.yaml", **sections) -> Path:
        values = {
            "model": {"from": str(hf_dir)},
            "data": {
                "tokenizer": str(hf_dir),
                "train": [
                    {"name": "one", "path": str(corpus / "one"), "weight": 2.0},
                    {"name": "two", "path": str(corpus / "two"), "weight": 1.0},
                ],
                "validation": [{"name": "held-out", "path": str(corpus / "validation")}],
            },
            "optimizer": {"lr": 3.0e-3, "min_lr": 1.0e-4},
            "schedule": {"warmup_steps": 3},
            "train": {
                "steps": 20,
                "seq_len": 64,
                "micro_batch_size": 1,
                "global_batch_size": 4,
                "precision": "fp32",
                "device": "cpu",
            },
            "checkpoint": {"interval": 7, "export_hf": False},
            "validation": {"interval": 10, "steps": 2},
            "logging": {"run_dir": str(tmp_path / "run"), "wandb": "disabled", "tensorboard": False},
        }
        for section, content in sections.items():
            values[section] = {**values.get(section, {}), **content}
        path = tmp_path / name
        path.write_text(yaml.safe_dump(values))
        return path

    return write
