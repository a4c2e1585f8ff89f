"""No key of a config.json passes unread: each is used, harmless, or refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config

from meditron_train.checkpoint.hf.config import model_config_from_hf
from meditron_train.checkpoint.hf.families import FAMILIES
from meditron_train.checkpoint.hf.keys import _OFF, HARMLESS, USED
from tests.refusal import refused

CLASSES: tuple[type[PretrainedConfig], ...] = (LlamaConfig, MistralConfig, Qwen2Config)
# The arguments of the same classes and of PretrainedConfig in transformers 4.57, and what its kwargs take.
FIELDS_4_57 = """
add_cross_attention architectures attention_bias attention_dropout attn_implementation bos_token_id
chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id dtype eos_token_id finetuning_task
gradient_checkpointing head_dim hidden_act hidden_size id2label initializer_range intermediate_size is_decoder
is_encoder_decoder label2id layer_types max_position_embeddings max_window_layers mlp_bias model_type name_or_path
num_attention_heads num_hidden_layers num_key_value_heads num_labels output_attentions output_hidden_states
pad_token_id prefix pretraining_tp problem_type pruned_heads return_dict rms_norm_eps rope_scaling rope_theta
sep_token_id sliding_window task_specific_params tf_legacy_loss tie_encoder_decoder tie_word_embeddings
tokenizer_class torch_dtype torchscript transformers_version use_bfloat16 use_cache use_sliding_window vocab_size
bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values
repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
""".split()
SMALL: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.mark.parametrize("kind", CLASSES)
def test_every_field_of_the_installed_transformers_is_in_one_class(kind: type[PretrainedConfig]) -> None:
    fields = {*(field.name for field in dataclasses.fields(kind)), *kind().to_dict()}
    assert fields >= {"hidden_size", "rope_parameters", "use_cache"}
    assert fields <= USED | HARMLESS | set(_OFF)


def test_every_field_of_transformers_4_57_is_in_one_class() -> None:
    assert set(FIELDS_4_57) <= USED | HARMLESS | set(_OFF)
    assert not HARMLESS & (USED | set(_OFF))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_transformers_defaults_are_accepted(family: Any) -> None:
    kind = next(kind for kind in CLASSES if kind.model_type == family.model_type)
    model_config_from_hf({**kind().to_dict(), "architectures": [family.architecture]})


@pytest.mark.parametrize("key", sorted(_OFF))
def test_what_the_model_does_not_have_is_refused_by_name(key: str) -> None:
    value = True if key in ("attention_bias", "mlp_bias") else {"a": 1} if key == "quantization_config" else 7
    with refused("here/config.json", key):
        model_config_from_hf({**SMALL, key: value}, where="here/config.json")
    model_config_from_hf({**SMALL, key: None})


def test_an_unknown_key_is_refused_unless_it_asks_for_nothing() -> None:
    with refused("use_mixture_of_depths = true", "quantization = {", "remove it"):
        model_config_from_hf({**SMALL, "use_mixture_of_depths": True, "quantization": {"bits": 4}})
    model_config_from_hf({**SMALL, "use_mixture_of_depths": False, "quantization": None, "adapters": []})


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"rope_parameters": {"full_attention": YARN}}, ["rope_parameters", "per layer type", "'full_attention'"]),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
            ["per layer type", "without the layer type"],
        ),
        ({"rope_parameters": YARN}, ["'yarn' is not supported"]),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, ["rope_scaling", "'yarn' is not supported"]),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}, ["'mrope' is not supported"]),
        ({"rope_scaling": {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0}}, ["has no alpha = 1000.0"]),
        ({"rope_scaling": {"factor": 8.0}}, ["RoPE type 'default' has no factor = 8.0"]),
        ({"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 2.0}}, ["type disagree"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "attention_factor": 1.2}}, ["attention_factor"]),
        ({"rope_parameters": {"rope_type": ["linear"], "factor": 2.0}}, ["['linear'] is not supported"]),
        (
            {
                "original_max_position_embeddings": 16,
                "rope_scaling": {
                    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                },
            },
            ["original_max_position_embeddings is 32 here and 16 at the top", "two models"],
        ),
    ],
)  # fmt: skip
def test_rope_that_is_not_understood_is_refused(change: dict[str, Any], parts: list[str]) -> None:
    with refused("config.json", *parts):
        model_config_from_hf({**SMALL, **change})


def test_other_names_for_what_is_supported() -> None:
    plain = model_config_from_hf(SMALL)
    assert model_config_from_hf({**SMALL, "hidden_act": "swish", "torch_dtype": "auto"}) == plain
    assert model_config_from_hf({**SMALL, "rope_scaling": {"type": "default", "factor": 1.0}}) == plain
