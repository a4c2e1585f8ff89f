"""`hf-to-megatron --for megatron-lm`: megatron-core's unmodified GPTModel loads it, strictly, under any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from meditron_train.checkpoint.convert.engine import NO_LIMITS
from meditron_train.checkpoint.convert.from_hf import hf_to_megatron_lm
from meditron_train.checkpoint.convert.megatron_to_hf import megatron_to_hf
from meditron_train.checkpoint.hf.read import open_hf_model
from meditron_train.checkpoint.megatron.source import MegatronOptions, MegatronSource
from meditron_train.checkpoint.sharded.metadata import read_metadata
from meditron_train.verify.verify import verify
from tests.checkpoint.tiny_llama import write_tiny_llama
from tests.checkpoint.tiny_tokenizer import VOCAB_SIZE
from tests.checkpoint.tokenizer.shapes import write_tokenizer_of
from tests.distributed import run_ranks
from tests.long import mostly_long
from tests.refusal import refused

IDS = torch.arange(3, 40)[None]
# What a checkpoint of Megatron-LM 0.16 with Transformer Engine layers holds of a layer, and with local ones: the same.
LAYER = {
    "mlp.linear_fc1._extra_state", "mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight",
    "mlp.linear_fc2._extra_state", "mlp.linear_fc2.weight",
    "self_attention.linear_proj._extra_state", "self_attention.linear_proj.weight",
    "self_attention.linear_qkv._extra_state", "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
}  # fmt: skip
OUTSIDE = {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"}


def load_with_megatron_core(rank: int, world_size: int, directory: str, tp: int, pp: int) -> Any:
    """The logits of a GPTModel that megatron-core has loaded from the directory, None without a last stage alone."""
    from meditron_train.layout import ParallelLayout
    from meditron_train.mcore import GPTModel, StrictHandling, dist_checkpointing, get_gpt_layer_local_spec
    from meditron_train.model.llama import transformer_config
    from meditron_train.parallel import initialize

    source = MegatronSource(Path(directory).parent, MegatronOptions())
    model, args = source.model, source.args
    layout = ParallelLayout(world_size, tensor=tp, pipeline=pp)
    mesh = initialize(layout, rank=rank, local_rank=rank, device="cpu", timeout_s=60)
    gpt = GPTModel(
        transformer_config(model, layout, dtype=getattr(torch, model.dtype)),
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        model.padded_vocab_size(tp, 128 * tp),
        model.max_position_embeddings,
        pre_process=mesh.at.pipeline == 0,
        post_process=mesh.at.pipeline == pp - 1,
        parallel_output=False,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=args["rotary_base"],
        pg_collection=mesh.groups,
    )
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.fill_(float("nan"))  # what is not loaded shows
    metadata = dist_checkpointing.load_content_metadata(directory)
    state = {"model": gpt.sharded_state_dict(metadata={**metadata, "dp_cp_group": mesh.groups.dp_cp})}
    loaded, missing, unexpected = dist_checkpointing.load(state, directory, strict=StrictHandling.RETURN_ALL)
    assert (missing, unexpected) == (set(), set())
    assert loaded["checkpoint_version"] == 3.0 and loaded["args"].num_layers == model.num_layers
    gpt.load_state_dict(loaded["model"], strict=True)
    if pp > 1:
        assert all(torch.isfinite(parameter).all() for parameter in gpt.parameters())
        return None
    length = IDS.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    with torch.inference_mode():
        return gpt(IDS, torch.arange(length)[None], mask)[..., : model.vocab_size].float().clone()


def write_source(directory: Path, **changes: Any) -> Path:
    source = write_tiny_llama(directory, vocab_size=VOCAB_SIZE, bos_token_id=1, eos_token_id=2, **changes)
    write_tokenizer_of(changes.get("model_type", "llama"), source)
    return source


CASES = {
    "llama, tp1": ({}, 1, 1),
    "llama, tp2": ({"num_hidden_layers": 3}, 2, 1),
    "llama, pp2": ({}, 1, 2),
    "tied, tp2": ({"tie_word_embeddings": True}, 2, 1),
    "qwen2, tp2": ({"model_type": "qwen2", "head_dim": None}, 2, 1),
}


@pytest.mark.parametrize("case", mostly_long(CASES, "llama, tp2"))
def test_megatron_core_loads_it_strictly_and_computes_the_same(tmp_path: Path, case: str) -> None:
    changes, tp, pp = CASES[case]
    from transformers import AutoModelForCausalLM

    source = write_source(tmp_path / "hf", **changes)
    hf_to_megatron_lm(source, tmp_path / "run")
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "release"
    logits = run_ranks(load_with_megatron_core, tp * pp, str(tmp_path / "run" / "release"), tp, pp)[0]
    if logits is not None:
        with torch.no_grad():
            want = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()(IDS).logits
        assert (logits - want).abs().max() < 1e-4


TIED: dict[str, Any] = {"tie_word_embeddings": True, "dtype": "bfloat16"}


@pytest.mark.parametrize("changes", mostly_long([{}, TIED], {}), ids=["llama", "tied"])
def test_names_are_those_of_megatron_lm_and_it_comes_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    source = write_source(tmp_path / "hf", **changes)
    hf_to_megatron_lm(source, tmp_path / "run")
    stored = read_metadata(tmp_path / "run" / "release").state_dict_metadata
    names = {name.partition("/shard_")[0] for name in stored}
    outside = OUTSIDE - ({"output_layer.weight"} if "tie_word_embeddings" in changes else set())
    assert names == outside | {f"decoder.layers.{name}" for name in LAYER}
    assert {n for n in stored if "fc2._extra" in n} == {
        f"decoder.layers.mlp.linear_fc2._extra_state/shard_{layer}_2" for layer in range(2)
    }
    assert tuple(stored["decoder.layers.mlp.linear_fc1.weight"].size) == (2, 160, 48)
    assert verify(source, tmp_path / "run").differences == ()
    megatron_to_hf(tmp_path / "run", tmp_path / "back", MegatronOptions(), limits=NO_LIMITS)
    assert verify(source, tmp_path / "back").differences == ()
    assert open_hf_model(tmp_path / "back")[0] == open_hf_model(source)[0]


def test_a_rope_without_an_argument_is_refused_and_nothing_written(tmp_path: Path) -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    source = write_source(tmp_path / "hf", rope_parameters=dynamic)
    with refused("no argument for RoPE scaling 'dynamic'"):
        hf_to_megatron_lm(source, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_interrupted_conversion_goes_on_with_its_finished_files(tmp_path: Path, monkeypatch: Any) -> None:
    from meditron_train.checkpoint.convert import engine
    from meditron_train.checkpoint.files.stored import ReadError

    monkeypatch.setattr("meditron_train.checkpoint.sharded.plan._MAX_FILE_BYTES", 50_000)
    source, written = write_source(tmp_path / "hf"), []
    write_file = engine.write_file

    def write(path: Path, *args: Any, **options: Any) -> Any:
        if fails and len(written) == 2:
            raise ReadError("the disk cannot be read")
        written.append(path.name)
        return write_file(path, *args, **options)

    monkeypatch.setattr(engine, "write_file", write)
    monkeypatch.setattr(engine, "_MAX_WORKERS", 1)
    fails = True
    with refused("cannot be read", kind=ReadError):
        hf_to_megatron_lm(source, tmp_path / "run")
    fails = False
    hf_to_megatron_lm(source, tmp_path / "run")
    assert len(set(written)) == len(written) > 2
    assert verify(source, tmp_path / "run").differences == ()
