"""Predicted step times, their parts by hand; tests/benchmarks/test_planning.py has the published runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.published_runs import MEDITRON_70B
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
