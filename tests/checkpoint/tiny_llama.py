"""Tiny random models on disk, written by transformers, for the tests of checkpoints and conversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def write_tiny_llama(
    directory: Path, *, dtype: str = "float32", max_shard_size: str = "5GB", seed: int = 0, **changes: Any
) -> Path:
    """Save a random Llama with transformers, or a model of the family that `model_type` names; returns `directory`.

    `changes` are arguments of its configuration; None leaves one out.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = dict(
        model_type="llama", vocab_size=131, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, head_dim=16, max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(seed)
    settings = {
        key: value for key, value in {**sizes, **changes}.items() if key != "head_dim" or value is not None
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).to(getattr(torch, dtype))
    for (
        name,
        parameter,
    ) in model.named_parameters():  # norms start at one, biases at zero: a mix-up would not show
        if "norm" in name or name.endswith(".bias"):
            parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory of safetensors files, read by the safetensors library."""
    from safetensors.torch import load_file

    return {
        name: t for path in sorted(directory.glob("*.safetensors")) for name, t in load_file(path).items()
    }


def rewrite_tensors(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace the single model.safetensors of `directory`."""
    from safetensors.torch import save_file

    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, directory / "model.safetensors")


def change_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON object on disk."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_same_bits(got: torch.Tensor, want: torch.Tensor, name: str = "") -> None:
    assert got.dtype == want.dtype and got.shape == want.shape, name
    got, want = got.reshape(-1).contiguous(), want.reshape(-1).contiguous()
    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)), name
