"""Per-rank checkpoints of Megatron-LM and Megatron-LLM: every layout and dialect gives back the same tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from meditron_train.checkpoint.hf.config import read_hf_config
from meditron_train.checkpoint.megatron.source import (
    MegatronOptions,
    MegatronSource,
    find_iteration,
    is_megatron_directory,
)
from meditron_train.checkpoint.tensor_map import tensor_specs
from tests.checkpoint.megatron.fixtures import edited, llm_args, lm_args, write_legacy
from tests.checkpoint.tiny_llama import assert_same_bits, read_tensors, write_tiny_llama
from tests.checkpoint.tiny_tokenizer import VOCAB_SIZE, write_tokenizer_model
from tests.checkpoint.whole import to_hf
from tests.refusal import refused

VOCAB = MegatronOptions(vocab_size=131)


def make_hf(directory: Path, **changes: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, config.json with 4.x's rope_theta) of a tiny model with 4 layers."""
    sizes = {"num_hidden_layers": 4, "num_key_value_heads": 2, "num_attention_heads": 4, "head_dim": None}
    write_tiny_llama(directory, **{**sizes, **changes})
    config = json.loads((directory / "config.json").read_text())
    return read_tensors(directory), {**config, "rope_theta": config["rope_parameters"]["rope_theta"]}


def assert_gives(source: MegatronSource, tensors: dict[str, torch.Tensor]) -> None:
    found = {}
    for spec in tensor_specs(source.model):
        assert source.shape(spec.name) == spec.padded_shape(source.padded_vocab_size)
        whole = source.read(spec.name)
        assert whole.dtype == source.dtype(spec.name)
        middle = (whole.shape[0] // 3, whole.shape[0] // 2 + 1)
        assert_same_bits(source.read(spec.name, middle), whole[middle[0] : middle[1]], f"rows of {spec.name}")
        found |= to_hf(spec, whole)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_same_bits(found[name], tensor, name)


LAYOUTS = {"tp1": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}, "tp2-pp2-vpp2": {"tp": 2, "pp": 2, "vpp": 2}}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    "style", ["megatron-llm", "megatron-llm-release", "megatron-lm", "mcore", "mcore-te"]
)
def test_every_layout_and_dialect(tmp_path: Path, style: str, layout: dict) -> None:
    tensors, config = make_hf(tmp_path / "hf", dtype="bfloat16", rms_norm_eps=1e-5)
    args = (llm_args if "llm" in style else lm_args)(config)
    root = write_legacy(tmp_path / "run", tensors, args, style=style, padded_vocab_size=256, **layout)
    assert is_megatron_directory(root) and is_megatron_directory(root / "iter_0001000")
    source = MegatronSource(root, VOCAB)
    assert source.iteration == 1000 and source.padded_vocab_size == 256
    assert source.layout == {"tensor": layout.get("tp", 1), "pipeline": layout.get("pp", 1)}
    assert_gives(source, tensors)
    # Special token ids are the tokenizer's to say; the rest follows from the arguments.
    same = {"bos_token_id": None, "eos_token_id": None, "initializer_range": 0.02}
    assert source.model == read_hf_config(tmp_path / "hf").model_copy(update=same)


MODELS = {
    "tied": ({"tie_word_embeddings": True}, {}),
    "multi-head": ({"num_key_value_heads": 4}, {}),
    "mistral": (
        {"model_type": "mistral", "sliding_window": 5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"window_size": (4, 0)},
    ),
    "qwen2": ({"model_type": "qwen2"}, {}),
    "qwen2-window": (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
        {"window_size": (8, 0), "window_attn_skip_freq": [0, 0, 1, 1]},
    ),
    "wide heads": ({"head_dim": 16}, {}),
    "interleaved rotary": ({}, {"rotary_interleaved": True}),
    "qwen2, interleaved rotary": ({"model_type": "qwen2"}, {"rotary_interleaved": True}),
    "linear scaling": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        {"rotary_seq_len_interpolation_factor": 2, "use_legacy_models": True},
    ),
    "llama 3 scaling": (
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            }
        },
        {"use_rope_scaling": True, "rope_scaling_factor": 32.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "args"), MODELS.values(), ids=MODELS)
def test_models_of_megatron_lm(tmp_path: Path, changes: dict, args: dict) -> None:
    tensors, config = make_hf(tmp_path / "hf", **changes)
    args = lm_args(config, vocab_size=131, **args)
    root = write_legacy(tmp_path / "run", tensors, args, style="mcore", tp=2, pp=2, padded_vocab_size=256)
    source = MegatronSource(root)
    assert_gives(source, tensors)
    same = {"bos_token_id": None, "eos_token_id": None, "initializer_range": 0.02}
    assert source.model == read_hf_config(tmp_path / "hf").model_copy(update=same)


