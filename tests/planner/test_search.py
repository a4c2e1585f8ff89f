from __future__ import annotations

import pytest

from meditron_train.planner.hardware import HARDWARE
from meditron_train.planner.memory import fullest_stage
from meditron_train.planner.search import search_layouts
from tests.planner.test_flops import LLAMA2_7B, LLAMA2_70B
from tests.planner.test_memory import make_config

A100 = HARDWARE["a100-80gb"]


def config_of(**train):
    return make_config(train={"seq_len": 4096, "micro_batch_size": 1, "global_batch_size": 512, **train})


@pytest.mark.parametrize(("num_gpus", "fits"), [(8, False), (16, False), (32, True)])
def test_llama2_70b_needs_32_gpus_of_80_gb(num_gpus, fits):
    """What users of Megatron-LLM report as the minimum for full training."""
    found = search_layouts(config_of(), LLAMA2_70B, num_gpus, A100)
    assert bool(found.candidates) == fits
    if not fits:
        assert any("memory of a100-80gb" in reason for reason in found.rejected)


def test_candidates_are_sound_and_sorted():
    found = search_layouts(config_of(), LLAMA2_70B, 128, A100)
    speeds = [candidate.step.tokens_per_second for candidate in found.candidates]
    assert speeds == sorted(speeds, reverse=True)
    for candidate in found.candidates:
        layout, train = candidate.layout, candidate.config.train
        assert not layout.problems() and layout.world_size == 128
        assert 512 % (train.micro_batch_size * layout.data) == 0
        assert LLAMA2_70B.num_layers % (layout.pipeline * layout.virtual_pipeline) == 0
        assert layout.tensor <= A100.gpus_per_node
        assert fullest_stage(candidate.config, LLAMA2_70B, layout).total <= A100.memory_bytes
        assert candidate.config.parallel.layout(128) == layout


def test_a_search_finds_no_slower_layout_than_the_published_one():
    config = make_config(
        parallel={"tensor": 8, "pipeline": 8, "sequence": True},
        train={"seq_len": 4096, "micro_batch_size": 2, "global_batch_size": 512, "recompute": "selective"},
    )
    from meditron_train.planner.throughput import predict_step

    published = predict_step(config, LLAMA2_70B, config.parallel.layout(128), A100)
    best = search_layouts(config, LLAMA2_70B, 128, A100).candidates[0]
    assert best.step.tokens_per_second >= published.tokens_per_second


def test_reasons_are_counted():
    found = search_layouts(config_of(global_batch_size=3), LLAMA2_7B, 8, A100)
    assert found.rejected["the global batch is not a multiple of micro-batch x data"] > 0
    assert all(candidate.layout.data in (1, 3) for candidate in found.candidates)
