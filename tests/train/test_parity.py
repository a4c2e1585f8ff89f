"""Every layout computes what transformers and torch's AdamW compute with each document alone."""

from __future__ import annotations

import pytest
import torch

from meditron_train.native.backends import choose_backend
from tests.distributed import run_ranks
from tests.long import mostly_long
from tests.train.ranks import assemble, make_config, train_ranks
from tests.train.reference import hf_model, random_batch, train_reference

NUM_STEPS = 3
LAYOUTS = {
    "tp1-pp1-dp1": (1, {"distributed_optimizer": False}),
    "tp2": (2, {"tensor": 2}),
    "tp2-sp": (2, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"pipeline": 2}),
    "pp2-interleaved": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "dp2-distributed-optimizer": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "pp2-interleaved-dp2-overlap": (
        4,
        {"pipeline": 2, "virtual_pipeline": 2, "overlap_grad_reduce": True, "overlap_param_gather": True},
    ),
    "cp2": (2, {"context": 2}),
    "pp2-cp2": (4, {"pipeline": 2, "context": 2}),
    "tp2-pp2-dp2": (8, {"tensor": 2, "pipeline": 2, "sequence": True}),
    "tp2-cp2-dp2": (8, {"tensor": 2, "context": 2, "sequence": True}),
}
QUICK = ("tp1-pp1-dp1", "dp2-distributed-optimizer", "tp2-sp", "pp2-interleaved", "cp2", "tp2-pp2-dp2")


def make_steps(micro_batch_size: int = 1, per_step: int = 8, num_steps: int = NUM_STEPS):
    return [
        [random_batch(100 * step + i, micro_batch_size=micro_batch_size) for i in range(per_step)]
        for step in range(num_steps)
    ]


def reference_run(directory, steps, **overrides):
    model = hf_model(**overrides)
    model.save_pretrained(directory)
    history = train_reference(model, steps, lr=3e-3, weight_decay=0.1, clip=1.0, betas=(0.9, 0.95), eps=1e-5)
    return directory, history, {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return reference_run(tmp_path_factory.mktemp("parity") / "hf", make_steps())


def assert_agrees(history, weights, expected_history, expected_weights, tolerance=1e-5):
    for step, ((loss, norm), (expected_loss, expected_norm)) in enumerate(
        zip(history, expected_history, strict=True), start=1
    ):
        assert loss == pytest.approx(expected_loss, rel=tolerance), f"loss of step {step}"
        assert norm == pytest.approx(expected_norm, rel=10 * tolerance), f"gradient norm of step {step}"
    assert weights.keys() == expected_weights.keys()
    for name, expected in expected_weights.items():
        difference = (weights[name] - expected).abs().max() / expected.abs().max()
        assert difference <= tolerance, f"{name} differs by {difference:.2e} of its largest value"


def run_layout(directory, world_size, parallel, steps, **sections):
    from meditron_train.checkpoint.hf.config import read_hf_config

    config = make_config(directory, {"parallel": parallel, **sections})
    results = run_ranks(train_ranks, world_size, config, steps)
    histories = [history for history, _ in results]
    assert all(history == histories[0] for history in histories), "ranks report different losses"
    weights = assemble(read_hf_config(directory), [w for _, w in results], parallel.get("tensor", 1))
    return histories[0], weights


@pytest.mark.parametrize("layout", mostly_long(LAYOUTS, *QUICK))
def test_every_layout_agrees_with_transformers(layout, reference):
    directory, expected_history, expected_weights = reference
    history, weights = run_layout(directory, *LAYOUTS[layout], make_steps())
    assert_agrees(history, weights, expected_history, expected_weights)


# Heads of 16, which our kernels take: with 8 PyTorch attends.
OUR_ATTENTION = {
    "cp2": (2, {"context": 2}, {}),
    "cp2, selective recomputation": (2, {"context": 2}, {"recompute": "selective"}),
    "selective recomputation": (1, {}, {"recompute": "selective"}),
    "full recomputation": (1, {}, {"recompute": "full"}),
}


@pytest.fixture(scope="module")
def reference_of_wider_heads(tmp_path_factory):
    steps = make_steps(per_step=4, num_steps=4)
    return steps, *reference_run(tmp_path_factory.mktemp("wider") / "hf", steps, head_dim=16)


@pytest.mark.parametrize("case", mostly_long(OUR_ATTENTION, "cp2, selective recomputation"))
def test_our_attention_agrees_with_transformers(case, reference_of_wider_heads):
    steps, directory, expected_history, expected_weights = reference_of_wider_heads
    world_size, parallel, train = OUR_ATTENTION[case]
    assert choose_backend("auto", torch.device("cpu"), torch.float32, 16) == "native"
    history, weights = run_layout(
        directory, world_size, parallel, steps, train={"precision": "fp32", **train}
    )
    assert_agrees(history, weights, expected_history, expected_weights, tolerance=3e-5)


@pytest.mark.long
def test_tied_embeddings_and_several_samples_per_micro_batch(tmp_path):
    steps = make_steps(micro_batch_size=2, per_step=4, num_steps=4)
    directory, expected_history, expected_weights = reference_run(
        tmp_path / "hf", steps, tie_word_embeddings=True
    )
    history, weights = run_layout(directory, 4, {"tensor": 2, "pipeline": 2}, steps)
    assert_agrees(history, weights, expected_history, expected_weights)


def test_bf16_follows_the_fp32_reference(tmp_path):
    steps = make_steps(per_step=2, num_steps=6)
    directory, expected_history, _ = reference_run(tmp_path / "hf", steps)
    history, _ = run_layout(directory, 2, {"tensor": 2}, steps, train={"precision": "bf16"})
    losses = torch.tensor([loss for loss, _ in history])
    expected = torch.tensor([loss for loss, _ in expected_history])
    assert (losses / expected - 1).abs().max() < 0.02
    assert losses[-1] < losses[0]


SHAPES = {
    "llama-3 RoPE scaling": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "linear RoPE scaling": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "Code Llama's theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "heads wider than the hidden size": {"head_dim": 16},
    "multi-head attention, vocabulary of 128": {"num_key_value_heads": 8, "vocab_size": 128},
}


@pytest.mark.long
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_llama_agrees_with_transformers(shape, tmp_path):
    overrides = dict(SHAPES[shape])
    vocab_size = overrides.get("vocab_size", 131)
    steps = [[random_batch(10 * step + i, vocab_size=vocab_size) for i in range(4)] for step in range(2)]
    if "rope_parameters" in overrides:
        overrides["rope_theta"] = None  # stands in rope_parameters
    directory, expected_history, expected_weights = reference_run(tmp_path / "hf", steps, **overrides)
    history, weights = run_layout(directory, 2, {"tensor": 2, "sequence": True}, steps)
    # Adam's first steps divide by a second moment of one or two gradients: rounding of the small ones shows.
    assert_agrees(history, weights, expected_history, expected_weights, tolerance=3e-5)


# Three layers on two stages: two and one. With a window, which layers have it depends on their number in the model.
UNEVEN = {
    "pp2": ({"num_hidden_layers": 3}, 2, {"pipeline": 2}),
    "tied-pp2-dp2": ({"num_hidden_layers": 3, "tie_word_embeddings": True}, 4, {"pipeline": 2}),
}


@pytest.mark.long
@pytest.mark.parametrize("case", UNEVEN)
def test_uneven_stages_agree_with_transformers(case, tmp_path):
    overrides, world_size, parallel = UNEVEN[case]
    steps = [[random_batch(10 * step + i) for i in range(4)] for step in range(3)]
    directory, expected_history, expected_weights = reference_run(tmp_path / "hf", steps, **overrides)
    history, weights = run_layout(directory, world_size, parallel, steps)
    assert_agrees(history, weights, expected_history, expected_weights, tolerance=3e-5)


# (what train.freeze says, what stays of transformers' model, ranks, layout, tied weights)
FROZEN = {
    "first layers and embeddings, pp2": (
        {"embeddings": True, "first_layers": 2},
        ("model.embed_tokens", "model.layers.0.", "model.layers.1."),
        (2, {"pipeline": 2}, False),
    ),
    "tied embeddings, dp2 with overlap": (
        {"embeddings": True},
        ("model.embed_tokens",),
        (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}, True),
    ),
    "all but one layer, tp2": (
        {"all_but_layers": [2]},
        (*("model.embed_tokens", "model.norm", "lm_head"), *(f"model.layers.{n}." for n in (0, 1, 3))),
        (2, {"tensor": 2, "distributed_optimizer": False}, False),
    ),
}


