from __future__ import annotations

import itertools

import pytest

from meditron_train.config.check import check_config
from meditron_train.errors import UserError
from meditron_train.layout import ParallelLayout
from meditron_train.planner.hardware import HARDWARE
from meditron_train.planner.memory import fullest_stage
from meditron_train.planner.search import search_layouts
from tests.planner.test_flops import LLAMA2_7B, LLAMA2_70B
from tests.planner.test_memory import make_config, shape_of

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
        layout = candidate.layout
        assert layout.world_size == 128
        check_config(candidate.config, LLAMA2_70B, 128, check_files=False, with_warnings=False)
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


RAMP = {"start": 24, "increment": 24, "samples": 100}


@pytest.mark.parametrize(
    ("num_layers", "train"),
    [
        (4, {"global_batch_size": 48}),
        (5, {"global_batch_size": 48}),
        (4, {"seq_len": 100, "global_batch_size": 48}),
        (4, {"global_batch_size": 48, "micro_batch_size": 3}),
        (6, {"global_batch_size": 72, "batch_ramp": RAMP}),
    ],
    ids=["plain", "uneven", "a sequence that does not divide", "an own micro-batch", "ramp"],
)
def test_what_train_accepts_is_found(num_layers, train):
    """Every layout on eight GPUs, one by one, up to what the search promises to try."""
    config = make_config(train={"seq_len": 128, "micro_batch_size": 1, **train})
    model = shape_of(config).model_copy(update={"num_layers": num_layers})
    accepted = set()
    micro_batches = {1, 2, 4, 8, 16, config.train.micro_batch_size}
    sizes = range(1, 9)
    for tensor, pipeline, virtual, context in itertools.product(sizes, sizes, sizes, (1, 2, 4, 8)):
        if ParallelLayout(8, tensor, pipeline, virtual, context).problems():
            continue
        for micro_batch_size, sequence in itertools.product(micro_batches, (False, True)):
            parallel = {
                "tensor": tensor,
                "pipeline": pipeline,
                "virtual_pipeline": virtual,
                "context": context,
            }
            tried = make_config(
                parallel={**parallel, "sequence": sequence},
                train={"seq_len": 128, **train, "micro_batch_size": micro_batch_size},
            )
            try:
                check_config(tried, model, 8, check_files=False, with_warnings=False)
            except UserError:
                continue
            accepted.add((tensor, pipeline, virtual, context, micro_batch_size))
    found = search_layouts(config, model, 8, A100).candidates
    layouts = [
        (c.layout.tensor, c.layout.pipeline, c.layout.virtual_pipeline, c.layout.context) for c in found
    ]
    tried_sizes = [c.config.train.micro_batch_size for c in found]
    assert {(*layout, size) for layout, size in zip(layouts, tried_sizes, strict=True)} == accepted
    assert len(found) == len(accepted)
    for candidate in found:
        check_config(candidate.config, model, 8, check_files=False, with_warnings=False)


def test_context_parallelism_is_tried_and_counted():
    found = search_layouts(config_of(), LLAMA2_7B, 8, A100)
    assert {candidate.layout.context for candidate in found.candidates} == {1, 2, 4, 8}
    assert found.rejected["the GPUs are not a multiple of tensor x pipeline x context"] > 0


def test_a_ramp_that_never_arrives_is_the_reason():
    ramp = {"start": 100, "increment": 100, "samples": 1000}
    found = search_layouts(config_of(batch_ramp=ramp), LLAMA2_7B, 8, A100)
    assert not found.candidates and any("never reaches" in reason for reason in found.rejected)
