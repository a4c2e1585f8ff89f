"""run_config.yaml of Megatron-Bridge, made as its own dumper makes it: every field of the provider."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from meditron_train.checkpoint.hf.config import model_config_from_hf
from meditron_train.checkpoint.megatron.args import model_from_args
from meditron_train.checkpoint.megatron.bridge import read_run_config
from meditron_train.config.model_config import ModelConfig
from meditron_train.mcore import TransformerConfig
from tests.refusal import refused

# megatron.bridge.models.llama.llama_provider.Llama2ModelProvider7B, with small sizes.
LLAMA: dict[str, Any] = {
    "normalization": "RMSNorm", "gated_linear_unit": True, "position_embedding_type": "rope", "rotary_base": 10000,
    "rotary_percent": 1.0, "add_bias_linear": False, "attention_dropout": 0.0, "hidden_dropout": 0.0,
    "share_embeddings_and_output_weights": False, "bias_activation_fusion": True, "masked_softmax_fusion": True,
    "persist_layer_norm": True, "bias_dropout_fusion": True, "apply_rope_fusion": True, "num_query_groups": 2,
    "num_layers": 2, "hidden_size": 48, "num_attention_heads": 6, "ffn_hidden_size": 80, "seq_length": 64,
    "layernorm_epsilon": 1e-6, "vocab_size": 131, "should_pad_vocab": True, "kv_channels": 8,
    "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
}  # fmt: skip
PROVIDER: dict[str, Any] = {
    "_target_": "megatron.bridge.models.llama.llama_provider.LlamaModelProvider",
    "fp16_lm_cross_entropy": False, "parallel_output": True, "make_vocab_size_divisible_by": 128,
    "seq_len_interpolation_factor": None, "attention_softmax_in_fp32": False, "deallocate_pipeline_outputs": True,
    "scatter_embedding_sequence_parallel": True, "tp_only_amax_red": False, "tp_comm_overlap_cfg": None,
    "use_transformer_engine_full_layer_spec": False, "use_transformer_engine_op_fuser": False,
    "transformer_layer_spec": {
        "_target_": "megatron.bridge.models.gpt_provider.default_layer_spec", "_call_": False
    },
    "generation_config": {"_target_": "transformers.GenerationConfig.from_dict", "config_dict": {"top_p": 0.9}},
    "moe_grouped_gemm": False, "mtp_enabled": False, "init_model_with_meta_device": False,
    "use_te_rng_tracker": False, "enable_cuda_graph": False, "virtual_pipeline_model_parallel_size": None,
    "account_for_embedding_in_pipeline_split": False, "account_for_loss_in_pipeline_split": False,
    "cross_entropy_loss_fusion": True, "gradient_accumulation_fusion": True, "restore_modelopt_state": False,
    "bias_dropout_add_fusion": True, "hf_model_id": "meta-llama/Llama-2-7b-hf",
    "params_dtype": {"_target_": "torch.bfloat16", "_call_": False},
    "attention_backend": {
        "_target_": "megatron.core.transformer.enums.AttnBackend", "_call_": True, "_args_": [5], "_name_": "auto"
    },
}  # fmt: skip


def core_fields() -> dict[str, Any]:
    """megatron-core's own, as far as YAML can say their defaults."""
    plain = (type(None), bool, int, float, str)
    return {
        field.name: field.default
        for field in dataclasses.fields(TransformerConfig)
        if isinstance(field.default, plain)
    }


def write(directory: Path, *, nested: bool = False, **changes: Any) -> Path:
    core = {**core_fields(), **LLAMA, **changes}
    if nested:
        names = {field.name for field in dataclasses.fields(TransformerConfig)}
        transformer = {name: value for name, value in core.items() if name in names}
        transformer["activation_func"] = "silu"
        outer = {name: value for name, value in core.items() if name not in names}
        model = {
            "_builder_": "megatron.bridge.models.gpt.gpt_builder.GPTModelBuilder",
            **outer,
            "transformer": transformer,
        }
    else:
        model = {**PROVIDER, **core}
    content = {
        "model": model,
        "train": {"train_iters": 9},
        "tokenizer": {"tokenizer_type": "HuggingFaceTokenizer"},
    }
    (directory / "run_config.yaml").write_text(yaml.safe_dump(content))
    return directory


def model_of(directory: Path) -> ModelConfig:
    return model_from_args(read_run_config(directory), None, "float32", "iter_0000010")


@pytest.mark.parametrize("nested", [False, True], ids=["provider", "builder"])
def test_it_describes_the_model(tmp_path: Path, nested: bool) -> None:
    wanted = model_config_from_hf(
        {
            "model_type": "llama", "vocab_size": 131, "hidden_size": 48, "intermediate_size": 80,
            "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
            "bos_token_id": None, "eos_token_id": None,
        }
    )  # fmt: skip
    assert model_of(write(tmp_path, nested=nested)) == wanted
    tied = write(tmp_path, nested=nested, share_embeddings_and_output_weights=True, num_query_groups=None)
    assert model_of(tied).tie_embeddings and model_of(tied).num_kv_heads == 6
    assert model_of(write(tmp_path, nested=nested, rotary_base=500000)).rope.theta == 500000.0


@pytest.mark.parametrize(
    "change",
    [
        {"activation_func": {"_target_": "torch.nn.functional.gelu", "_call_": False}},
        {"normalization": "LayerNorm"},
        {"position_embedding_type": "learned_absolute"},
        {"rotary_percent": 0.5},
        {"seq_len_interpolation_factor": 4.0},
        {"scale_factor": 8.0},  # of Llama31ModelProvider, which scales RoPE by it
        {"qk_layernorm": True},
        {"num_moe_experts": 8},
        {"add_bias_linear": True},
        {"transformer_layer_spec": {"_target_": "mine.layer_spec", "_call_": False}},
    ],
    ids=str,
)
def test_what_changes_the_model_is_refused_by_name(tmp_path: Path, change: dict[str, Any]) -> None:
    with refused(next(iter(change))):
        model_of(write(tmp_path, **change))


def test_what_is_no_run_config(tmp_path: Path) -> None:
    assert read_run_config(tmp_path) == {}
    (tmp_path / "run_config.yaml").write_text("train: {train_iters: 9}\n")
    with refused("run_config.yaml has no section model"):
        read_run_config(tmp_path)
    (tmp_path / "run_config.yaml").write_text("model: {hidden_size: 48}\n")
    with refused("run_config.yaml", "lacks activation_func, add_bias_linear"):
        read_run_config(tmp_path)
    (tmp_path / "run_config.yaml").write_text("model: !!python/object/apply:os.system [touch x]\n")
    with refused("run_config.yaml is not valid YAML"):
        read_run_config(tmp_path)
