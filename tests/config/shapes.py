"""Shapes of the published Llama-2 models, and a small configuration to start tests from."""

from __future__ import annotations

from typing import Any

from meditron_train.config.model_config import ModelConfig
from meditron_train.config.schema import Config

_LLAMA2: dict[str, Any] = {
    "vocab_size": 32000,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
LLAMA2 = {
    "7b": ModelConfig(
        hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32, num_kv_heads=32, **_LLAMA2
    ),
    "13b": ModelConfig(
        hidden_size=5120, intermediate_size=13824, num_layers=40, num_heads=40, num_kv_heads=40, **_LLAMA2
    ),
    "70b": ModelConfig(
        hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64, num_kv_heads=8, **_LLAMA2
    ),
}


def small_config(**sections: dict[str, Any]) -> Config:
    """A valid configuration for 1 rank; each argument replaces keys of one section."""
    values: dict[str, Any] = {
        "model": {"from": "base"},
        "data": {"tokenizer": "base", "train": [{"name": "a", "path": "data/a"}]},
        "train": {"steps": 100, "seq_len": 256, "micro_batch_size": 2, "global_batch_size": 16},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return Config.model_validate(values)
