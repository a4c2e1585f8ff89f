"""Predicted step times, their parts by hand; tests/benchmarks/test_planning.py has the published runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.published_runs import MEDITRON_70B
from meditron_train.config.finetuning import LoraSection
from meditron_train.planner.flops import mfu
from meditron_train.planner.hardware import HARDWARE
from meditron_train.planner.throughput import link_bytes_per_second, predict_step, predicted_mfu
from tests.planner.test_flops import LLAMA2_70B
from tests.planner.test_memory import make_config

A100, H100 = HARDWARE["a100-80gb"], HARDWARE["h100-80gb"]
_OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}


def test_matrices_by_hand():
    """One GPU, one layer's worth of arithmetic at a known speed: 6 FLOPs per matrix parameter and token."""
    config = make_config(train={"seq_len": 4096, "micro_batch_size": 1, "global_batch_size": 4})
    model = LLAMA2_70B.model_copy(update={"num_layers": 1})
    hardware = replace(A100, matmul_efficiency=0.5, bf16_flops=1e14)
    step = predict_step(config, model, config.parallel.layout(1), hardware)
    parameters = 8192 * (2 * 8192 + 2 * 1024) + 3 * 8192 * 28672 + 32000 * 8192
    side = 4096  # the tokens
    expected = 4 * 6 * parameters * 4096 / (0.5e14 * side / (side + 128))
    assert step.matrices == pytest.approx(expected, rel=1e-6)
    assert (
        step.tensor_communication
        == step.bubble
        == step.data_communication
        == step.pipeline_communication
        == 0
    )


def test_the_bubble_is_that_of_the_schedule():
    """(P - 1) / (m v) of the time of equal stages."""
    for chunks in (1, 2):
        config = make_config(
            parallel={"pipeline": 4, "virtual_pipeline": chunks},
            train={"seq_len": 2048, "micro_batch_size": 1, "global_batch_size": 32},
        )
        model = LLAMA2_70B.model_copy(update={"num_layers": 8, "vocab_size": 1})  # no heavier last stage
        step = predict_step(config, model, config.parallel.layout(4), A100)
        compute = step.matrices + step.attention + step.elementwise
        assert step.bubble / compute == pytest.approx(3 / (32 * chunks), rel=0.01)


def test_short_documents_need_less_attention():
    config = make_config(train={"seq_len": 4096, "micro_batch_size": 1, "global_batch_size": 8})
    layout = config.parallel.layout(1)
    long = predict_step(config, LLAMA2_70B, layout, H100)
    short = predict_step(config, LLAMA2_70B, layout, H100, mean_document_tokens=512)
    assert short.attention == pytest.approx(long.attention / 8)
    assert short.matrices == long.matrices


@pytest.mark.parametrize(
    ("window", "document"), [(512, 4096), (512, 1000), (512, 512), (512, 100), (9999, 4096)]
)
@pytest.mark.parametrize("num_full_layers", [0, 3])
def test_a_window_limits_the_keys(window, document, num_full_layers):
    """Keys counted one by one, in a model of four layers of which the first three have a window or have none."""
    config = make_config(train={"seq_len": 4096, "micro_batch_size": 1, "global_batch_size": 8})
    layout = config.parallel.layout(1)
    full = LLAMA2_70B.model_copy(update={"num_layers": 4})
    limits = {"sliding_window": window, "num_full_attention_layers": num_full_layers}
    windowed = full.model_copy(update=limits)
    times = [
        predict_step(config, model, layout, H100, mean_document_tokens=document) for model in (windowed, full)
    ]
    all_keys = sum(token + 1 for token in range(document))
    seen = sum(min(token + 1, window) for token in range(document))
    expected = (num_full_layers * all_keys + (4 - num_full_layers) * seen) / (4 * all_keys)
    assert times[0].attention / times[1].attention == pytest.approx(expected, rel=0.005)
    assert times[0].matrices == times[1].matrices


def test_the_stage_with_the_most_layers_sets_the_pace():
    """Seven layers on two stages are four and three: as slow as eight."""
    config = make_config(
        parallel={"pipeline": 2, "vocab_multiple": 1},
        train={"seq_len": 2048, "micro_batch_size": 1, "global_batch_size": 32},
    )
    uneven, even, one = (
        predict_step(
            config,
            LLAMA2_70B.model_copy(update={"num_layers": num_layers, "vocab_size": 1}),
            config.parallel.layout(2),
            A100,
        )
        for num_layers in (7, 8, 2)
    )
    assert uneven.matrices == pytest.approx(even.matrices, rel=1e-4)
    assert uneven.attention == pytest.approx(even.attention)
    # The bubble is one micro-batch of a mean stage: 3.5 layers.
    per_layer = (one.matrices + one.attention + one.elementwise) / 32
    assert uneven.bubble == pytest.approx(3.5 * per_layer, rel=1e-3)


def test_padding_of_the_vocabulary_is_multiplied_too():
    train = {"seq_len": 4096, "micro_batch_size": 1, "global_batch_size": 1}
    padded = make_config(parallel={"vocab_multiple": 64000}, train=train)
    real = make_config(train=train)
    large = LLAMA2_70B.model_copy(update={"vocab_size": 64000})
    times = [
        predict_step(config, model, config.parallel.layout(1), A100)
        for config, model in ((padded, LLAMA2_70B), (real, large))
    ]
    assert times[0].matrices == times[1].matrices and times[0].elementwise == times[1].elementwise


