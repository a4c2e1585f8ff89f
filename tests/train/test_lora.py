"""Adapters in every layout are trained as PEFT trains them on transformers' model, and PEFT loads what is exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_ranks
from tests.long import mostly_long
from tests.train.ranks import local_weights, make_config, share_of, start_engine, take_steps
from tests.train.reference import hf_model, loss_sum_alone, random_batch, train_reference
from tests.train.test_parity import QWEN2, assert_agrees

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PLACES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), ("self_attention.linear_qkv", "self_attn")),
    "o_proj": ("self_attention.linear_proj", "self_attn"),
    **dict.fromkeys(("gate_proj", "up_proj"), ("mlp.linear_fc1", "mlp")),
    "down_proj": ("mlp.linear_fc2", "mlp"),
}
LORA = {"rank": 4, "alpha": 6.0}
# A large eps: B starts at 0, and Adam would make as much of the rounding of its smallest gradients as of the largest.
OPTIMIZER = {"lr": 3e-3, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-3}
LAYOUTS = {
    "one process": (1, {"distributed_optimizer": False}, False),
    "tp2": (2, {"tensor": 2}, False),
    "tp2-sp": (2, {"tensor": 2, "sequence": True}, False),
    "tied-pp2": (2, {"pipeline": 2}, True),
    "cp2": (2, {"context": 2}, False),
    "dp2-overlap": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}, False),
    "tp2-sp-pp2-interleaved": (
        4,
        {"tensor": 2, "sequence": True, "pipeline": 2, "virtual_pipeline": 2},
        False,
    ),
    "tp2-cp2-dp2": (8, {"tensor": 2, "context": 2}, False),
}


def steps_of(num_steps: int = 4, per_step: int = 4):
    return [[random_batch(10 * step + i) for i in range(per_step)] for step in range(num_steps)]


def adapter_name(layer: int, projection: str, matrix: str) -> str:
    return f"decoder.layers.{layer}.{PLACES[projection][0]}.{projection}_{matrix}"


def peft_name(layer: int, projection: str, matrix: str) -> str:
    place = f"layers.{layer}.{PLACES[projection][1]}.{projection}"
    return f"base_model.model.model.{place}.{matrix}.default.weight"


def peft_model(base, targets=ALL, *, num_layers: int = 4, seed: int = 1234):
    """PEFT's model around `base`, its A as ours start."""
    from peft import LoraConfig, get_peft_model

    from meditron_train.model.lora import initial_adapter

    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=list(targets)))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for layer in range(num_layers):
            for projection in targets:
                a = parameters[peft_name(layer, projection, "lora_A")]
                a.copy_(initial_adapter(adapter_name(layer, projection, "lora_A"), *a.shape, seed))
    return model


def reference_run(directory, steps, targets=ALL, **overrides):
    """Train with PEFT in float64: [(loss, gradient norm)], and the adapters under our names."""
    base = hf_model(**overrides)
    base.save_pretrained(directory)
    model = peft_model(base, targets)
    model.double()  # so that the difference is our rounding alone: B starts at zero and stays small
    history = train_reference(model, steps, clip=1.0, **OPTIMIZER)
    parameters = dict(model.named_parameters())
    return history, {
        adapter_name(layer, projection, matrix): parameters[peft_name(layer, projection, matrix)].detach()
        for layer in range(4)
        for projection in targets
        for matrix in ("lora_A", "lora_B")
    }


def whole_adapters(pieces, tp: int) -> dict[str, torch.Tensor]:
    """The adapters from all ranks' parameters; those that every rank holds must be the same on all."""
    merged = {key: tensor for piece in pieces for key, tensor in piece.items()}
    whole = {}
    for name in sorted({name for name, _ in merged if "_lora_" in name}):
        parts = [merged[name, rank] for rank in range(tp)]
        split_inputs = name.endswith(("o_proj_lora_A", "down_proj_lora_A"))
        split_outputs = name.endswith("_lora_B") and not name.endswith(("o_proj_lora_B", "down_proj_lora_B"))
        if split_inputs or split_outputs:
            whole[name] = torch.cat(parts, dim=1 if split_inputs else 0)
        else:
            assert all(torch.equal(part, parts[0]) for part in parts), name
            whole[name] = parts[0]
    return whole


