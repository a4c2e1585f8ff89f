"""A tiny random Llama with a tokenizer, as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from meditron_train.checkpoint.tokenizer.beside_model import copy_tokenizer
from tests.checkpoint.tiny_llama import write_tiny_llama
from tests.checkpoint.tiny_tokenizer import VOCAB_SIZE, write_tokenizer_model


def write_tiny_model(directory: Path, **changes: Any) -> Path:
    """Weights, config and tokenizer; `changes` are LlamaConfig arguments. Returns `directory`."""
    write_tiny_llama(directory, vocab_size=VOCAB_SIZE, bos_token_id=1, eos_token_id=2, **changes)
    copy_tokenizer(write_tokenizer_model(directory.with_name(directory.name + "-tokenizer")), directory)
    return directory
