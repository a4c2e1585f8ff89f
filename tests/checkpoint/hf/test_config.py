"""config.json: every spelling of transformers 4.x and 5.x in, both out; the rest is refused by name."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meditron_train.checkpoint.hf.config import model_config_from_hf, model_config_to_hf, read_hf_config
from meditron_train.config.model_config import ModelConfig, RopeConfig
from meditron_train.errors import UserError

LLAMA2_7B = {  # as published, written by transformers 4.31
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
    "torch_dtype": "float16", "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
LLAMA3_SCALING = {
    "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3",
}  # fmt: skip

positive = st.floats(0.5, 64.0, allow_nan=False)
ropes = st.one_of(
    st.builds(RopeConfig, theta=positive),
    st.builds(RopeConfig, theta=positive, kind=st.sampled_from(["linear", "dynamic"]), factor=positive),
    st.builds(
        RopeConfig, theta=positive, kind=st.just("llama3"), factor=positive, low_freq_factor=positive,
        high_freq_factor=positive, original_max_position_embeddings=st.integers(1, 9999),
    ),
)  # fmt: skip
token_ids = st.one_of(st.none(), st.integers(0, 99))


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    num_kv_heads = draw(st.integers(1, 4))
    return ModelConfig(
        vocab_size=draw(st.integers(1, 999)),
        hidden_size=draw(st.integers(1, 999)),
        intermediate_size=draw(st.integers(1, 999)),
        num_layers=draw(st.integers(1, 9)),
        num_heads=num_kv_heads * draw(st.integers(1, 4)),
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.integers(1, 64)) * 2,
        max_position_embeddings=draw(st.integers(1, 99999)),
        rms_norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        rope=draw(ropes),
        tie_embeddings=draw(st.booleans()),
        initializer_range=draw(st.floats(0.0, 1.0)),
        bos_token_id=draw(token_ids),
        eos_token_id=draw(
            st.one_of(token_ids, st.lists(st.integers(0, 99), min_size=1, max_size=3).map(tuple))
        ),
        pad_token_id=draw(token_ids),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
    )


@given(models())
@settings(max_examples=200, deadline=None)
def test_writing_and_reading_gives_the_same_model(model: ModelConfig) -> None:
    text = json.dumps(model_config_to_hf(model))
    assert model_config_from_hf(json.loads(text)) == model


@given(models())
@settings(max_examples=50, deadline=None)
def test_each_spelling_alone_says_the_same(model: ModelConfig) -> None:
    both = model_config_to_hf(model)
    as_4x = {key: value for key, value in both.items() if key not in ("rope_parameters", "dtype")}
    as_5x = {
        key: value for key, value in both.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")
    }
    assert model_config_from_hf(as_4x) == model_config_from_hf(as_5x) == model


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(theta=1e6),
        RopeConfig(theta=5e4, kind="linear", factor=4.0),
        RopeConfig(kind="dynamic", factor=2.0),
        RopeConfig(theta=5e5, kind="llama3", factor=8.0, original_max_position_embeddings=64),
    ],
)
def test_transformers_computes_the_same_frequencies(rope: RopeConfig) -> None:
    """The installed transformers builds the same RoPE from our file as from its own arguments."""
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    sizes = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    model = model_config_from_hf({**sizes, "model_type": "llama", "max_position_embeddings": 256})
    model = model.model_copy(update={"rope": rope})
    parameters = {"rope_theta": rope.theta, "rope_type": rope.kind}
    if rope.kind != "default":
        parameters["factor"] = rope.factor
    if rope.kind == "llama3":
        parameters |= {
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    want = LlamaRotaryEmbedding(LlamaConfig(**sizes, max_position_embeddings=256, rope_parameters=parameters))
    got = LlamaRotaryEmbedding(LlamaConfig(**model_config_to_hf(model)))
    assert torch.equal(got.inv_freq, want.inv_freq)


def test_what_transformers_saves_is_read(tmp_path) -> None:
    from transformers import LlamaConfig

    parameters = {"rope_theta": 1e6, **LLAMA3_SCALING}
    LlamaConfig(
        vocab_size=131, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=8192, rope_parameters=parameters,
        tie_word_embeddings=True, eos_token_id=[2, 7], dtype="bfloat16", architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    model = read_hf_config(tmp_path)
    assert (model.vocab_size, model.num_heads, model.num_kv_heads, model.head_dim) == (131, 6, 2, 16)
    assert model.rope == RopeConfig(
        theta=1e6, kind="llama3", factor=32.0, original_max_position_embeddings=8192
    )
    assert model.tie_embeddings and model.eos_token_id == (2, 7) and model.dtype == "bfloat16"
    saved = json.loads((tmp_path / "config.json").read_text())
    ours = model_config_to_hf(model)
    assert set(saved) <= set(ours)
    differing = {k for k in saved if saved[k] != ours[k]} - {"transformers_version"}
    assert not differing


def test_published_llama_2_7b() -> None:
    model = model_config_from_hf(LLAMA2_7B)
    assert model.num_parameters == 6_738_415_616
    assert model.head_dim == 128 and model.rope == RopeConfig() and model.dtype == "float16"


def test_code_llama_and_llama_3_scaling() -> None:
    code_llama = model_config_from_hf({**LLAMA2_7B, "rope_theta": 1000000, "vocab_size": 32016})
    assert code_llama.rope == RopeConfig(theta=1e6)
    linear = model_config_from_hf({**LLAMA2_7B, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert linear.rope == RopeConfig(kind="linear", factor=2.0)
    llama3 = model_config_from_hf({**LLAMA2_7B, "rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING})
    assert llama3.rope == RopeConfig(
        theta=5e5, kind="llama3", factor=32.0, original_max_position_embeddings=8192
    )


def test_keys_that_a_file_may_leave_out() -> None:
    keys = (
        "architectures",
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
    )
    model = model_config_from_hf({key: LLAMA2_7B[key] for key in (*keys, "num_attention_heads")})
    assert (model.num_kv_heads, model.head_dim, model.max_position_embeddings) == (32, 128, 2048)
    assert (model.rms_norm_eps, model.bos_token_id, model.eos_token_id, model.pad_token_id) == (
        1e-6,
        1,
        2,
        None,
    )
    assert model.dtype == "float32" and not model.tie_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
            "GPT2LMHeadModel) is not supported. Supported: Llama",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        (
            {"architectures": ["GemmaForCausalLM"]},
            "GemmaForCausalLM is not supported with model_type 'llama'",
        ),
        ({"architectures": None, "model_type": "gemma2"}, "'gemma2' is not supported. Supported: Llama"),
        (
            {"architectures": ["MistralForCausalLM"]},
            "MistralForCausalLM is not supported with model_type 'llama'",
        ),
        ({"architectures": None, "model_type": None}, "neither architectures nor model_type"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0}},
            "'yarn' is not supported. Supported: default, linear",
        ),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "needs factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs low_freq_factor, high_freq_factor"),
        ({"rope_scaling": "linear"}, "must be an object"),
        ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, "disagree"),
        ({"partial_rotary_factor": 0.5, "rope_theta": 1e4}, "partial_rotary_factor"),
        ({"torch_dtype": "float8_e4m3fn"}, "'float8_e4m3fn'"),
        ({"dtype": "float32"}, "dtype is float32 but torch_dtype is float16"),
        ({"hidden_size": None}, "missing hidden_size"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers = '32'"),
        ({"vocab_size": 0}, "vocab_size = 0"),
        ({"num_key_value_heads": 5}, "not a multiple of num_key_value_heads = 5"),
        ({"num_attention_heads": 36, "num_key_value_heads": 36}, "not a multiple of num_attention_heads"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"num_key_value_heads": "8"}, "num_key_value_heads = '8': must be a positive integer"),
        ({"num_key_value_heads": 0}, "num_key_value_heads = 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True: must be a positive integer"),
        ({"max_position_embeddings": 4096.0}, "max_position_embeddings = 4096.0: must be a positive integer"),
        ({"head_dim": "128"}, "head_dim = '128'"),
        ({"head_dim": 127}, "head_dim is 127: it must be even"),
        ({"hidden_size": 96}, "head_dim is 3: it must be even"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false': must be true or false"),
        ({"attention_bias": "false"}, "attention_bias = 'false': must be true or false"),
        ({"bos_token_id": True}, "bos_token_id = True: must be an integer"),
        ({"eos_token_id": [2, "7"]}, "eos_token_id = '7': must be an integer"),
        ({"rms_norm_eps": True}, "rms_norm_eps = True: must be a number"),
        ({"rope_theta": "1e4"}, "rope_theta = '1e4': must be a number"),
        ({"rope_theta": 1e4, "rope_parameters": "default"}, "rope_parameters = 'default': must be an object"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "factor = True: must be a number"),
        ({"architectures": {"0": "LlamaForCausalLM"}}, "must be a list"),
        ({"num_key_value_heads": "8", "head_dim": 1.5}, "head_dim = 1.5"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(UserError, match="here/config.json") as error:
        model_config_from_hf({**LLAMA2_7B, **change}, where="here/config.json")
    assert message in str(error.value)


def test_unreadable_files(tmp_path) -> None:
    with pytest.raises(UserError, match="there is no directory"):
        read_hf_config(tmp_path / "meta-llama")
    with pytest.raises(UserError, match="config.json does not exist"):
        read_hf_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="adapter of PEFT"):
        read_hf_config(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="must hold a JSON object"):
        read_hf_config(tmp_path)
