"""Families of models: published configurations are understood, transformers' own files too, and ours are complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from meditron_train.checkpoint.convert.from_hf import hf_to_sharded
from meditron_train.checkpoint.convert.to_hf import export_hf
from meditron_train.checkpoint.hf.config import model_config_from_hf, model_config_to_hf, read_hf_config
from meditron_train.checkpoint.hf.families import FAMILIES, find_family
from meditron_train.checkpoint.tensor_map import hf_shapes
from meditron_train.config.model_config import RopeConfig
from meditron_train.errors import UserError
from meditron_train.verify.verify import verify
from tests.checkpoint.tiny_llama import assert_same_bits, read_tensors, rewrite_tensors, write_tiny_llama
from tests.checkpoint.tiny_tokenizer import write_tokenizer_model
from tests.checkpoint.tokenizer.shapes import write_tokenizer_of
from tests.long import mostly_long

# What the config.json of the published models says (without keys that do not matter here), and their parameters.
PUBLISHED = {
    "Mistral-7B-v0.1": (
        7_241_732_096,
        {
            "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
            "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
            "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
            "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000,
        },
    ),
    "Mistral-7B-v0.3": (
        7_248_023_552,
        {
            "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
            "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
            "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
            "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32768,
        },
    ),
    "Qwen2.5-7B": (
        7_615_616_512,
        {
            "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
            "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,
            "intermediate_size": 18944, "max_position_embeddings": 131072, "max_window_layers": 28,
            "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False,
            "torch_dtype": "bfloat16", "use_mrope": False, "use_sliding_window": False, "vocab_size": 152064,
        },
    ),
    "Qwen2.5-0.5B": (
        494_032_768,
        {
            "architectures": ["Qwen2ForCausalLM"], "bos_token_id": 151643, "eos_token_id": 151643,
            "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
            "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24,
            "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
            "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_sliding_window": False,
            "vocab_size": 151936,
        },
    ),
    "TinyLlama-1.1B": (
        1_100_048_384,
        {
            "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2,
            "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 2048,
            "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 22, "num_key_value_heads": 4,
            "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
            "tie_word_embeddings": False, "torch_dtype": "float32", "vocab_size": 32000,
        },
    ),
    "CodeLlama-34b": (
        33_743_970_304,
        {
            "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
            "hidden_size": 8192, "intermediate_size": 22016, "max_position_embeddings": 16384,
            "model_type": "llama", "num_attention_heads": 64, "num_hidden_layers": 48, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05, "rope_theta": 1000000, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "vocab_size": 32000,
        },
    ),
    "Llama-3.2-1B": (
        1_235_814_400,
        {
            "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 128000,
            "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
            "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
            "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 128256,
        },
    ),
    "llama-7b (the first)": (
        6_738_415_616,
        {
            "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
            "hidden_size": 4096, "intermediate_size": 11008, "max_sequence_length": 2048, "model_type": "llama",
            "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": 0, "rms_norm_eps": 1e-06,
            "torch_dtype": "float16", "vocab_size": 32000,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name: str) -> None:
    num_parameters, config = PUBLISHED[name]
    model = model_config_from_hf(config)
    assert model.num_parameters == num_parameters
    assert sum(torch.Size(shape).numel() for shape in hf_shapes(model).values()) == num_parameters
    back = model_config_to_hf(model)
    assert model_config_from_hf(back) == model
    # What was stated comes back, unless it had no effect (Qwen's window that is switched off).
    ineffective = {"use_mrope", "max_sequence_length"} | (
        {"sliding_window"} if config.get("use_sliding_window") is False else set()
    )
    assert {k: back.get(k) for k in config if k not in ineffective} == {
        k: v for k, v in config.items() if k not in ineffective
    }


def test_windows() -> None:
    mistral, qwen = PUBLISHED["Mistral-7B-v0.1"][1], PUBLISHED["Qwen2.5-7B"][1]
    assert model_config_from_hf(mistral).sliding_window == 4096
    without = {key: value for key, value in mistral.items() if key != "sliding_window"}
    assert model_config_from_hf(without).sliding_window == 4096  # MistralConfig's default
    assert model_config_from_hf({**mistral, "sliding_window": None}).sliding_window is None
    assert model_config_from_hf(qwen).sliding_window is None
    windowed = model_config_from_hf({**qwen, "use_sliding_window": True, "max_window_layers": 20})
    assert windowed.sliding_window == 131072
    assert [windowed.has_window(layer) for layer in (0, 19, 20, 27)] == [False, False, True, True]
    llama = PUBLISHED["TinyLlama-1.1B"][1]
    assert (
        model_config_from_hf({**llama, "sliding_window": 9}).sliding_window is None
    )  # LlamaForCausalLM has none


def test_layer_types_must_say_the_same() -> None:
    qwen = {**PUBLISHED["Qwen2.5-0.5B"][1], "num_hidden_layers": 2, "use_sliding_window": True}
    types = ["full_attention", "sliding_attention"]
    assert model_config_from_hf({**qwen, "max_window_layers": 1, "layer_types": types}).has_window(1)
    with pytest.raises(
        UserError, match="layer_types = .* is not what sliding_window and max_window_layers say"
    ):
        model_config_from_hf({**qwen, "max_window_layers": 1, "layer_types": types[::-1]})


def test_unknown_architectures_are_refused_with_those_that_are_known() -> None:
    config = {
        **PUBLISHED["TinyLlama-1.1B"][1],
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
    }
    with pytest.raises(UserError, match="architecture MixtralForCausalLM. is not supported") as error:
        model_config_from_hf(config)
    for family in FAMILIES:
        assert family.architecture in str(error.value)


@pytest.mark.parametrize(
    "names",
    [
        ["LlamaForCausalLM"],
        ["LLaMAForCausalLM"],
        ["FSDPLlamaForCausalLM"],
        ["LlamaForCausalLMPatched"],
        [],
        None,
    ],
)
def test_the_model_type_decides_whatever_a_program_calls_the_architecture(names: list[str] | None) -> None:
    config = {**PUBLISHED["TinyLlama-1.1B"][1], "architectures": names, "model_type": "llama"}
    assert find_family(config, "config.json").name == "llama"


def test_without_a_model_type_the_architecture_decides() -> None:
    config = {"architectures": ["LLaMAForCausalLM"]}
    assert find_family(config, "config.json").name == "llama"


TINY: dict[str, dict] = {
    "mistral": {
        "model_type": "mistral", "sliding_window": 5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "mistral-no-window": {"model_type": "mistral", "sliding_window": None, "dtype": "bfloat16"},
    "qwen2": {"model_type": "qwen2", "head_dim": None, "dtype": "bfloat16"},
    "qwen2-tied-window": {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", mostly_long(TINY, "mistral", "qwen2-tied-window"))
def test_what_transformers_saves_comes_back_to_the_byte(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    changes = TINY[kind]
    source, checkpoint, back = (tmp_path / name for name in ("source", "checkpoint", "back"))
    write_tiny_llama(source, vocab_size=512, num_hidden_layers=3, **changes)
    write_tokenizer_of(changes["model_type"], source)
    hf_to_sharded(source, checkpoint)
    export_hf(checkpoint, back)
    want, got = read_tensors(source), read_tensors(back)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert_same_bits(got[name], tensor, name)
    for a, b in ((source, checkpoint), (checkpoint, back), (source, back)):
        assert verify(a, b).differences == ()
    saved, ours = (json.loads((path / "config.json").read_text()) for path in (source, back))
    assert set(saved) <= set(ours)
    # Without a window max_window_layers has no effect; ours is the number of layers.
    assert {k for k in saved if saved[k] != ours[k]} - {"transformers_version"} <= (
        {"max_window_layers"} if not saved.get("use_sliding_window") else set()
    )
    ids = torch.arange(2 * 30).view(2, 30) * 7 % 512
    with torch.inference_mode():
        a, b = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
            for path in (source, back)
        )
    assert a.std() > 0.1
    assert torch.equal(a, b)


def test_a_tokenizer_that_the_family_would_change_is_refused(tmp_path: Path) -> None:
    """transformers 5.x gives a qwen2 a Qwen2Tokenizer, which splits text in its own way, whatever the files say."""
    source = write_tiny_llama(tmp_path / "source", vocab_size=512, model_type="qwen2", head_dim=None)
    write_tokenizer_model(source)
    with pytest.raises(UserError, match="model type qwen2 it takes the class Qwen2Tokenizer"):
        hf_to_sharded(source, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_a_family_mistaken_for_another_is_caught(tmp_path: Path) -> None:
    """A Qwen2 that its config.json calls a Llama would lose its biases, silently elsewhere."""
    source = write_tiny_llama(tmp_path / "qwen2", model_type="qwen2", head_dim=None)
    config = json.loads((source / "config.json").read_text())
    llama = {**config, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (source / "config.json").write_text(json.dumps(llama))
    with pytest.raises(UserError, match="does not have: model.layers.0.self_attn.k_proj.bias"):
        hf_to_sharded(source, tmp_path / "checkpoint")


def test_tied_head_stored_or_dropped_is_one_model(tmp_path: Path) -> None:
    """transformers 4.x may store the tied lm_head, 5.x drops it."""
    dropped = write_tiny_llama(
        tmp_path / "dropped", model_type="qwen2", head_dim=None, tie_word_embeddings=True
    )
    stored = write_tiny_llama(
        tmp_path / "stored", model_type="qwen2", head_dim=None, tie_word_embeddings=True
    )
    tensors = read_tensors(stored)
    assert "lm_head.weight" not in tensors
    rewrite_tensors(stored, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    assert verify(stored, dropped).differences == ()
    hf_to_sharded(stored, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert "lm_head.weight" not in read_tensors(tmp_path / "back")
    assert verify(stored, tmp_path / "back").differences == ()


# Keys that vLLM reads from config.json of these families (its models/llama.py, which also serves Mistral, and
# models/qwen2.py; config/model.py for dtype and window; transformers_utils/config.py for RoPE).
READ_BY_VLLM = {
    "architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "hidden_act", "rms_norm_eps", "max_position_embeddings",
    "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings", "torch_dtype", "dtype", "pad_token_id",
    "bos_token_id", "eos_token_id",
}  # fmt: skip
READ_BY_VLLM_IN = {
    "llama": {"attention_bias", "mlp_bias", "head_dim"},
    "mistral": {"sliding_window", "head_dim"},
    "qwen2": {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"},
}


@pytest.mark.parametrize("model_type", mostly_long(READ_BY_VLLM_IN, "llama", "qwen2"))
def test_an_exported_directory_has_what_vllm_reads(tmp_path: Path, model_type: str) -> None:
    changes = {"head_dim": None} if model_type == "qwen2" else {}
    source = write_tiny_llama(tmp_path / "source", vocab_size=512, model_type=model_type, **changes)
    write_tokenizer_of(model_type, source)
    hf_to_sharded(source, tmp_path / "checkpoint")
    back = tmp_path / "back"
    export_hf(tmp_path / "checkpoint", back)
    config = json.loads((back / "config.json").read_text())
    assert READ_BY_VLLM | READ_BY_VLLM_IN[model_type] <= set(config)
    if model_type == "qwen2":  # vLLM refuses a window on some layers only, and takes the key as a sign of one
        assert config["sliding_window"] is None and config["max_window_layers"] == config["num_hidden_layers"]
    # Weights, tokenizer and generation settings under the names it looks for.
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (back / name).is_file()


def test_rope_survives_every_direction(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 123456.0, "factor": 4.0}
    source = write_tiny_llama(tmp_path / "source", model_type="mistral", rope_parameters=rope)
    hf_to_sharded(source, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    want = RopeConfig(theta=123456.0, kind="linear", factor=4.0)
    assert read_hf_config(source).rope == read_hf_config(tmp_path / "back").rope == want