def train_and_save(rank: int, world_size: int, config: Any, steps: list, directory: Path) -> dict[str, Any]:
    """Train, save a checkpoint, and say what this rank has: history, weights, loss and logits of the first batch."""
    from meditron_train.checkpoint.adapters import adapter_facts
    from meditron_train.checkpoint.manifest import write_manifest
    from meditron_train.checkpoint.sharded.plan import meta_json
    from meditron_train.checkpoint.sharded.ranks import ShardedSaver, write_companions
    from meditron_train.train.engine_state import sharded_state

    engine = start_engine(rank, world_size, config)
    history = take_steps(engine, steps)
    if rank == 0:
        directory.mkdir()
    engine.mesh.gather_objects(None)
    state = sharded_state(engine, with_optimizer=True, is_loading=False)
    ShardedSaver(engine.mesh.groups.dp_cp, asynchronous=False).save(state, directory)
    if rank == 0:
        meta = meta_json(engine.model, engine.padded_vocab_size, contains=("adapters", "optimizer"))
        meta |= adapter_facts(config.lora, config.model.from_, None)
        write_companions(directory, meta, engine.model, config.model.from_, ())
        write_manifest(directory)
    check_memory(engine)
    loss, _ = engine.evaluate(share_of(steps[0], engine))
    return {
        "history": history,
        "weights": local_weights(engine),
        "loss": loss,
        "logits": None if world_size > 1 else logits_of(engine, steps[0][0]),
    }


def check_memory(engine: Any) -> None:
    """Gradients and optimizer state are there for the adapters alone, as many as the planner counts."""
    from meditron_train.config.finetuning import num_adapter_parameters

    parameters = [(name, p) for chunk in engine.chunks for name, p in chunk.named_parameters()]
    frozen = [p for name, p in parameters if "_lora_" not in name]
    assert not any(p.requires_grad or p.grad is not None or hasattr(p, "main_grad") for p in frozen)
    num_trained = sum(p.numel() for _, p in parameters if p.requires_grad)
    layout, stage = engine.mesh.layout, engine.mesh.at.pipeline
    num_layers = sum(
        len(layout.layers_of(stage, chunk, engine.model.num_layers))
        for chunk in range(layout.virtual_pipeline)
    )
    assert num_trained == num_adapter_parameters(
        engine.config.lora, engine.model, num_layers=num_layers, tp=layout.tensor
    )
    masters = [
        p for o in engine.optimizer.chained_optimizers for group in o.param_groups for p in group["params"]
    ]
    assert 0 < sum(p.numel() for p in masters) <= num_trained


def logits_of(engine: Any, batch: Any) -> torch.Tensor:
    """[T, V] of the whole model in one process."""
    local, packed = engine._prepare(batch)
    engine.chunks[0].eval()
    with torch.no_grad():
        return engine.chunks[0](local.tokens_BL, None, None, packed_seq_params=packed)[0, :, :131]


