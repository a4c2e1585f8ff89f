"""Every preset's step on a pretended GPU, and the planner's formula for memory beside it."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from meditron_train.config.load import load_config
from meditron_train.flows.plan import model_shape
from meditron_train.flows.trace.findings import problems_of
from meditron_train.flows.trace.results import RankTrace
from meditron_train.planner.memory import estimate_stages, layer_activation_bytes_per_token
from tests.flows.trace.traced import make_config, trace_stage
from tests.planner.test_flops import LLAMA2_7B

pytestmark = pytest.mark.long

CONFIGS = Path(__file__).parents[3] / "configs"
PRESETS = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "demo")  # that one is for CPUs
GIB = 2**30


def check(config, model, world_size: int, stage: int) -> None:
    """Nothing is wrong, and the formula is within 3 % of what the trace counted: of what the step makes, within 8 %."""
    layout = config.parallel.layout(world_size)
    traced = trace_stage(config, world_size, stage, model=model)
    assert problems_of([traced], None, config, model, layout) == []
    estimate = estimate_stages(config, model, layout)[stage]
    assert estimate.counted == pytest.approx(traced.peak.num_bytes, rel=0.03)
    off = abs(estimate.activations + estimate.logits - made(traced))
    # Gradients on their way are not counted. A layer that is computed again and the logits are, and never meet.
    passing = {"precision": config.train.precision, "recompute": "none", "on_gpu": True}
    tokens = config.train.seq_len * config.train.micro_batch_size // layout.context
    one_layer = layer_activation_bytes_per_token(model, layout, **passing) * tokens
    assert off <= (one_layer + estimate.logits if config.train.recompute == "full" else 0.08 * made(traced))


def made(traced: RankTrace) -> int:
    """Bytes of the fullest moment that the step itself makes and gives back."""
    return sum(traced.peak.by_part[part] for part in ("activations", "logits", "buffers"))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_at_few_layers(preset, monkeypatch):
    """Of very few layers, the gradients on their way would be more than 3 %, and no formula counts them."""
    monkeypatch.setenv("BASE_MODEL", "models/Llama-2-7b-hf")  # of the presets for finetuning
    config = load_config(CONFIGS / f"{preset}.yaml", [])
    parallel = config.parallel
    num_layers = 4 * parallel.pipeline * parallel.virtual_pipeline
    model = model_shape(config, []).model_copy(update={"num_layers": num_layers})
    world_size = 2 * parallel.layout(1).model_parallel_size
    for stage in sorted({0, parallel.pipeline - 1}):
        check(config, model, world_size, stage)


@pytest.mark.parametrize("stage", [0, 3, 7])
def test_meditron_70b_on_128_gpus(stage):
    config = load_config(CONFIGS / "meditron-70b.yaml", [])
    model, layout = model_shape(config, []), config.parallel.layout(128)
    traced = trace_stage(config, 128, stage, model=model)
    assert problems_of([traced], None, config, model, layout) == []
    assert traced.resident_bytes < 2 * GIB
    counted = estimate_stages(config, model, layout)[stage].counted
    assert counted == pytest.approx(traced.peak.num_bytes, rel=0.03)


def test_the_command_traces_every_stage_and_asks_all_ranks():
    command = [sys.executable, "-m", "meditron_train", "plan", str(CONFIGS / "llama2-7b.yaml"), "--gpus", "8"]
    done = subprocess.run(
        [*command, "parallel.pipeline=2", "--trace", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    traced = json.loads(done.stdout)["trace"]
    assert traced["problems"] == []
    assert [rank["stage"] for rank in traced["ranks"]] == [0, 1]
    assert traced["coverage"]["num_ranks"] == 8 and traced["coverage"]["wrong"] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stage", "1"], "needs --trace"),
        (["--trace", "--stage", "3"], "there is no stage 3"),
        (["--trace", "train.device=cpu"], "train.device is cpu"),
    ],
)
def test_what_cannot_be_traced_is_said(arguments, said):
    command = [sys.executable, "-m", "meditron_train", "plan", str(CONFIGS / "llama2-7b.yaml"), "--gpus", "8"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr


LAYOUTS = {
    "alone": (1, {}),
    "data": (2, {}),
    "data, plain optimizer": (2, {"distributed_optimizer": False}),
    "tensor": (2, {"tensor": 2}),
    "sequence": (4, {"tensor": 4, "sequence": True}),
    "stages": (4, {"pipeline": 2, "tensor": 2, "sequence": True}),
    "interleaved": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "context": (4, {"context": 2, "tensor": 2, "sequence": True}),
}


@pytest.mark.parametrize(
    ("layout", "recompute"), list(itertools.product(LAYOUTS, ["none", "selective", "full"]))
)
def test_24_layouts(layout, recompute):
    world_size, parallel = LAYOUTS[layout]
    train = {"seq_len": 2048, "micro_batch_size": 1, "recompute": recompute}
    config = make_config(world_size, 8, parallel=parallel, train={**train, "precision": "bf16"})
    model = LLAMA2_7B.model_copy(update={"num_layers": 8})
    for stage in range(parallel.get("pipeline", 1)):
        check(config, model, world_size, stage)


@pytest.mark.parametrize("attention", ["flash_attn", "native"])
@pytest.mark.parametrize("num_kv_heads", [32, 8, 4], ids=["MHA", "GQA", "a group for each rank"])
@pytest.mark.parametrize(
    ("layout", "recompute"),
    [
        ("sequence", "none"),
        ("sequence", "selective"),
        ("context", "none"),
        ("interleaved", "none"),
        ("alone", "full"),
    ],
)
def test_a_layer_keeps_what_is_estimated_to_the_byte(layout, recompute, num_kv_heads, attention):
    """Of eight layers what four do not: whatever a step holds in passing is the same."""
    world_size, parallel = LAYOUTS[layout]
    train = {"seq_len": 2048, "micro_batch_size": 1, "recompute": recompute, "attention": attention}
    config = make_config(world_size, 8, parallel=parallel, train={**train, "precision": "bf16"})
    estimated, traced = [], []
    for num_layers in (4, 8):
        model = LLAMA2_7B.model_copy(update={"num_layers": num_layers, "num_kv_heads": num_kv_heads})
        estimate = estimate_stages(config, model, config.parallel.layout(world_size))[0]
        estimated.append(estimate.activations + estimate.logits)
        traced.append(made(trace_stage(config, world_size, model=model)))
    assert estimated[1] - estimated[0] == traced[1] - traced[0]