@pytest.mark.parametrize("case", mostly_long(FROZEN, "first layers and embeddings, pp2"))
def test_frozen_parts_keep_every_bit_and_the_rest_agrees_with_transformers(case, tmp_path):
    freeze, frozen, (world_size, parallel, tied) = FROZEN[case]
    steps = [[random_batch(10 * step + i) for i in range(4)] for step in range(3)]
    model = hf_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "hf")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    expected_history = train_reference(
        model, steps, lr=3e-3, weight_decay=0.1, clip=1.0, betas=(0.9, 0.95), eps=1e-5
    )
    history, weights = run_layout(
        tmp_path / "hf", world_size, parallel, steps, train={"precision": "fp32", "freeze": freeze}
    )
    expected = {name: p.detach() for name, p in model.named_parameters()}
    assert_agrees(history, weights, expected_history, expected, tolerance=3e-5)
    stayed = [name for name in weights if name.startswith(frozen)]
    assert stayed and all(torch.equal(weights[name], before[name]) for name in stayed)


MISTRAL = {"model_type": "mistral", "sliding_window": 7}
QWEN2 = {"model_type": "qwen2", "head_dim": None}
WINDOW_FROM_LAYER_1 = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
FAMILIES = {
    "mistral-tp2-sp": (MISTRAL, 2, {"tensor": 2, "sequence": True}),
    "mistral-cp2": (MISTRAL, 2, {"context": 2}),
    "qwen2-tp2": (QWEN2, 2, {"tensor": 2}),
    "qwen2-tp2-sp-dp2": (QWEN2, 4, {"tensor": 2, "sequence": True}),
    # Which layers have the window depends on their number in the whole model.
    "qwen2-tied-window-tp2-pp2-interleaved": (
        {**QWEN2, **WINDOW_FROM_LAYER_1, "tie_word_embeddings": True},
        4,
        {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2},
    ),
}


@pytest.mark.parametrize("case", mostly_long(FAMILIES, "qwen2-tied-window-tp2-pp2-interleaved"))
def test_every_family_agrees_with_transformers(case, tmp_path):
    overrides, world_size, parallel = FAMILIES[case]
    steps = make_steps(micro_batch_size=2, per_step=4)
    directory, expected_history, expected_weights = reference_run(tmp_path / "hf", steps, **overrides)
    history, weights = run_layout(directory, world_size, parallel, steps)
    assert_agrees(history, weights, expected_history, expected_weights, tolerance=3e-5)