def load_with_peft(directory: Path, adapter: Path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    return PeftModel.from_pretrained(base, adapter).eval()


def logits_alone(model, batch) -> torch.Tensor:
    bounds = batch.cu_seqlens.tolist()
    with torch.no_grad():
        documents = [batch.tokens_T[None, a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
        return torch.cat([model(input_ids=ids, use_cache=False).logits[0] for ids in documents])


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    made = {}
    for tied in (False, True):
        directory = tmp_path_factory.mktemp("lora") / "hf"
        made[tied] = (directory, *reference_run(directory, steps_of(), tie_word_embeddings=tied))
    return made


@pytest.mark.parametrize("layout", mostly_long(LAYOUTS, "one process", "tied-pp2", "tp2-sp"))
def test_every_layout_agrees_with_peft(layout, references, tmp_path):
    from safetensors.torch import load_file

    from meditron_train.checkpoint.convert.adapters import export_adapter

    world_size, parallel, tied = LAYOUTS[layout]
    directory, expected_history, expected = references[tied]
    config = make_config(directory, {"parallel": parallel, "lora": LORA, "optimizer": OPTIMIZER})
    results = run_ranks(train_and_save, world_size, config, steps_of(), tmp_path / "checkpoint")
    adapters = whole_adapters([result["weights"] for result in results], parallel.get("tensor", 1))
    assert_agrees(results[0]["history"], adapters, expected_history, expected)

    export_adapter(tmp_path / "checkpoint", tmp_path / "peft")
    stored = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert len(stored) == len(adapters)
    for layer in range(4):
        for projection in ALL:
            for half in ("lora_A", "lora_B"):
                name = peft_name(layer, projection, half).replace(".default", "")
                assert torch.equal(stored[name], adapters[adapter_name(layer, projection, half)]), name

    model = load_with_peft(directory, tmp_path / "peft")
    batches = steps_of()[0]
    with torch.no_grad():
        total = sum(float(loss_sum_alone(model, batch)) for batch in batches)
    count = sum(float(batch.loss_mask_T.sum()) for batch in batches)
    assert all(result["loss"] == pytest.approx(total / count, rel=2e-6) for result in results)
    if world_size == 1:
        assert (results[0]["logits"] - logits_alone(model, batches[0])).abs().max() <= 1e-5


@pytest.mark.long
def test_some_matrices_of_a_model_with_biases_and_recomputation(tmp_path):
    targets, overrides = ("q_proj", "v_proj", "down_proj"), QWEN2
    expected_history, expected = reference_run(tmp_path / "hf", steps_of(2), targets, **overrides)
    sections = {
        "parallel": {"tensor": 2, "sequence": True},
        "lora": {**LORA, "targets": targets},
        "optimizer": OPTIMIZER,
        "train": {"precision": "fp32", "recompute": "full"},
    }
    results = run_ranks(
        train_and_save, 2, make_config(tmp_path / "hf", sections), steps_of(2), tmp_path / "checkpoint"
    )
    adapters = whole_adapters([result["weights"] for result in results], 2)
    assert_agrees(results[0]["history"], adapters, expected_history, expected, tolerance=3e-5)


@pytest.mark.long
def test_dropout_is_the_same_in_every_layout_and_when_computed_again(references, tmp_path):
    def losses(world_size, parallel, recompute, dropout=0.3):
        sections = {
            "parallel": parallel,
            "lora": {**LORA, "dropout": dropout},
            "train": {"precision": "fp32", "recompute": recompute},
            "optimizer": {**OPTIMIZER, "lr": 3e-2},
        }
        place = tmp_path / f"{world_size}{parallel}{recompute}{dropout}"
        results = run_ranks(
            train_and_save, world_size, make_config(references[False][0], sections), steps_of(), place
        )
        return [loss for loss, _ in results[0]["history"]] + [results[0]["loss"]]

    expected = losses(1, {}, "none")
    assert losses(2, {"tensor": 2, "sequence": True}, "full") == pytest.approx(expected, rel=1e-5)
    four = {"tensor": 2, "context": 2, "distributed_optimizer": False}
    assert losses(4, four, "none") == pytest.approx(expected, rel=1e-5)
    two = {"pipeline": 2, "virtual_pipeline": 2}
    assert losses(4, two, "none") == pytest.approx(expected, rel=1e-5)
    without = losses(1, {}, "none", dropout=0.0)
    assert expected[0] == without[0], "B is 0 at the start"
    assert expected[1:4] != pytest.approx(without[1:4], rel=1e-5)