def test_mistral_and_linear_scaling_of_megatron_llm(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    tensors, config = make_hf(tmp_path / "hf", model_type="mistral", sliding_window=6, rope_parameters=rope)
    args = llm_args(config, sliding_window_size=6, rope_scaling_factor=4.0)
    root = write_legacy(
        tmp_path / "run",
        tensors,
        args,
        style="megatron-llm",
        tp=2,
        padded_vocab_size=256,
        iteration="release",
    )
    source = MegatronSource(root, VOCAB)
    assert_gives(source, tensors)
    assert source.model.family == "mistral" and source.model.sliding_window == 6
    assert source.model.rope == read_hf_config(tmp_path / "hf").rope


def test_older_megatron_llm_rotated_halves(tmp_path: Path) -> None:
    """Before its permute_qkv it kept transformers' order; the checkpoint does not say which one it is."""
    tensors, config = make_hf(tmp_path / "hf")
    args = llm_args(config, kv_channels=config["hidden_size"] // config["num_attention_heads"])
    args["num_query_groups"] = args["num_attention_heads_kv"]
    root = write_legacy(tmp_path / "run", tensors, args, style="megatron-llm", padded_vocab_size=256)
    interleaved = MegatronSource(root, VOCAB).read("decoder.layers.0.self_attention.linear_qkv.weight")
    half = MegatronSource(root, MegatronOptions(vocab_size=131, rotary="half"))
    as_stored = half.read("decoder.layers.0.self_attention.linear_qkv.weight")
    assert not torch.equal(interleaved, as_stored)
    size = args["kv_channels"]
    first_head = as_stored[:size]
    assert torch.equal(interleaved[:size], torch.cat((first_head[0::2], first_head[1::2])))


def test_vocabulary_and_special_tokens_come_from_the_tokenizer(tmp_path: Path) -> None:
    tensors, config = make_hf(tmp_path / "hf", vocab_size=VOCAB_SIZE)
    args = lm_args(config)
    root = write_legacy(tmp_path / "run", tensors, args, style="mcore", padded_vocab_size=640)
    with refused("Give --vocab-size N or --tokenizer DIR", "None"):
        MegatronSource(root)
    tokenizer = write_tokenizer_model(tmp_path / "tokenizer")
    source = MegatronSource(root, MegatronOptions(tokenizer=tokenizer))
    assert (source.model.vocab_size, source.model.bos_token_id, source.model.eos_token_id) == (
        VOCAB_SIZE,
        1,
        2,
    )
    assert_gives(source, tensors)
    with refused("has no tokenizer"):
        MegatronSource(root, MegatronOptions(tokenizer=tmp_path / "hf"))
    with refused("256 rows of the embedding are fewer than the vocabulary's 300"):
        small = write_legacy(tmp_path / "small", _cut(tensors), args, style="mcore", padded_vocab_size=256)
        MegatronSource(small, MegatronOptions(vocab_size=300))


def _cut(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        n: t[:200] if n in ("model.embed_tokens.weight", "lm_head.weight") else t for n, t in tensors.items()
    }


def test_rows_that_no_token_of_the_tokenizer_uses_are_kept(tmp_path: Path) -> None:
    tensors, config = make_hf(tmp_path / "hf", vocab_size=VOCAB_SIZE + 50)
    args = lm_args(config, vocab_size=VOCAB_SIZE + 50)
    root = write_legacy(tmp_path / "run", tensors, args, style="mcore", padded_vocab_size=640)
    write_tokenizer_model(root)
    assert MegatronSource(root).model.vocab_size == VOCAB_SIZE + 50
    assert MegatronSource(root, MegatronOptions(vocab_size=VOCAB_SIZE)).model.vocab_size == VOCAB_SIZE
    assert_gives(MegatronSource(root), tensors)


def test_config_in_place_of_arguments(tmp_path: Path) -> None:
    tensors, config = make_hf(tmp_path / "hf", dtype="bfloat16")
    args = llm_args(config)
    root = write_legacy(tmp_path / "run", tensors, args, style="megatron-llm", tp=2, padded_vocab_size=256)
    for path in root.rglob("model_optim_rng.pt"):
        with edited(path) as content:
            del content["args"]
    with refused("holds no arguments that describe the model", "--config DIR"):
        MegatronSource(root, VOCAB)
    source = MegatronSource(root, MegatronOptions(config=tmp_path / "hf"))
    assert source.model == read_hf_config(tmp_path / "hf").model_copy(update={"dtype": "bfloat16"})
    assert_gives(source, tensors)  # Megatron-LLM's conventions are recognized by its lm_head


def test_arguments_that_are_missing_or_of_another_model(tmp_path: Path) -> None:
    tensors, config = make_hf(tmp_path / "hf")
    cases = [
        ({"ffn_hidden_size": None}, "lack ffn_hidden_size. Give --config DIR"),
        ({"add_bias_linear": True}, "add_bias_linear = True"),
        ({"normalization": "LayerNorm"}, "normalization = 'LayerNorm'"),
        ({"swiglu": False}, "no SwiGLU"),
        ({"num_experts": 8}, "num_experts = 8"),
        ({"qk_layernorm": True}, "qk_layernorm = True"),
        ({"rotary_percent": 0.5}, "rotary_percent = 0.5"),
        ({"window_size": (4, 4)}, "only (N, 0)"),
        ({"ffn_hidden_size": 96}, "has shape [160, 48], the model's is [192, 48]"),
        ({"num_layers": 5}, "decoder.layers.4.input_layernorm.weight is missing"),
        ({"num_layers": 3}, "decoder.layers.3.input_layernorm.weight does not belong"),
    ]
    for number, (change, said) in enumerate(cases):
        written = lm_args(config)
        root = write_legacy(tmp_path / str(number), tensors, written, style="mcore", padded_vocab_size=256)
        with edited(next(root.rglob("model_optim_rng.pt"))) as content:
            vars(content["args"]).update(change)
        with refused(said):
            MegatronSource(root, VOCAB)


class Evil:
    def __reduce__(self) -> Any:
        import os

        return os.system, ("touch /tmp/should-never-exist-meditron",)


@pytest.mark.parametrize("place", ["args", "optimizer", "model"])
def test_pickles_with_code_are_refused_by_name(tmp_path: Path, place: str) -> None:
    tensors, config = make_hf(tmp_path / "hf")
    root = write_legacy(tmp_path / "run", tensors, lm_args(config), style="mcore", padded_vocab_size=256)
    with edited(next(root.rglob("model_optim_rng.pt"))) as content:
        if place == "args":
            content["args"].hook = Evil()
        else:
            content[place] = Evil()
    with refused("model_optim_rng.pt: the pickle refers to posix.system", "Refused"):
        MegatronSource(root, VOCAB)
    assert not Path("/tmp/should-never-exist-meditron").exists()


def test_incomplete_and_damaged_directories(tmp_path: Path) -> None:
    tensors, config = make_hf(tmp_path / "hf")
    args = lm_args(config)
    root = write_legacy(tmp_path / "run", tensors, args, style="mcore", tp=2, pp=2, padded_vocab_size=256)
    lost = root / "iter_0001000" / "mp_rank_01_001" / "model_optim_rng.pt"
    whole = lost.read_bytes()
    lost.unlink()
    with refused(
        "is incomplete: mp_rank_01_001 missing", "2 tensor-parallel ranks and 2 pipeline stages there are 4"
    ):
        MegatronSource(root, VOCAB)
    lost.write_bytes(whole[: len(whole) // 2])
    with refused("mp_rank_01_001/model_optim_rng.pt"):
        MegatronSource(root, VOCAB)
    lost.write_bytes(whole)
    with edited(lost, _use_new_zipfile_serialization=False):
        pass
    with refused("not a file of torch 1.6 or newer"):
        MegatronSource(root, VOCAB)
    (root / "latest_checkpointed_iteration.txt").write_text("2000")
    with refused("iter_0002000 does not exist. There are: iter_0001000."):
        find_iteration(root)
    (root / "latest_checkpointed_iteration.txt").write_text("../elsewhere")
    with refused("neither a number nor release"):
        find_iteration(root)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("two_ranks")
    tensors, config = make_hf(directory / "hf")
    return write_legacy(
        directory / "run", tensors, lm_args(config), style="mcore", tp=2, padded_vocab_size=256
    )


FC1, FC2, NORM = (
    "decoder.layers.0.mlp.linear_fc1.weight",
    "decoder.layers.0.mlp.linear_fc2.weight",
    "decoder.final_layernorm.weight",
)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (FC2, lambda tensor: tensor.flatten()),
        (FC2, lambda tensor: tensor[:-1]),
        (FC2, lambda tensor: tensor.double()),
        (FC1, lambda tensor: tensor[:-1]),
        (FC1, lambda tensor: tensor[:, :-1]),
        (NORM, lambda tensor: tensor[:-1]),
        (NORM, lambda tensor: tensor.sum()),
        (NORM, lambda tensor: tensor.bfloat16()),
    ],
    ids=["flat", "height", "dtype", "odd", "width", "norm", "scalar", "norm's dtype"],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_do_not_go_together(
    tmp_path: Path, two_ranks: Path, name: str, change: Any, rank: int
) -> None:
    root = shutil.copytree(two_ranks, tmp_path / "run")
    with edited(root / "iter_0001000" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt") as content:
        content["model"][name] = change(content["model"][name]).clone()
    with refused("model_optim_rng.pt", name, "does not go together with"):
        MegatronSource(root, VOCAB)


def test_an_old_order_of_query_key_and_value_is_refused(tmp_path: Path) -> None:
    tensors, config = make_hf(tmp_path / "hf")
    args, extra = lm_args(config), {"checkpoint_version": 1.0}
    root = write_legacy(
        tmp_path / "run", tensors, args, style="megatron-lm", padded_vocab_size=256, extra=extra
    )
    with refused("checkpoint_version 1.0"):
        MegatronSource(root, VOCAB)
