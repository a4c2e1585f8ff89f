"""Models through a sharded checkpoint of any layout and back: the same bytes, and the logits of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meditron_train.checkpoint.convert.from_hf import hf_to_sharded
from meditron_train.checkpoint.convert.to_hf import export_hf
from meditron_train.checkpoint.hf.config import read_hf_config
from meditron_train.checkpoint.sharded.read import ShardedSource
from meditron_train.verify.side import HFSide
from meditron_train.verify.streamed_forward import our_logits
from meditron_train.verify.verify import verify
from tests.checkpoint.convert.layouts import split_checkpoint
from tests.checkpoint.tiny_llama import assert_same_bits, read_tensors, write_tiny_llama

ROPES: list[dict[str, Any]] = [
    {"rope_theta": 1e4, "rope_type": "default"},
    {"rope_theta": 1e6, "rope_type": "default"},
    {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0},
    {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 4.0},
    {
        "rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
]  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], int, int, int]:
    """(configuration, tensor-parallel size, pipeline size, shard bytes)"""
    tp, pp = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))
    num_kv_heads = tp * draw(st.integers(1, 2))
    num_heads = num_kv_heads * draw(st.integers(1, 3))
    config = {
        "vocab_size": draw(st.integers(2, 300)),
        "hidden_size": num_heads * draw(st.integers(1, 5)),  # transformers refuses other sizes
        "intermediate_size": tp * draw(st.integers(1, 20)),
        "num_hidden_layers": pp * draw(st.integers(1, 2)),
        "num_key_value_heads": num_kv_heads,
        "num_attention_heads": num_heads,
        "head_dim": draw(st.sampled_from([4, 6, 16])),
        "tie_word_embeddings": draw(st.booleans()),
        "dtype": draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        "rope_parameters": draw(st.sampled_from(ROPES)),
        "seed": draw(st.integers(0, 99)),
        "max_shard_size": draw(st.sampled_from(["5GB", "9KB", "2KB"])),
    }
    return config, tp, pp, draw(st.integers(1, 50_000))


def go_there_and_back(
    directory: Path, config: dict[str, Any], tp: int, pp: int, max_shard_num_bytes: int
) -> None:
    from transformers import AutoModelForCausalLM

    source, checkpoint, back = (directory / name for name in ("source", "checkpoint", "back"))
    write_tiny_llama(source, **config)
    hf_to_sharded(source, checkpoint, vocab_multiple=8 * tp)
    split_checkpoint(checkpoint, tp, pp)
    assert len(list(checkpoint.glob("*.distcp"))) == tp * pp
    embedding = "embedding.word_embeddings.weight"
    assert len(ShardedSource(checkpoint).place(embedding)) == tp
    export_hf(checkpoint, back, max_shard_size=max_shard_num_bytes)
    want, got = read_tensors(source), read_tensors(back)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert_same_bits(got[name], tensor, name)
    assert read_hf_config(back) == read_hf_config(source)
    assert verify(source, checkpoint).differences == verify(checkpoint, back).differences == ()
    ids = torch.arange(40) * 7 % config["vocab_size"]
    with torch.inference_mode():
        a, b = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids[None]).logits[0]
            for path in (source, back)
        )
    assert torch.equal(a, b)
    torch.testing.assert_close(our_logits(HFSide(back), ids), a, rtol=1e-5, atol=1e-5)


def test_there_and_back(tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 131, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4,
        "num_key_value_heads": 4, "num_attention_heads": 8, "head_dim": 6,
    }  # fmt: skip
    kind = {"dtype": "bfloat16", "rope_parameters": ROPES[-1], "max_shard_size": "9KB"}
    go_there_and_back(tmp_path, {**sizes, **kind}, 2, 2, 20_000)


@pytest.mark.long
@given(case=cases())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_model_there_and_back(tmp_path_factory, case: tuple[dict[str, Any], int, int, int]) -> None:
    go_there_and_back(tmp_path_factory.mktemp("model"), *case)
