"""The output layer of a tied model, stored or not, under either name; names that wrappers leave behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from meditron_train.checkpoint.hf.read import open_hf_model
from meditron_train.checkpoint.tied_head import EMBEDDING, HEAD
from meditron_train.verify.inspect import inspect_directory
from meditron_train.verify.verify import verify
from tests.checkpoint.tiny_llama import (
    assert_same_bits,
    change_json,
    read_tensors,
    rewrite_tensors,
    write_tiny_llama,
)
from tests.refusal import refused


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tied", tie_word_embeddings=True)


def transformers_logits(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory).eval()(torch.arange(9)[None]).logits


def test_a_trained_output_layer_is_not_dropped(tied: Path) -> None:
    tensors = read_tensors(tied)
    head = tensors[EMBEDDING] + 0.01 * torch.randn_like(tensors[EMBEDDING])
    rewrite_tensors(tied, {**tensors, HEAD: head})
    with refused(str(tied), HEAD, "other values", "Set tie_word_embeddings to false"):
        open_hf_model(tied)
    problems = inspect_directory(tied)["problems"]
    assert any("tie_word_embeddings" in problem for problem in problems)
    change_json(tied / "config.json", tie_word_embeddings=False)
    assert_same_bits(open_hf_model(tied)[1].read(HEAD), head)


def test_one_bit_of_the_last_row_makes_another_head(tied: Path) -> None:
    tensors = read_tensors(tied)
    head = tensors[EMBEDDING].clone()
    head[-1, -1] = torch.nextafter(head[-1, -1], torch.tensor(9.0))
    rewrite_tensors(tied, {**tensors, HEAD: head})
    with refused(HEAD):
        open_hf_model(tied)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_copy_of_the_embedding_is_fine(tied: Path, dtype: torch.dtype) -> None:
    tensors = read_tensors(tied)
    rewrite_tensors(tied, {**tensors, HEAD: tensors[EMBEDDING].to(dtype)})
    open_hf_model(tied)
    if dtype == torch.float32:
        assert not inspect_directory(tied)["problems"][1:]  # the first: there is no tokenizer


def test_the_embedding_under_the_name_of_the_output_layer(tied: Path, tmp_path: Path) -> None:
    """As safetensors.torch.save_model stores a tied model."""
    want, tensors = transformers_logits(tied), read_tensors(tied)
    other = write_tiny_llama(tmp_path / "other", tie_word_embeddings=True)
    rewrite_tensors(other, {HEAD if n == EMBEDDING else n: t for n, t in tensors.items()})
    assert torch.equal(transformers_logits(other), want)
    _, source = open_hf_model(other)
    assert_same_bits(source.read(EMBEDDING, rows=(3, 9)), tensors[EMBEDDING][3:9])
    assert HEAD not in source.names and source.place(EMBEDDING) == ["model.safetensors"]
    assert not [d for d in verify(tied, other).differences if d.kind == "tensor"]


@pytest.mark.parametrize("absent", [HEAD, EMBEDDING])
def test_an_index_that_names_what_a_tied_model_leaves_out(tmp_path: Path, absent: str) -> None:
    directory = write_tiny_llama(tmp_path, tie_word_embeddings=True, max_shard_size="50KB")
    want = transformers_logits(directory)
    if absent == EMBEDDING:
        from safetensors.torch import load_file, save_file

        for path in directory.glob("*.safetensors"):
            tensors = {HEAD if n == EMBEDDING else n: t for n, t in load_file(path).items()}
            save_file(tensors, path, {"format": "pt"})
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    place = index["weight_map"][EMBEDDING]
    change_json(path, weight_map={**index["weight_map"], EMBEDDING: place, HEAD: place})
    assert torch.equal(transformers_logits(directory), want)
    _, source = open_hf_model(directory)
    assert EMBEDDING in source.names and HEAD not in source.names


def test_an_untied_model_needs_its_output_layer(tmp_path: Path) -> None:
    directory = write_tiny_llama(tmp_path)
    tensors = read_tensors(directory)
    del tensors[HEAD]
    rewrite_tensors(directory, tensors)
    with refused("missing tensors: lm_head.weight"):
        open_hf_model(directory)


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("", "module.", "wrapper"),
        ("", "_orig_mod.", "wrapper"),
        ("", "module._orig_mod.", "wrapper"),
        ("layers.0.", "layers.0._checkpoint_wrapped_module.", "wrapper"),
        ("", "base_model.model.", "wrapper"),
        ("", "language_model.", "larger model"),
    ],
)
def test_names_of_a_wrapper_are_said(tmp_path: Path, old: str, new: str, what: str) -> None:
    directory = write_tiny_llama(tmp_path)
    tensors = read_tensors(directory)
    rewrite_tensors(directory, {n.replace(old, new, 1): t for n, t in tensors.items()})
    with refused(str(directory), what, "must be", "rename the tensors"):
        open_hf_model(directory)


def test_a_tied_model_saved_without_its_output_layer(tied: Path) -> None:
    """As LlamaModel.save_pretrained names the tensors."""
    want, tensors = transformers_logits(tied), read_tensors(tied)
    rewrite_tensors(tied, {name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    assert torch.equal(transformers_logits(tied), want)
    _, source = open_hf_model(tied)
    assert set(source.names) == set(tensors)
