"""A model in every format, for the tests of what compares them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from meditron_train.checkpoint.convert.from_hf import hf_to_sharded
from meditron_train.checkpoint.convert.to_hf import export_hf
from tests.checkpoint.tiny_llama import write_tiny_llama
from tests.checkpoint.tiny_tokenizer import write_tokenizer_model


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """hf/, the same as checkpoint/ and exported again as back/"""
    directory = tmp_path_factory.mktemp("models")
    write_tokenizer_model(write_tiny_llama(directory / "hf", vocab_size=400, dtype="bfloat16"))
    hf_to_sharded(directory / "hf", directory / "checkpoint")
    export_hf(directory / "checkpoint", directory / "back")
    return directory


@pytest.fixture
def back(models: Path, tmp_path: Path) -> Path:
    """A copy of back/ to spoil, without its manifest, which would see every change of a file."""
    target = tmp_path / "back"
    shutil.copytree(models / "back", target)
    (target / "manifest.json").unlink()
    return target
