"""`convert reshard`: per-rank files that megatron-core loads, with the optimizer, and that go on as if nothing was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from meditron_train.checkpoint.convert.from_hf import hf_to_sharded
from meditron_train.checkpoint.convert.to_rank_files import reshard
from meditron_train.checkpoint.megatron.source import MegatronSource
from meditron_train.checkpoint.tensor_map import tensor_specs
from meditron_train.train.lr_schedule import learning_rate
from meditron_train.verify.verify import verify
from tests.checkpoint.megatron.fixtures import lm_args, write_legacy
from tests.checkpoint.megatron.test_rank_files import make_hf
from tests.checkpoint.tiny_llama import assert_same_bits, write_tiny_llama
from tests.checkpoint.tiny_tokenizer import VOCAB_SIZE
from tests.checkpoint.tokenizer.shapes import write_tokenizer_of
from tests.checkpoint.whole import to_hf
from tests.distributed import run_ranks
from tests.long import mostly_long
from tests.refusal import refused
from tests.train.ranks import make_config, start_engine, take_steps
from tests.train.reference import hf_model, random_batch


def batches(step: int) -> list:
    return [random_batch(10 * step + i) for i in range(4)]


def run_facts(config: Any) -> dict[str, Any]:
    """What meta.json of a run's own checkpoint says beyond the model, after two steps."""
    dump = config.model_dump(mode="json", by_alias=True)
    return {"samples": 2 * config.train.global_batch_size, "config": dump}


def save_ranks(rank: int, world_size: int, config: Any, directory: str) -> list:
    """Two steps, a checkpoint, and the losses of two more."""
    from meditron_train.checkpoint.sharded.ranks import ShardedSaver
    from meditron_train.train.engine_state import sharded_state

    engine = start_engine(rank, world_size, config)
    take_steps(engine, [batches(0), batches(1)])
    saver = ShardedSaver(engine.mesh.groups.dp_cp, asynchronous=False)
    saver.save(sharded_state(engine, with_optimizer=True, is_loading=False), Path(directory))
    return take_steps(engine, [batches(2), batches(3)])


def resume_ranks(rank: int, world_size: int, config: Any, iteration: str) -> list:
    """Load this rank's file with megatron-core's own load_state_dict, strictly, then take two steps."""
    engine = start_engine(rank, world_size, config)
    at, pipeline = engine.mesh.at, engine.mesh.layout.pipeline
    name = f"mp_rank_{at.tensor:02d}" + (f"_{at.pipeline:03d}" if pipeline > 1 else "")
    content = torch.load(Path(iteration) / name / "model_optim_rng.pt", weights_only=False)
    assert content["args"].tensor_model_parallel_size == engine.mesh.layout.tensor
    result = engine.chunks[0].load_state_dict(content["model"], strict=False)
    assert [n for n in result.missing_keys if not n.endswith("_extra_state")] == result.unexpected_keys == []
    (optimizer,) = engine.optimizer.chained_optimizers
    optimizer.load_state_dict(content["optimizer"])
    check_schedule(content["opt_param_scheduler"], optimizer, config)
    return take_steps(engine, [batches(2), batches(3)])


