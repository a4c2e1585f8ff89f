"""`torch_dist` checkpoints as Megatron-LM writes them: made by megatron-core's own GPTModel, which runs them too."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from meditron_train.checkpoint.foreign import ForeignOptions, ForeignSource, is_foreign_directory
from meditron_train.checkpoint.hf_config import read_hf_config
from meditron_train.checkpoint.hf_map import tensor_specs
from tests.checkpoint.foreign_fixtures import lm_args
from tests.checkpoint.test_foreign_legacy import Evil, assert_gives, make_hf
from tests.checkpoint.whole import to_hf
from tests.distributed import run_ranks
from tests.refusal import refused

IDS = (torch.arange(40) * 7 % 131)[None]


def save_ranks(
    rank: int, world_size: int, hf: str, args: dict[str, Any], directory: str, layout: dict[str, Any]
) -> torch.Tensor | None:
    """Save a stock GPTModel with the weights of a Hugging Face model; returns its logits where it has one stage."""
    from meditron_train.checkpoint.hf_map import rank_slice
    from meditron_train.checkpoint.hf_read import open_hf_model
    from meditron_train.layout import ParallelLayout
    from meditron_train.mcore import GPTModel, ShardedObject, dist_checkpointing, get_gpt_layer_local_spec
    from meditron_train.model import transformer_config
    from meditron_train.parallel import initialize

    tp, pp = layout["tp"], layout["pp"]
    parallel = ParallelLayout(world_size=world_size, tensor=tp, pipeline=pp)
    mesh = initialize(parallel, rank=rank, local_rank=rank, device="cpu", timeout_s=60)
    model, source = open_hf_model(hf)
    padded = model.padded_vocab_size(tp)
    config = transformer_config(model, parallel, dtype=torch.float32)
    gpt = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        padded,
        model.max_position_embeddings,
        pre_process=mesh.at.pipeline == 0,
        post_process=mesh.at.pipeline == pp - 1,
        parallel_output=False,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=model.rope.theta,
        pg_collection=mesh.groups,
    )
    specs = {spec.name: spec for spec in tensor_specs(model)}
    first = mesh.at.pipeline * model.num_layers // pp
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            head, layers, rest = name.partition("decoder.layers.")
            if layers:
                number, _, rest = rest.partition(".")
                name = f"{head}{layers}{first + int(number)}.{rest}"
            if name == "output_layer.weight" and model.tie_embeddings:
                name = "embedding.word_embeddings.weight"
            part = rank_slice(
                specs[name], source, tp_rank=mesh.at.tensor, tp_size=tp, padded_vocab_size=padded
            )
            parameter.copy_(part)
    metadata = {"non_homogeneous_layers": layout["per_layer"]}
    state = {
        "args": argparse.Namespace(**args),
        "checkpoint_version": 3.0,
        "iteration": 500,
        "model": gpt.sharded_state_dict(metadata=metadata),
        "rng_state": ShardedObject("rng_state", [{"seed": 1}], (pp, tp), (mesh.at.pipeline, mesh.at.tensor)),
    }
    dist_checkpointing.save(state, directory)
    if pp > 1:
        return None
    length = IDS.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    with torch.inference_mode():
        return gpt(IDS, torch.arange(length)[None], mask)[..., : model.vocab_size].clone()


CASES = {
    "tp2, one tensor for all layers": ({}, {"tp": 2, "pp": 1, "per_layer": False}),
    "tp2-pp2, one tensor for all layers": ({}, {"tp": 2, "pp": 2, "per_layer": False}),
    "pp2, tied, a tensor per layer": ({"tie_word_embeddings": True}, {"tp": 1, "pp": 2, "per_layer": True}),
    "tp2, Qwen2.5": ({"model_type": "qwen2"}, {"tp": 2, "pp": 1, "per_layer": False}),
}


def make_run(tmp_path: Path, changes: dict, layout: dict) -> tuple[Path, dict, list]:
    tensors, config = make_hf(tmp_path / "hf", num_hidden_layers=2, **changes)
    directory = tmp_path / "run" / "iter_0000500"
    directory.mkdir(parents=True)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("500")
    world_size = layout["tp"] * layout["pp"]
    args = lm_args(config, vocab_size=131)
    logits = run_ranks(save_ranks, world_size, str(tmp_path / "hf"), args, str(directory), layout)
    return tmp_path / "run", tensors, logits


@pytest.mark.parametrize(("changes", "layout"), CASES.values(), ids=CASES)
def test_what_megatron_core_saves_is_read(tmp_path: Path, changes: dict, layout: dict) -> None:
    from transformers import AutoModelForCausalLM

    run, tensors, logits = make_run(tmp_path, changes, layout)
    assert is_foreign_directory(run) and is_foreign_directory(run / "iter_0000500")
    names = json.loads((run / "iter_0000500" / "metadata.json").read_text())
    assert names["sharded_backend"] == "torch_dist"
    source = ForeignSource(run)
    assert source.iteration == 500
    assert_gives(source, tensors)
    same = {"bos_token_id": None, "eos_token_id": None, "initializer_range": 0.02}
    assert source.model == read_hf_config(tmp_path / "hf").model_copy(update=same)
    if (
        layout["pp"] == 1
    ):  # the stock model computed what transformers computes from the tensors that were read
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        read = {n: t for s in tensor_specs(source.model) for n, t in to_hf(s, source.read(s.name)).items()}
        model.load_state_dict(read, strict=not source.model.tie_embeddings)
        with torch.inference_mode():
            want = model(IDS).logits
        assert want.std() > 0.1
        assert (logits[0] - want).abs().max() < 1e-5


def test_damage_and_code(tmp_path: Path) -> None:
    run, _, _ = make_run(tmp_path, {}, {"tp": 1, "pp": 1, "per_layer": False})
    common = run / "iter_0000500" / "common.pt"
    whole = common.read_bytes()
    content = torch.load(common, weights_only=False)
    torch.save({**content, "args": Evil()}, common)
    with refused("common.pt: the pickle refers to posix.system", "Refused"):
        ForeignSource(run)
    del content["args"]
    torch.save(content, common)
    with refused("holds no arguments that describe the model", "--config DIR"):
        ForeignSource(run)
    assert ForeignSource(run, ForeignOptions(config=tmp_path / "hf")).model.num_layers == 2
    common.write_bytes(whole)
    lost = next((run / "iter_0000500").glob("*.distcp"))
    lost.write_bytes(lost.read_bytes()[:-1000])
    with refused(f"{lost.name} is cut off"):
        ForeignSource(run)
    lost.unlink()
    with refused(f"{lost.name} is missing"):
        ForeignSource(run)
