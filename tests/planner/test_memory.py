"""The memory estimate against the bytes that real training steps hold, rank by rank."""

from __future__ import annotations

import weakref

import pytest

from meditron_train.config.finetuning import LoraSection
from meditron_train.config.schema import Config
from meditron_train.errors import UserError
from meditron_train.planner.hardware import HARDWARE
from meditron_train.planner.memory import (
    describe,
    estimate_stages,
    fullest_stage,
    layer_activation_bytes_per_token,
    microbatches_alive,
    require_fit,
    stage_parameters,
)
from tests.distributed import run_ranks
from tests.long import mostly_long
from tests.planner.test_flops import LLAMA2_7B, LLAMA2_70B

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
NUM_MICROBATCHES = 8


def make_config(hf_config: dict | None = None, **sections) -> Config:
    values = {
        "model": {"init": "random", "hf_config": hf_config or SHAPE},
        "data": {"tokenizer": "none", "train": [{"name": "none", "path": "none"}]},
        "train": {"seq_len": 128, "global_batch_size": NUM_MICROBATCHES},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return Config.model_validate(values)


def shape_of(config: Config):
    from meditron_train.checkpoint.hf.config import model_config_from_hf

    return model_config_from_hf(dict(config.model.hf_config), where="model.hf_config")


class _Held:
    """A tensor that autograd keeps; counted from the forward pass that saves it until the backward frees it."""

    def __init__(self, tensor):
        self.tensor = tensor


class _Meter:
    """Bytes of the storages that autograd keeps alive, each once, and the most they were; parameters excepted."""

    def __init__(self, parameters):
        self.ours = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.users: dict[int, int] = {}
        self.now = self.peak = 0

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        address, num_bytes = storage.data_ptr(), storage.nbytes()
        held = _Held(tensor)
        if address not in self.ours and num_bytes:
            self.users[address] = self.users.get(address, 0) + 1
            if self.users[address] == 1:
                self.now += num_bytes
                self.peak = max(self.peak, self.now)
            weakref.finalize(held, self._free, address, num_bytes)
        return held

    def _free(self, address, num_bytes):
        self.users[address] -= 1
        if self.users[address] == 0:
            self.now -= num_bytes


def count_bytes(rank: int, world_size: int, config: Config) -> dict[str, int]:
    """Bytes that this rank holds in and between training steps."""
    import torch

    from meditron_train.checkpoint.weight_sources import RandomSource
    from meditron_train.parallel import initialize
    from meditron_train.train.dry_run import invented_batch
    from meditron_train.train.engine import Engine
    from tests.train.ranks import make_guard, take_step

    model = shape_of(config)
    mesh = initialize(config.parallel.layout(world_size), rank=rank, local_rank=rank, device="cpu")
    engine = Engine(config, model, mesh, RandomSource(model, 1))
    batch = invented_batch(config.train.seq_len, config.train.micro_batch_size, model.vocab_size)
    batches = [batch] * (NUM_MICROBATCHES // mesh.layout.data)
    meter = _Meter(parameter for chunk in engine.chunks for parameter in chunk.parameters())
    with torch.autograd.graph.saved_tensors_hooks(meter.pack, lambda held: held.tensor):
        take_step(make_guard(engine), 1, batches)
    parameters = [parameter for chunk in engine.chunks for parameter in chunk.parameters()]
    states = [
        tensor
        for optimizer in engine.optimizer.chained_optimizers
        for group in optimizer.optimizer.param_groups
        for parameter in group["params"]
        for tensor in (*optimizer.optimizer.state[parameter].values(), parameter)
        if isinstance(tensor, torch.Tensor) and tensor.numel() > 1
    ]
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in states}
    return {
        "stage": mesh.at.pipeline,
        "num_parameters": sum(parameter.numel() for parameter in parameters),
        "weights": sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        "gradients": sum(
            parameter.main_grad.numel() * parameter.main_grad.element_size()
            for parameter in parameters
            if parameter.requires_grad
        ),
        "optimizer": sum(num_bytes for address, num_bytes in storages.items() if address not in own),
        "saved": meter.peak,
    }


LAYOUTS = {
    "alone": (1, {}),
    "tensor": (2, {"tensor": 2}),
    "tensor, sequence": (2, {"tensor": 2, "sequence": True}),
    "stages": (2, {"pipeline": 2}),
    "interleaved": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "data": (2, {}),
    "data, plain optimizer": (2, {"distributed_optimizer": False}),
    "context": (2, {"context": 2}),
    "context, tensor, sequence": (4, {"context": 2, "tensor": 2, "sequence": True}),
}


@pytest.mark.parametrize("precision", mostly_long(["bf16", "fp32"], "bf16"))
@pytest.mark.parametrize("layout", mostly_long(LAYOUTS, "interleaved", "context, tensor, sequence"))
def test_a_step_holds_what_is_estimated(layout, precision):
    world_size, parallel = LAYOUTS[layout]
    config = make_config(parallel=parallel, train={"precision": precision})
    check(config, world_size)


@pytest.mark.parametrize("recompute", mostly_long(["none", "selective"], "selective"))
@pytest.mark.parametrize(
    ("layout", "num_kv_heads"),
    [
        pytest.param("alone", 8, marks=pytest.mark.long),
        ("alone", 1),
        ("tensor", 8),
        pytest.param("context", 8, marks=pytest.mark.long),
        pytest.param("context", 1, marks=pytest.mark.long),
    ],
)
def test_groups_of_heads_hold_what_is_estimated(layout, num_kv_heads, recompute):
    """Of eight heads: whether a query is copied out of its projection depends on how many share a key."""
    world_size, parallel = LAYOUTS[layout]
    hf_config = {**SHAPE, "num_attention_heads": 8, "num_key_value_heads": num_kv_heads, "head_dim": 16}
    check(make_config(hf_config, parallel=parallel, train={"recompute": recompute}), world_size)


ADAPTERS = {
    "all": LoraSection(rank=4),
    "all, dropout": LoraSection(rank=4, dropout=0.1),
    "some, dropout": LoraSection(rank=4, dropout=0.1, targets=("q_proj", "v_proj", "down_proj")),
}


@pytest.mark.parametrize(
    ("parallel", "lora", "recompute"),
    [
        pytest.param({}, "all", "none", marks=pytest.mark.long),
        pytest.param({}, "all, dropout", "none", marks=pytest.mark.long),
        ({}, "some, dropout", "selective"),
        pytest.param({"tensor": 2, "sequence": True}, "all, dropout", "none", marks=pytest.mark.long),
        pytest.param({"tensor": 2, "sequence": True}, "all, dropout", "selective", marks=pytest.mark.long),
        pytest.param({"context": 2}, "all, dropout", "none", marks=pytest.mark.long),
        pytest.param({"context": 2}, "some, dropout", "none", marks=pytest.mark.long),
    ],
)
def test_adapters_hold_what_is_estimated(parallel, lora, recompute):
    """On the second stage; in front of the first layer's adapters nothing is kept."""
    config = make_config(parallel={"pipeline": 2, **parallel}, train={"recompute": recompute})
    config = config.model_copy(update={"lora": ADAPTERS[lora]})
    check(config, 2 * parallel.get("tensor", 1) * parallel.get("context", 1), stages=(1,))


@pytest.mark.parametrize("recompute", mostly_long(["selective", "full"], "full"))
def test_recomputing_keeps_what_is_estimated(recompute):
    config = make_config(parallel={"pipeline": 2}, train={"precision": "bf16", "recompute": recompute})
    # The last stage recomputes a layer when the logits are gone: there the estimate is their sum, and above.
    check(config, 2, stages=(0, 1) if recompute == "selective" else (0,))


def check(config: Config, world_size: int, stages: tuple[int, ...] = (0, 1)) -> None:
    layout, model = config.parallel.layout(world_size), shape_of(config)
    estimates = estimate_stages(config, model, layout, on_gpu=False)
    for counted in run_ranks(count_bytes, world_size, config):
        estimate = estimates[counted["stage"]]
        assert counted["num_parameters"] == estimate.num_parameters
        assert counted["weights"] == estimate.weights
        assert counted["gradients"] == estimate.gradients
        # The distributed optimizer divides buffers that are padded, at any element.
        assert counted["optimizer"] == pytest.approx(estimate.optimizer, rel=0.02)
        expected = estimate.activations + estimate.logits
        # A few numbers of each token, which would be nothing beside a model of real size.
        tokens = config.train.seq_len // layout.context
        expected += 8 * tokens * (estimate.stage == 0)  # looked up in the embedding
        expected += (
            (8 + 3 * 4 + 4) * tokens * (estimate.stage == layout.pipeline - 1)
        )  # label, statistics, weight
        expected += (
            2 * 4 * tokens * (estimate.stage == layout.pipeline - 1 and layout.tensor > 1)
        )  # those of all
        expected += 8 * config.train.seq_len * (layout.context > 1)  # the order of gathered keys
        if (
            config.train.recompute != "none"
        ):  # the rotation tables are then kept by the micro-batch, not by autograd
            alive = microbatches_alive(layout, estimate.stage, NUM_MICROBATCHES // layout.data)
            expected -= alive * config.train.seq_len * 4 * model.head_dim
            expected -= alive * config.train.seq_len // layout.context * 8 * (layout.context > 1)
        if layout.sequence and layout.tensor > 1:  # autograd does not keep the buffer of gathered inputs
            element = 2 if config.train.precision == "bf16" else 4
            expected -= element * model.hidden_size * config.train.seq_len // layout.context
        if counted["stage"] in stages:
            tolerance = 0.05 if config.train.recompute == "full" else 0.003
            assert counted["saved"] == pytest.approx(expected, rel=tolerance)


def test_parameters_of_all_stages_are_those_of_the_model():
    config = make_config(parallel={"pipeline": 8, "vocab_multiple": 1})
    layout = config.parallel.layout(8)
    total = sum(stage_parameters(LLAMA2_70B, layout, stage, 1) for stage in range(8))
    assert total == LLAMA2_70B.num_parameters


def test_activations_by_hand():
    """Llama-2-7B, bf16, one GPU: per token and layer, in units of h (f = 2.6875 h, as many kv heads as heads)."""
    layout = make_config().parallel.layout(1)
    num_bytes = layer_activation_bytes_per_token(
        LLAMA2_7B, layout, precision="bf16", recompute="none", on_gpu=True
    )
    in_h = 2 * 2 + 2 * 2 + 2 * 3 + 2 * 2 + 2 * 1 + 4 * 2 * 2.6875
    assert num_bytes == pytest.approx(in_h * 4096 + 2 * 4 + 4 * 32)


def test_tensor_and_sequence_parallelism_divide_everything():
    alone, eight = (
        make_config(parallel=p).parallel.layout(n) for p, n in (({}, 1), ({"tensor": 8, "sequence": True}, 8))
    )
    options = {"precision": "bf16", "recompute": "none", "on_gpu": True}
    one = layer_activation_bytes_per_token(LLAMA2_70B, alone, **options)
    assert layer_activation_bytes_per_token(LLAMA2_70B, eight, **options) == pytest.approx(one / 8)


@pytest.mark.parametrize(
    ("virtual", "stage", "num_microbatches", "alive"),
    [(1, 0, 64, 8), (1, 7, 64, 1), (1, 0, 3, 3), (2, 0, 64, 23), (2, 7, 64, 9), (2, 0, 8, 16)],
)
def test_microbatches_alive(virtual, stage, num_microbatches, alive):
    layout = make_config(parallel={"pipeline": 8, "virtual_pipeline": virtual}).parallel.layout(8)
    assert microbatches_alive(layout, stage, num_microbatches) == alive


MEDITRON_70B = {
    "parallel": {"tensor": 8, "pipeline": 8, "sequence": True},
    "train": {"seq_len": 4096, "micro_batch_size": 2, "global_batch_size": 512, "recompute": "selective"},
}


def test_the_published_run_fits_its_gpus():
    config = make_config(**MEDITRON_70B)
    estimate = fullest_stage(config, LLAMA2_70B, config.parallel.layout(128))
    assert estimate.stage == 0
    assert estimate.total < HARDWARE["a100-80gb"].memory_bytes
    require_fit(estimate, "a100-80gb")


def test_adapters_of_the_70b_fit_on_one_node_and_the_whole_model_does_not():
    train = {"seq_len": 4096, "micro_batch_size": 1, "global_batch_size": 64, "recompute": "full"}
    sections = {"parallel": {"tensor": 8, "sequence": True}, "train": train}
    whole = make_config(**sections)
    with pytest.raises(UserError):
        require_fit(fullest_stage(whole, LLAMA2_70B, whole.parallel.layout(8)), "a100-80gb")
    adapters = whole.model_copy(update={"lora": LoraSection(rank=16)})
    estimate = fullest_stage(adapters, LLAMA2_70B, adapters.parallel.layout(8))
    require_fit(estimate, "a100-80gb")
    # By hand, of 80 layers on 8 ranks: q, k, v, gate, up have A whole and B split; o, down the reverse.
    h, f, kv = 8192, 28672, 1024
    split_outputs = 5 * h + (h + 2 * kv + 2 * f) // 8
    split_inputs = (h + f) // 8 + 2 * h
    assert estimate.gradients == 4 * 80 * 16 * (split_outputs + split_inputs)


def test_what_does_not_fit_is_refused_with_its_parts():
    config = make_config(train={"seq_len": 4096, "micro_batch_size": 1, "global_batch_size": 8})
    estimate = fullest_stage(config, LLAMA2_70B, config.parallel.layout(8))
    with pytest.raises(UserError) as caught:
        require_fit(estimate, "h100-80gb")
    message = str(caught.value)
    assert "stage 0" in message and "gradients" in message and "parallel.tensor" in message
    assert describe(estimate) in message


def test_an_unknown_gpu_is_named():
    config = make_config()
    estimate = fullest_stage(config, shape_of(config), config.parallel.layout(1))
    with pytest.raises(UserError, match="'v100'.*a100-80gb"):
        require_fit(estimate, "v100")
