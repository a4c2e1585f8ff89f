"""RoPE tables against transformers' own, for every scaling."""

from __future__ import annotations

import pytest
import torch

from meditron_train.config.model_config import ModelConfig, RopeConfig
from meditron_train.model.rope import cos_sin
from meditron_train.native import Rotation

SCALINGS = {
    "default": ({"rope_type": "default", "rope_theta": 10000.0}, RopeConfig()),
    "code-llama": ({"rope_type": "default", "rope_theta": 1e6}, RopeConfig(theta=1e6)),
    "linear": (
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        RopeConfig(kind="linear", factor=4.0),
    ),
    "dynamic": (
        {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        RopeConfig(kind="dynamic", factor=2.0),
    ),
    "llama3": (
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        RopeConfig(
            kind="llama3",
            theta=500000.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
}


def model_config(rope: RopeConfig) -> ModelConfig:
    return ModelConfig(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=112,
        num_layers=1,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope=rope,
    )


def reference_tables(parameters: dict, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' tables for one document on its own."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=64, rope_parameters=dict(parameters)
    )
    embedding = LlamaRotaryEmbedding(config)
    cos, sin = embedding(torch.zeros(1), torch.arange(length)[None])
    return cos[0], sin[0]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_tables_equal_transformers_for_each_document(scaling):
    parameters, rope = SCALINGS[scaling]
    lengths = [
        5,
        64,
        90,
        1,
        40,
    ]  # 90 is longer than the model was trained for: dynamic scaling acts on it alone
    positions = torch.cat([torch.arange(n) for n in lengths])
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    cos, sin = cos_sin(model_config(rope), positions, cu_seqlens)
    expected = [reference_tables(parameters, n) for n in lengths]
    torch.testing.assert_close(
        torch.cat((cos, cos), 1), torch.cat([c for c, _ in expected]), rtol=0, atol=2e-5
    )
    torch.testing.assert_close(
        torch.cat((sin, sin), 1), torch.cat([s for _, s in expected]), rtol=0, atol=2e-5
    )


def test_rotation_equals_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(12, 4, 16, generator=generator), torch.randn(12, 2, 16, generator=generator)
    cos, sin = cos_sin(model_config(RopeConfig()), torch.arange(12))
    expected_q, expected_k = apply_rotary_pos_emb(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        torch.cat((cos, cos), 1)[None],
        torch.cat((sin, sin), 1)[None],
    )
    rotation = Rotation(cos, sin)
    torch.testing.assert_close(rotation.apply(q, None), expected_q[0].transpose(0, 1), rtol=0, atol=1e-6)
    torch.testing.assert_close(rotation.apply(k, None), expected_k[0].transpose(0, 1), rtol=0, atol=1e-6)


def test_rotation_keeps_the_dtype():
    rotation = Rotation(*cos_sin(model_config(RopeConfig()), torch.arange(3)))
    assert rotation.apply(torch.ones(3, 1, 16, dtype=torch.bfloat16), None).dtype == torch.bfloat16
