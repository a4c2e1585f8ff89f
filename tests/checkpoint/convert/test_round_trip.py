"""Hugging Face -> sharded -> Hugging Face gives back every byte of every tensor, and the same logits."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meditron_train.checkpoint.convert.engine import Limits
from meditron_train.checkpoint.convert.from_hf import hf_to_sharded
from meditron_train.checkpoint.convert.to_hf import export_hf
from meditron_train.checkpoint.hf.config import model_config_from_hf, model_config_to_hf, read_hf_config
from meditron_train.checkpoint.hf.plan import INDEX_NAME, plan_safetensors, safetensors_index
from meditron_train.checkpoint.manifest import verify_manifest
from meditron_train.checkpoint.sharded.read import ShardedSource
from meditron_train.checkpoint.tensor_map import hf_shapes
from meditron_train.verify.verify import verify
from tests.checkpoint.planned import planned, write_planned
from tests.checkpoint.tiny_llama import (
    assert_same_bits,
    change_json,
    read_tensors,
    rewrite_tensors,
    write_tiny_llama,
)
from tests.checkpoint.tiny_tokenizer import write_tokenizer_model
from tests.long import mostly_long
from tests.refusal import refused

LLAMA3 = {
    "rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
MODELS = {
    "gqa": {},
    "mha": {"num_key_value_heads": 6, "head_dim": 8},
    "mqa-tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "bf16-shards": {"dtype": "bfloat16", "max_shard_size": "40KB"},
    "fp16-llama3": {"dtype": "float16", "rope_parameters": LLAMA3, "eos_token_id": [2, 5]},
    "linear": {"rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0}},
    "dynamic": {"rope_parameters": {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}},
}


@pytest.mark.parametrize("name", mostly_long(MODELS, "gqa", "mqa-tied", "bf16-shards", "fp16-llama3"))
def test_there_and_back(tmp_path: Path, name: str) -> None:
    changes: dict = MODELS[name]
    source, checkpoint, back = (tmp_path / name for name in ("source", "checkpoint", "back"))
    write_tiny_llama(source, **changes)
    hf_to_sharded(source, checkpoint)
    assert verify_manifest(checkpoint) == []
    export_hf(checkpoint, back, max_shard_size="60KB")
    want, got = read_tensors(source), read_tensors(back)
    assert got.keys() == want.keys()
    for tensor_name, tensor in want.items():
        assert_same_bits(got[tensor_name], tensor, tensor_name)
    assert read_hf_config(back) == read_hf_config(source)
    for a, b in ((source, checkpoint), (checkpoint, back), (source, back)):
        assert verify(a, b).differences == ()


def test_transformers_computes_the_same_logits(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = write_tiny_llama(tmp_path / "source", rope_parameters=LLAMA3, num_hidden_layers=3)
    hf_to_sharded(source, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back", max_shard_size="100KB")
    ids = torch.arange(60).view(2, 30) % 131
    with torch.inference_mode():
        a, b = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name)(ids).logits for name in ("source", "back")
        )
    assert a.std() > 0.1
    assert torch.equal(a, b)


@st.composite
def random_models(draw: st.DrawFn) -> dict:
    num_kv_heads, head_dim = draw(st.integers(1, 3)), draw(st.sampled_from([2, 4, 6]))
    return {
        "model_type": "llama",
        "vocab_size": draw(st.integers(1, 300)),
        "hidden_size": draw(st.integers(1, 20)),
        "intermediate_size": draw(st.integers(1, 20)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_key_value_heads": num_kv_heads,
        "num_attention_heads": num_kv_heads * draw(st.integers(1, 3)),
        "head_dim": head_dim,
        "tie_word_embeddings": draw(st.booleans()),
        "dtype": draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        "rope_theta": draw(st.sampled_from([1e4, 1e6])),
    }


def keep_random_bits(directory: Path, config: dict, seed: int, max_shard_size: int) -> None:
    """Tensors of random bits: NaN payloads, infinities and negative zeros survive too."""
    model = model_config_from_hf(config)
    dtype = getattr(torch, model.dtype)
    generator = torch.Generator().manual_seed(seed)
    source = directory / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(model_config_to_hf(model)))
    tensors = {
        name: torch.randint(
            0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator
        ).view(dtype).view(shape)
        for name, shape in hf_shapes(model).items()
    }  # fmt: skip
    plans = plan_safetensors(planned(tensors), max_shard_num_bytes=7_000)
    write_planned(source, plans, tensors)
    if index := safetensors_index(plans):
        (source / INDEX_NAME).write_text(index)
    anything = Limits(allow_nonfinite=True)
    hf_to_sharded(source, directory / "checkpoint", limits=anything)
    export_hf(directory / "checkpoint", directory / "back", max_shard_size=max_shard_size, limits=anything)
    want, got = read_tensors(source), read_tensors(directory / "back")
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert_same_bits(got[name], tensor, name)
    assert verify(source, directory / "checkpoint").differences == ()


@pytest.mark.parametrize("dtype", mostly_long(["float32", "bfloat16", "float16"], "bfloat16"))
def test_any_bits(tmp_path: Path, dtype: str) -> None:
    sizes = {
        "vocab_size": 300, "hidden_size": 20, "intermediate_size": 18, "num_hidden_layers": 3,
        "num_key_value_heads": 3, "num_attention_heads": 6, "head_dim": 6, "rope_theta": 1e6,
    }  # fmt: skip
    config = {"model_type": "llama", "tie_word_embeddings": False, "dtype": dtype, **sizes}
    keep_random_bits(tmp_path, config, 0, 9_000)


@pytest.mark.long
@given(config=random_models(), seed=st.integers(0, 99), max_shard_size=st.integers(1, 20_000))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_model_any_bits(tmp_path_factory, config: dict, seed: int, max_shard_size: int) -> None:
    keep_random_bits(tmp_path_factory.mktemp("model"), config, seed, max_shard_size)


def test_padding_is_zero_and_leaves_again(tmp_path: Path) -> None:
    hf_to_sharded(write_tiny_llama(tmp_path / "source"), tmp_path / "checkpoint", vocab_multiple=64)
    source = ShardedSource(tmp_path / "checkpoint")
    embedding = source.read("embedding.word_embeddings.weight")
    assert embedding.shape == (192, 48)
    assert not embedding[131:].any()


DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}


@pytest.mark.parametrize("dtype", mostly_long(DTYPES, "bf16"))
def test_dtype(tmp_path: Path, dtype: str) -> None:
    name = DTYPES[dtype]
    source = write_tiny_llama(tmp_path / "source")
    hf_to_sharded(source, tmp_path / "checkpoint", dtype=dtype)
    checkpoint = ShardedSource(tmp_path / "checkpoint")
    assert checkpoint.model.dtype == name
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    want, got = read_tensors(source), read_tensors(tmp_path / "back")
    for tensor_name, tensor in want.items():
        assert_same_bits(got[tensor_name], tensor.to(getattr(torch, name)), tensor_name)


def test_tokenizer_and_generation_config_travel(tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "source", vocab_size=400)
    write_tokenizer_model(source)
    change_json(source / "generation_config.json", temperature=0.6)
    hf_to_sharded(source, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["temperature"] == 0.6
    assert verify(source, tmp_path / "back").differences == ()


def test_refusals_leave_nothing_behind(tmp_path: Path) -> None:
    source, target = write_tiny_llama(tmp_path / "source"), tmp_path / "checkpoint"
    with refused("dtype 'int4' is unknown"):
        hf_to_sharded(source, target, dtype="int4")
    with refused("--max-ram"):
        hf_to_sharded(source, target, limits=Limits(max_ram_num_bytes=10))
    with refused("there is no directory"):
        hf_to_sharded(tmp_path / "nothing", target)
    write_tokenizer_model(source)
    with refused("tokenizer has 400 ids", "131 rows"):
        hf_to_sharded(source, target)
    (source / "tokenizer.model").unlink()
    tensors = read_tensors(source)
    name = "model.layers.0.self_attn.k_proj.weight"
    rewrite_tensors(source, {**tensors, name: tensors[name].bfloat16()})
    with refused(name, "different dtypes", "--dtype"):
        hf_to_sharded(source, target)
    change_json(source / "config.json", architectures=["MixtralForCausalLM"], model_type="mixtral")
    with refused("MixtralForCausalLM", "is not supported"):
        hf_to_sharded(source, target)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_mixed_dtypes_are_kept_tensor_by_tensor(tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "source", dtype="bfloat16")
    tensors = read_tensors(source)
    rewrite_tensors(source, {name: t.float() if "norm" in name else t for name, t in tensors.items()})
    hf_to_sharded(source, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert verify(source, tmp_path / "back").differences == ()
    assert read_tensors(tmp_path / "back")["model.norm.weight"].dtype == torch.float32