def check_schedule(state: dict[str, Any], optimizer: Any, config: Any) -> None:
    """megatron-core's schedule, made as Megatron-LM makes it from arguments, takes the state as its own."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    batch = config.train.global_batch_size
    settings = dict(
        init_lr=0.0, max_lr=config.optimizer.lr, min_lr=config.optimizer.min_lr,
        lr_warmup_steps=config.warmup_steps * batch, lr_decay_steps=config.decay_steps * batch,
        lr_decay_style=config.schedule.kind, start_wd=config.optimizer.weight_decay,
        end_wd=config.optimizer.weight_decay, wd_incr_steps=config.train.steps * batch, wd_incr_style="constant",
    )  # fmt: skip
    schedule = OptimizerParamScheduler(optimizer, **settings, use_checkpoint_opt_param_scheduler=False)
    schedule.load_state_dict(state)
    assert schedule.num_steps == 2 * batch
    for group in optimizer.param_groups:  # the steps that follow take the learning rate of ours
        assert group["lr"] == pytest.approx(
            learning_rate(2, config.schedule, config.optimizer, config.train.steps)
        )


CASES = {
    "fp32-tp2-to-pp2": ({}, "fp32", {"tensor": 2}, {"pipeline": 2}),
    "fp32-dp2-to-tp2": ({}, "fp32", {}, {"tensor": 2}),
    "bf16-tp2-to-tp1": ({}, "bf16", {"tensor": 2}, {}),
    "tied-tp2-to-pp2": ({"tie_word_embeddings": True}, "fp32", {"tensor": 2}, {"pipeline": 2}),
    "qwen2-tp2-to-tp2-pp2": (
        {"model_type": "qwen2", "head_dim": None}, "bf16", {"tensor": 2}, {"tensor": 2, "pipeline": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", mostly_long(CASES, "fp32-tp2-to-pp2"))
def test_megatron_core_goes_on_from_the_files(tmp_path: Path, case: str) -> None:
    from meditron_train.checkpoint.hf.config import read_hf_config
    from meditron_train.checkpoint.manifest import write_manifest
    from meditron_train.checkpoint.sharded.plan import meta_json
    from tests.checkpoint.tiny_llama import change_json

    overrides, precision, before, after = CASES[case]
    hf_model(**overrides).save_pretrained(tmp_path / "hf")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    train = {"train": {"precision": precision}}
    config = make_config(tmp_path / "hf", {"parallel": before, **train})
    expected = run_ranks(save_ranks, 2, config, str(checkpoint))[0]
    model = read_hf_config(tmp_path / "hf").model_copy(
        update={"dtype": {"fp32": "float32", "bf16": "bfloat16"}[precision]}
    )
    (checkpoint / "meta.json").write_text("{}")
    change_json(
        checkpoint / "meta.json", **meta_json(model, model.padded_vocab_size(2), step=2, **run_facts(config))
    )
    write_manifest(checkpoint)
    tp, pp = after.get("tensor", 1), after.get("pipeline", 1)
    result = reshard(checkpoint, tmp_path / "ranks", tp=tp, pp=pp)
    assert result.with_optimizer and result.iteration == "iter_0000002"
    config = make_config(tmp_path / "hf", {"parallel": {**after, "distributed_optimizer": False}, **train})
    resumed = run_ranks(resume_ranks, tp * pp, config, str(tmp_path / "ranks" / result.iteration))[0]
    tolerance = 2e-5 if precision == "fp32" else 5e-3
    for (loss, norm), (expected_loss, expected_norm) in zip(resumed, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=tolerance)
        assert norm == pytest.approx(expected_norm, rel=10 * tolerance)
    # What was written is itself a checkpoint that is read again; who has no tokenizer has no special tokens.
    named = {("config", f"{which}_token_id") for which in ("bos", "eos", "pad")}
    assert {(d.kind, d.name) for d in verify(checkpoint, tmp_path / "ranks").differences} <= named


@pytest.mark.parametrize(
    "changes",
    [
        {"bos_token_id": 1, "eos_token_id": 2},
        pytest.param(
            {"model_type": "mistral", "sliding_window": 9, "bos_token_id": 1, "eos_token_id": 2},
            marks=pytest.mark.long,
        ),
        pytest.param(
            {"model_type": "qwen2", "bos_token_id": 350, "eos_token_id": 351, "pad_token_id": 353},
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_converted_checkpoint_has_no_optimizer(tmp_path: Path, changes: dict) -> None:
    source = write_tiny_llama(tmp_path / "hf", vocab_size=VOCAB_SIZE, **changes)
    write_tokenizer_of(changes.get("model_type", "llama"), source)
    hf_to_sharded(source, tmp_path / "checkpoint")
    result = reshard(tmp_path / "checkpoint", tmp_path / "ranks", tp=2, pp=2)
    assert not result.with_optimizer and result.iteration == "release"
    names = sorted(path.name for path in (tmp_path / "ranks" / "release").iterdir())
    assert names == ["mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"]
    assert (tmp_path / "ranks" / "tokenizer.json").is_file()
    for a in (source, tmp_path / "checkpoint"):
        kinds = {(d.kind, d.name) for d in verify(a, tmp_path / "ranks").differences}
        assert kinds <= {("config", "initializer_range")}, kinds


def test_from_another_programs_layout_to_another(tmp_path: Path) -> None:
    tensors, config = make_hf(tmp_path / "hf")
    args = lm_args(config, vocab_size=131)
    run = write_legacy(tmp_path / "run", tensors, args, style="mcore-te", tp=2, padded_vocab_size=256)
    result = reshard(run, tmp_path / "ranks", tp=1, pp=4)
    assert result.iteration == "iter_0001000"
    source = MegatronSource(tmp_path / "ranks")
    assert source.padded_vocab_size == 256
    found = {
        n: t for spec in tensor_specs(source.model) for n, t in to_hf(spec, source.read(spec.name)).items()
    }
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_same_bits(found[name], tensor, name)


def test_layouts_that_do_not_divide_and_scalings_without_words(tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "hf")
    hf_to_sharded(source, tmp_path / "checkpoint")
    with refused("2 layers cannot be split over 3 ranks"):
        reshard(tmp_path / "checkpoint", tmp_path / "ranks", tp=1, pp=3)
    with refused("2 KV heads cannot be split over 4 ranks"):
        reshard(tmp_path / "checkpoint", tmp_path / "ranks", tp=4, pp=1)
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    hf_to_sharded(write_tiny_llama(tmp_path / "dynamic", rope_parameters=dynamic), tmp_path / "scaled")
    with refused("no argument for RoPE scaling 'dynamic'"):
        reshard(tmp_path / "scaled", tmp_path / "ranks", tp=1, pp=1)
    assert not (tmp_path / "ranks").exists() and not (tmp_path / "ranks.tmp").exists()


def test_a_last_stage_whose_copy_of_a_tied_embedding_differs_is_refused(tmp_path: Path) -> None:
    hf_to_sharded(write_tiny_llama(tmp_path / "hf", tie_word_embeddings=True), tmp_path / "checkpoint")
    reshard(tmp_path / "checkpoint", tmp_path / "ranks", tp=1, pp=2)
    MegatronSource(tmp_path / "ranks")
    path = tmp_path / "ranks" / "release" / "mp_rank_00_001" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    content["model"]["output_layer.weight"][200] = 7  # padding
    torch.save(content, path)
    MegatronSource(tmp_path / "ranks")
    content["model"]["output_layer.weight"][130, 3] += 1
    torch.save(content, path)
    with refused("output_layer.weight", "other values", "--config DIR"):
        MegatronSource(tmp_path / "ranks")


ROWS = {1: 384, 2: 512, 4: 512}  # by tp


@pytest.mark.parametrize("tp", mostly_long(ROWS, 1, 2))
def test_the_vocabulary_is_padded_as_megatron_lm_does(tmp_path: Path, tp: int) -> None:
    """331 rows to a multiple of 128 x tp."""
    hf_to_sharded(
        write_tiny_llama(
            tmp_path / "hf", vocab_size=331, num_key_value_heads=4, num_attention_heads=4, head_dim=8
        ),
        tmp_path / "checkpoint",
    )
    reshard(tmp_path / "checkpoint", tmp_path / "ranks", tp=tp, pp=1)
    source = MegatronSource(tmp_path / "ranks")
    assert source.padded_vocab_size == source.args["padded_vocab_size"] == ROWS[tp]
