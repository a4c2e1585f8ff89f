from __future__ import annotations

import pytest

from meditron_train.layout import SPLIT_DIMS, ParallelLayout, RankCoordinates, split_dim


def test_ranks_are_numbered_tensor_fastest_pipeline_slowest():
    layout = ParallelLayout(world_size=16, tensor=2, context=2, pipeline=2)
    assert layout.data == 2
    assert layout.coordinates(0) == RankCoordinates(tensor=0, context=0, data=0, pipeline=0)
    assert layout.coordinates(1) == RankCoordinates(tensor=1, context=0, data=0, pipeline=0)
    assert layout.coordinates(2) == RankCoordinates(tensor=0, context=1, data=0, pipeline=0)
    assert layout.coordinates(4) == RankCoordinates(tensor=0, context=0, data=1, pipeline=0)
    assert layout.coordinates(8) == RankCoordinates(tensor=0, context=0, data=0, pipeline=1)
    assert len({layout.coordinates(rank) for rank in range(16)}) == 16


def test_coordinates_match_megatron_core():
    rank_generator = pytest.importorskip("megatron.core.parallel_state").RankGenerator
    layout = ParallelLayout(world_size=24, tensor=2, context=3, pipeline=2)
    generator = rank_generator(tp=2, ep=1, dp=layout.data, pp=2, cp=3, order="tp-cp-ep-dp-pp")
    for name, token in (("tensor", "tp"), ("context", "cp"), ("data", "dp"), ("pipeline", "pp")):
        for group in generator.get_ranks(token):
            assert [getattr(layout.coordinates(rank), name) for rank in group] == list(range(len(group)))


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_outside_the_world_is_refused(rank):
    with pytest.raises(ValueError, match=f"rank {rank} is outside the world of 4 ranks"):
        ParallelLayout(world_size=4).coordinates(rank)


def test_interleaved_chunks_are_dealt_in_turn():
    layout = ParallelLayout(world_size=2, pipeline=2, virtual_pipeline=2)
    assert [list(layout.layers_of(stage, chunk, 8)) for chunk in range(2) for stage in range(2)] == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
    ]


@pytest.mark.parametrize(("pipeline", "virtual"), [(1, 1), (2, 1), (4, 1), (2, 3), (3, 2)])
def test_every_layer_has_exactly_one_home(pipeline, virtual):
    layout = ParallelLayout(world_size=pipeline, pipeline=pipeline, virtual_pipeline=virtual)
    layers = [
        n for stage in range(pipeline) for chunk in range(virtual) for n in layout.layers_of(stage, chunk, 12)
    ]
    assert sorted(layers) == list(range(12))
    assert [layer for stage in range(pipeline) for layer in layout.layers_on(stage, 12)] == layers


@pytest.mark.parametrize(
    ("pipeline", "num_layers", "counts"),
    [(2, 7, [4, 3]), (4, 9, [2, 3, 2, 2]), (4, 11, [3, 3, 3, 2]), (4, 80, [20] * 4), (3, 3, [1] * 3)],
)
def test_layers_that_do_not_divide_go_to_the_middle_and_never_to_the_last_stage(pipeline, num_layers, counts):
    layout = ParallelLayout(world_size=pipeline, pipeline=pipeline)
    assert layout.layer_counts(num_layers) == counts
    stages = [list(layout.layers_of(stage, 0, num_layers)) for stage in range(pipeline)]
    assert [len(stage) for stage in stages] == counts
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))


def test_layers_that_cannot_be_dealt_and_unknown_chunks_are_refused():
    layout = ParallelLayout(world_size=2, pipeline=2)
    with pytest.raises(ValueError, match="1 layers are fewer than parallel.pipeline = 2"):
        layout.layers_of(0, 0, 1)
    with pytest.raises(ValueError, match="6 layers are not divisible by .* 2 x 2 = 4"):
        ParallelLayout(world_size=2, pipeline=2, virtual_pipeline=2).layers_of(0, 0, 6)
    with pytest.raises(ValueError, match="no chunk 1 on stage 0"):
        layout.layers_of(0, 1, 8)


def test_problems():
    assert ParallelLayout(world_size=8, tensor=2, pipeline=2, context=2).problems() == []
    (problem,) = ParallelLayout(world_size=6, tensor=4).problems()
    assert "world size 6" in problem
    assert "multiple of 4" in problem
    (problem,) = ParallelLayout(world_size=4, virtual_pipeline=2).problems()
    assert "parallel.virtual_pipeline is 2 but parallel.pipeline is 1" in problem
    (problem,) = ParallelLayout(world_size=4, tensor=0).problems()
    assert "parallel.tensor is 0" in problem


def test_every_tensor_of_a_model_stands_in_the_parallel_plan() -> None:
    from meditron_train.checkpoint.tensor_map import LAYER_ROWS

    rows = {row.name for rows in LAYER_ROWS.values() for row in rows}
    outside = {"embedding.word_embeddings.weight", "final_layernorm.weight", "output_layer.weight"}
    assert rows | outside == {name for name in SPLIT_DIMS if "_lora_" not in name}
    assert split_dim("decoder.layers.31.self_attention.linear_proj.weight") == 1
    assert split_dim("decoder.layers.3.mlp.linear_fc1.weight") == split_dim("output_layer.weight") == 0
    assert split_dim("decoder.final_layernorm.weight") is None
    assert split_dim("other_output_layer.weight") is None
