from __future__ import annotations

import pytest
from pydantic import ValidationError

from meditron_train.config.model_config import ModelConfig, RopeConfig

TINY = {
    "vocab_size": 103,
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("head_dim", [8, 16])
def test_num_parameters_equals_transformers(num_kv_heads, tie_embeddings, head_dim):
    transformers = pytest.importorskip("transformers")
    shape = {**TINY, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "tie_embeddings": tie_embeddings}
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=103,
            hidden_size=32,
            intermediate_size=88,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=num_kv_heads,
            head_dim=head_dim,
            tie_word_embeddings=tie_embeddings,
        )
    )
    assert ModelConfig(**shape).num_parameters == sum(p.numel() for p in reference.parameters())


@pytest.mark.parametrize(
    ("vocab_size", "tp", "multiple", "padded"),
    [
        (32000, 1, 128, 32000),
        (32000, 8, 128, 32000),
        (32017, 1, 128, 32128),
        (32000, 3, 128, 32256),  # lcm(128, 3) = 384
        (32000, 1, 1, 32000),
        (103, 2, 1, 104),
        (1, 4, 128, 128),
    ],
)
def test_padded_vocab_size(vocab_size, tp, multiple, padded):
    model = ModelConfig(**{**TINY, "vocab_size": vocab_size})
    assert model.padded_vocab_size(tp, multiple) == padded
    assert padded % tp == padded % multiple == 0


def test_json_round_trip():
    model = ModelConfig(
        **TINY,
        rope=RopeConfig(theta=5e5, kind="llama3", factor=8.0, original_max_position_embeddings=8192),
        eos_token_id=(2, 7),
    )
    assert ModelConfig.model_validate_json(model.model_dump_json()) == model
    assert ModelConfig.model_validate(model.model_dump(mode="json")) == model


@pytest.mark.parametrize(
    "wrong", [{"num_kv_heads": 3}, {"hidden_size": 0}, {"rms_norm_eps": 0}, {"dtype": "int8"}, {"colour": 1}]
)
def test_impossible_shapes_are_refused(wrong):
    with pytest.raises(ValidationError):
        ModelConfig(**{**TINY, **wrong})


def test_frozen():
    model = ModelConfig(**TINY)
    with pytest.raises(ValidationError):
        model.vocab_size = 5  # type: ignore[misc]
