"""The real step on a pretended GPU: what it reports, and that planted faults do not pass."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import Counter

import pytest
import torch

from meditron_train.cli.trace import trace_lines
from meditron_train.flows.trace.device import visible_pairs
from meditron_train.flows.trace.expected import expected_collectives
from meditron_train.flows.trace.findings import problems_of
from meditron_train.flows.trace.ownership import problem_of
from meditron_train.flows.trace.results import RankTrace
from meditron_train.flows.trace.trace import Trace
from tests.flows.trace.traced import SHAPE, audit, make_config, trace_stage
from tests.long import mostly_long

WORLD_SIZE = 8
EIGHT = {"tensor": 2, "pipeline": 2, "sequence": True}


def judge(config, *ranks: RankTrace) -> list[str]:
    return problems_of(ranks, None, config, SHAPE, config.parallel.layout(WORLD_SIZE))


@pytest.fixture(scope="module")
def config():
    return make_config(WORLD_SIZE, parallel=EIGHT)


@pytest.fixture(scope="module")
def first(config):
    return trace_stage(config, WORLD_SIZE, 0)


@pytest.fixture(scope="module")
def last(config):
    return trace_stage(config, WORLD_SIZE, 1)


def test_nothing_is_wrong_with_the_step(config, first, last):
    assert judge(config, first, last) == []
    assert first.failure is None and last.failure is None
    assert first.attention == "flash_attn"  # the first that takes bf16 and this head size


def test_memory_is_what_the_layout_says(first):
    """TP2 DP2: bf16 weights, fp32 gradients, and half of an fp32 copy and two moments, padded to whole blocks."""
    parts = first.peaks[-1].by_part
    assert parts["weights"] == pytest.approx(2 * first.num_parameters, rel=0.02)
    assert parts["gradients"] == pytest.approx(4 * first.num_parameters, rel=0.02)
    assert parts["optimizer"] == pytest.approx(12 * first.num_parameters / 2, rel=0.05)
    assert first.peak.phase == "forward and backward"
    assert first.peak.by_part["activations"] > 0


def test_flops_are_those_of_the_matrices(last):
    """6 FLOPs for each element of a matrix and token, the attention of full documents besides, once more recomputed."""
    tokens, layers = 2 * 64, 2
    matrices = (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 176) * layers / 2 + 64 * 512 / 2
    pairs = 2 * 64 * 65 // 2
    attention = (4 + 4 + 10) * pairs * 2 * 16 * layers
    assert last.flops() == pytest.approx(4 * (6 * matrices * tokens + attention), rel=1e-6)


def attention_flops(traced: RankTrace) -> int:
    """Of the forward and the backward of the traced micro-batches."""
    return sum(kernel.flops for kernel in traced.kernels if "attention" in kernel.operator)


@pytest.mark.parametrize("window", mostly_long([None, 20], None))
@pytest.mark.parametrize("backend", mostly_long(["flash_attn", "transformer_engine", "native"], "native"))
def test_flops_of_attention_are_those_of_what_each_query_sees(backend, window):
    """The first of two context-parallel ranks has chunks 0 and 3 of four: tokens 0 to 31 of the first of two samples,
    32 to 63 of the last, pair by pair; and 2 products forward, 5 backward."""
    train = {"recompute": "none", "attention": backend, "precision": "bf16"}
    config = make_config(2, 2, parallel={"context": 2}, train=train)
    model = SHAPE.model_copy(update={"sliding_window": window, "head_dim": 64})  # that all backends take
    traced = trace_stage(config, 2, model=model)
    assert traced.failure is None
    places = [*range(32), *range(32, 64)]
    pairs = sum(min(place + 1, window or place + 1) for place in places)
    assert attention_flops(traced) == 2 * 4 * (2 + 5) * 2 * pairs * 4 * 64  # micro-batches, layers, heads


def test_pairs_are_counted_one_by_one():
    cu_q, cu_kv = torch.tensor([0, 3, 3, 8, 15]), torch.tensor([0, 9, 12, 17, 24])
    documents = [(3, 9), (0, 3), (5, 5), (7, 7)]
    for window in (0, 1, 4, 6, 100):
        seen = [
            min(keys - queries + query + 1, window or keys)
            for queries, keys in documents
            for query in range(queries)
        ]
        assert visible_pairs(cu_q, cu_kv, window) == sum(seen)


# Where the host waits for the GPU in a step, and how often. None lies in the loop over micro-batches.
WAITS = {
    # are there any labels? asked before the gradients are divided by them
    "megatron/core/distributed/finalize_model_grads.py": 1,
    # sums over ranks: two numbers sent, two read; then loss and gradient norm likewise
    "meditron_train/parallel/mesh.py": 4,
    # the norm of the gradients
    "megatron/core/optimizer/clip_grads.py": 1,
}


def test_the_host_waits_this_often(first, last):
    def files(rank: RankTrace) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for place in rank.synchronizations:
            if place.phase != "build":
                counts[place.where.partition(":")[0]] += place.count
        return dict(counts)

    # frequencies of the rotation, sent once in a run
    assert files(first) == {**WAITS, "meditron_train/model/rope.py": 1}
    # the losses are read where they are
    assert files(last) == {**WAITS, "meditron_train/model/rope.py": 1, "meditron_train/train/engine.py": 1}


KINDS = {
    "alone": (1, {}),
    "tensor": (2, {"parallel": {"tensor": 2}, "train": {"recompute": "full"}}),
    "context": (4, {"parallel": {"context": 2}, "train": {"recompute": "selective"}}),
    "interleaved": (
        4,
        {"parallel": {"pipeline": 2, "virtual_pipeline": 2}, "train": {"attention": "transformer_engine"}},
    ),
    "overlap": (4, {"parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True}}),
    "plain fp32": (
        2,
        {"parallel": {"distributed_optimizer": False}, "train": {"precision": "fp32", "recompute": "none"}},
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layout_passes(kind):
    world_size, sections = KINDS[kind]
    config = make_config(world_size, **sections)
    layout = config.parallel.layout(world_size)
    ranks = [trace_stage(config, world_size, stage) for stage in range(layout.pipeline)]
    assert problems_of(ranks, None, config, SHAPE, layout) == []


# ---- planted faults ---------------------------------------------------------------------------------------------


def leave_the_mask_on_the_cpu() -> None:
    from meditron_train.train.engine import Engine

    prepare = Engine._prepare

    def with_a_stray(self, *args, **kwargs):
        local, packed = prepare(self, *args, **kwargs)
        return dataclasses.replace(local, loss_mask_BL=local.loss_mask_BL.cpu() * 0 + 1), packed

    Engine._prepare = with_a_stray


def read_a_value_in_each_layer() -> None:
    from meditron_train.model.attention import PackedAttention

    forward = PackedAttention.forward

    def reading(self, query, *args, **kwargs):
        assert query.float().sum().item() is not None
        return forward(self, query, *args, **kwargs)

    PackedAttention.forward = reading


def forget_to_add_up_the_gradients_of_norms() -> None:
    from meditron_train.model.norm import RMSNorm

    make = RMSNorm.__init__

    def without_mark(self, *args, **kwargs):
        make(self, *args, **kwargs)
        self.weight.sequence_parallel = False

    RMSNorm.__init__ = without_mark


def build_the_first_stage_everywhere() -> None:
    from meditron_train.train import engine

    build = engine.build_chunk
    engine.build_chunk = lambda *args, **kwargs: build(*args, **{**kwargs, "pipeline_rank": 0})


def test_a_cpu_tensor_in_the_step_is_found_at_its_line(config):
    traced = trace_stage(config, WORLD_SIZE, 1, plant=leave_the_mask_on_the_cpu)
    assert any("wrong device" in p and "meditron_train/train/engine.py" in p for p in judge(config, traced))
    assert any("128] on the CPU" in place.what for place in traced.misplaced)


@pytest.mark.long
def test_a_value_read_in_the_loop_is_found_at_its_line(config, first):
    traced = trace_stage(config, WORLD_SIZE, 0, plant=read_a_value_in_each_layer)
    assert any("in every micro-batch" in p and "test_trace.py" in p for p in judge(config, traced))
    assert traced.num_synchronizations() > first.num_synchronizations()


def test_a_missing_all_reduce_is_found(config):
    traced = trace_stage(config, WORLD_SIZE, 0, plant=forget_to_add_up_the_gradients_of_norms)
    assert judge(config, traced) == ["stage 0: 0 calls of all-reduce in the tensor group; the layout needs 1"]


def test_parameters_of_another_stage_are_found(config):
    traced = trace_stage(config, WORLD_SIZE, 1, plant=build_the_first_stage_everywhere)
    problems = judge(config, traced)
    assert any("embedding.word_embeddings.weight should be on another stage" in p for p in problems)


# ---- who owns what ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (8, EIGHT),
        pytest.param(4, {"context": 2, "tensor": 2}, marks=pytest.mark.long),
        pytest.param(4, {"pipeline": 2, "virtual_pipeline": 2}, marks=pytest.mark.long),
        pytest.param(3, {}, marks=pytest.mark.long),
    ],
    ids=["tensor, pipeline, data", "context", "interleaved", "three replicas"],
)
def test_every_element_has_one_owner(world_size, parallel):
    coverage = audit(make_config(world_size, parallel=parallel), world_size)
    assert coverage.wrong == ()
    assert coverage.num_ranks == world_size


def claim_the_first_part_twice() -> None:
    from meditron_train.flows.trace import coverage

    shards = coverage._shards

    def misplaced(part):
        found = shards(part)
        for shard in found:
            shard.global_offset = tuple(0 for _ in shard.global_offset)
        return found

    coverage._shards = misplaced


def test_an_element_with_two_owners_is_found():
    coverage = audit(make_config(2, parallel={"tensor": 2}), 2, plant=claim_the_first_part_twice)
    assert any("have two owners" in problem for problem in coverage.wrong)


def build_no_engine() -> None:
    from meditron_train.train.engine import Engine

    def build(self, chunk_number):
        raise RuntimeError(f"no chunk {chunk_number}")

    Engine._build_chunk = build


def test_a_step_that_fails_is_said_although_no_rank_can_be_asked(config):
    """What hinders the engine hinders the coverage, too: neither hides the other."""
    layout = config.parallel.layout(WORLD_SIZE)
    rank = trace_stage(config, WORLD_SIZE, 0, plant=build_no_engine)
    coverage = audit(config, WORLD_SIZE, plant=build_no_engine)
    problems = problems_of([rank], coverage, config, SHAPE, layout)
    assert any("stage 0: the step fails: RuntimeError: no chunk 0 at" in problem for problem in problems)
    assert any(
        "who owns what is not known: rank 0: RuntimeError: no chunk 0" in problem for problem in problems
    )
    assert "coverage  not known" in trace_lines(Trace([rank], coverage, problems))


@pytest.mark.parametrize(
    ("boxes", "said"),
    [
        ([((0, 2), (0, 4)), ((2, 4), (0, 4))], None),
        ([((0, 2), (0, 4))], "8 of 16 elements"),
        ([((0, 3), (0, 4)), ((2, 4), (0, 4))], "two owners"),
        ([], "0 of 16 elements"),
    ],
)
def test_owners_of_a_tensor(boxes, said):
    problem = problem_of("x", (4, 4), boxes)
    assert problem is None if said is None else said in problem


# ---- the rest ---------------------------------------------------------------------------------------------------


def test_expected_calls_of_a_whole_pipeline_meet():
    """What one stage sends its neighbors receive."""
    config = make_config(16, parallel={"pipeline": 4, "virtual_pipeline": 2})
    layout = config.parallel.layout(16)
    shape = SHAPE.model_copy(update={"num_layers": 8})
    calls = [expected_collectives(config, shape, layout, stage, 8) for stage in range(4)]
    assert sum(c["send", "pipeline"] for c in calls) == sum(c["receive", "pipeline"] for c in calls)


def test_a_trace_is_json(first):
    assert json.loads(json.dumps(first.as_json()))["stage"] == 0


def test_planning_imports_no_torch():
    """Also not where the trace is at hand: it is imported in the processes that trace."""
    code = (
        "import sys, meditron_train.flows.plan, meditron_train.flows.trace.trace, meditron_train.cli.plan; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