@pytest.mark.parametrize(("recompute", "collectives"), [("none", 2), ("selective", 3), ("full", 3)])
def test_keys_and_values_are_gathered_again_only_where_attention_is_recomputed(recompute, collectives):
    """By hand: an all-gather forward and a reduce-scatter backward of keys and values, 8 heads of 128 in bf16."""
    config = make_config(
        parallel={"context": 4},
        train={"seq_len": 8192, "micro_batch_size": 1, "global_batch_size": 1, "recompute": recompute},
    )
    hardware = replace(A100, latency_s=0, nvlink_bytes_per_second=1e11, link_efficiency=0.5)
    step = predict_step(config, LLAMA2_70B, config.parallel.layout(4), hardware)
    received = 3 * 2048 * 2 * 8 * 128 * 2
    assert step.context_communication == pytest.approx(collectives * 80 * received / 0.5e11)


def test_the_plain_optimizers_gradients_overlap_too():
    parallel = {"distributed_optimizer": False}
    train = {"seq_len": 4096, "micro_batch_size": 1, "global_batch_size": 64}
    plain, hidden = (
        predict_step(config, LLAMA2_70B, config.parallel.layout(16), A100)
        for config in (
            make_config(parallel=parallel, train=train),
            make_config(parallel={**parallel, "overlap_grad_reduce": True}, train=train),
        )
    )
    backward = 2 / 3 * (plain.matrices + plain.attention + plain.elementwise) / 4
    saved = plain.data_communication - hidden.data_communication
    assert saved == pytest.approx(min(plain.data_communication, backward))


def test_overlap_hides_at_most_one_micro_batch():
    sections = {"train": {"seq_len": 4096, "micro_batch_size": 1, "global_batch_size": 64}}
    plain, hidden = make_config(**sections), make_config(**sections, parallel=_OVERLAP)
    times = [predict_step(c, LLAMA2_70B, c.parallel.layout(16), A100) for c in (plain, hidden)]
    assert times[0].data_communication > times[1].data_communication > 0
    saved = times[0].data_communication - times[1].data_communication
    per_micro_batch = (times[0].matrices + times[0].attention + times[0].elementwise) / 4
    assert saved <= per_micro_batch * 1.0001


def test_groups_that_leave_a_node_share_its_network():
    within = link_bytes_per_second(H100, group_size=8, stride=1)
    assert within == H100.nvlink_bytes_per_second * H100.link_efficiency
    # Eight groups with one member in each node: each has an eighth of 8 adapters.
    assert link_bytes_per_second(H100, group_size=2, stride=8) == 50e9 * H100.link_efficiency
    # One group of all ranks has the whole network of a node, but no more than NVLink carries to each member.
    assert link_bytes_per_second(H100, group_size=16, stride=1) == 400e9 * H100.link_efficiency


def test_collectives_begin_late_by_a_latency_for_each_member():
    """Eight all-gathers and reduce-scatters in each layer, over four ranks."""
    config = make_config(
        parallel={"tensor": 4, "sequence": True},
        train={"seq_len": 4096, "micro_batch_size": 1, "global_batch_size": 2},
    )
    layout = config.parallel.layout(4)
    without, with_latency = (
        predict_step(config, LLAMA2_70B, layout, replace(A100, latency_s=latency_s))
        for latency_s in (0, 1e-5)
    )
    late = with_latency.tensor_communication - without.tensor_communication
    assert late == pytest.approx(2 * 80 * 8 * 4 * 1e-5)
    assert with_latency.total - without.total == pytest.approx(late)


def test_the_loss_reads_its_logits_twice_and_writes_their_gradient():
    config = make_config(train={"seq_len": 4096, "micro_batch_size": 1, "global_batch_size": 1})
    hardware = replace(A100, memory_bytes_per_second=1e12, memory_efficiency=0.5)
    small, large = (
        predict_step(
            config,
            LLAMA2_70B.model_copy(update={"vocab_size": rows}),
            config.parallel.layout(1),
            hardware,
        )
        for rows in (32000, 64000)
    )
    assert large.elementwise - small.elementwise == pytest.approx(3 * 2 * 32000 * 4096 / 0.5e12)


def test_mfu_of_the_published_run():
    """42.3 % of 128 A100 by 6N at 40,200 tokens/s: the convention that the predictions are given in."""
    step = MEDITRON_70B.predicted()
    mfu = predicted_mfu(step, MEDITRON_70B.model, 4096, MEDITRON_70B.hardware, "bf16")["parameters"]
    assert mfu / step.tokens_per_second * 40_200 == pytest.approx(0.423, rel=0.02)


def test_mfu_with_adapters_is_that_of_a_run():
    config = make_config(train={"seq_len": 4096, "micro_batch_size": 1, "global_batch_size": 8})
    step = predict_step(config, LLAMA2_70B, config.parallel.layout(8), A100)
    lora = LoraSection(rank=16)
    predicted = predicted_mfu(step, LLAMA2_70B, 4096, A100, "bf16", lora)["parameters"]
    in_a_run = mfu(
        LLAMA2_70B, 4096, tokens_per_second=step.tokens_per_second, num_gpus=8, gpu="a100-80gb", lora=lora
    )
    assert predicted == pytest.approx(in_a_run)
    whole = predicted_mfu(step, LLAMA2_70B, 4096, A100, "bf16")["parameters"]
    assert predicted / whole == pytest.approx(2 / 3, rel=0.01)
