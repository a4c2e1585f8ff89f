"""Is every element of the model and of its optimizer owned exactly once, over all ranks?

Every rank's engine is built in turn, with one layer in each chunk of the pipeline: what a layer does, all do. Nothing
is gathered or written: the shards are those that a checkpoint would ask each rank for.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from meditron_train.config.model_config import ModelConfig
from meditron_train.config.schema import Config
from meditron_train.flows.trace.device import answer_for_cuda, make_device
from meditron_train.flows.trace.ownership import Box, problem_of
from meditron_train.flows.trace.recorder import Recorder, place_of
from meditron_train.flows.trace.results import Coverage
from meditron_train.layout import ParallelLayout
from meditron_train.mcore import ShardedTensor
from meditron_train.parallel import destroy, pretend
from meditron_train.planner.checkpoint_size import checkpoint_bytes
from meditron_train.train.engine import Engine
from meditron_train.train.engine_state import sharded_state

_FILES_PER_RANK = 2  # megatron-core writes with two threads, each into its own


def audit_ownership(config: Config, model: ModelConfig, layout: ParallelLayout) -> Coverage:
    """Ask all ranks of `layout`. For a process that does nothing else.

    An engine that cannot be built is a finding, not an exception.
    """
    device = make_device()
    small = model.model_copy(update={"num_layers": layout.pipeline * layout.virtual_pipeline})
    claims: dict[str, list[Box]] = defaultdict(list)
    shapes: dict[str, tuple[int, ...]] = {}
    recorder = Recorder({}, None)
    answer_for_cuda(recorder)
    wrong: list[str] = []
    failure, rank = None, 0
    try:
        for rank in range(layout.world_size):
            mesh = pretend(layout, rank, device)
            with recorder:
                engine = Engine(config, small, mesh, None)
                _claim_weights(engine, claims, shapes)
                _claim_state(engine, claims, shapes)
            del engine
            destroy()
        found = (problem_of(name, shapes[name], claims[name]) for name in sorted(shapes))
        wrong = [problem for problem in found if problem]
    except Exception as error:
        failure = f"rank {rank}: {type(error).__name__}: {error} at {place_of(error)}"
    return Coverage(
        num_layers=small.num_layers,
        num_ranks=layout.world_size,
        wrong=tuple(wrong),
        checkpoint_bytes=checkpoint_bytes(config, model),
        num_checkpoint_files=_FILES_PER_RANK * layout.world_size,
        failure=failure,
    )


def _claim_weights(engine: Engine, claims: dict[str, list[Box]], shapes: dict[str, tuple[int, ...]]) -> None:
    """Shards of the weights of which this rank has the main replica."""
    for part in sharded_state(engine, with_optimizer=False, is_loading=True).values():
        for shard in _shards(part):
            name = f"weight {shard.key}"
            shapes[name] = tuple(shard.global_shape)
            replica = shard.replica_id if isinstance(shard.replica_id, tuple) else (shard.replica_id,)
            if not any(replica):
                offsets, sizes = shard.global_offset, shard.local_shape
                claims[name].append(tuple((a, a + n) for a, n in zip(offsets, sizes, strict=True)))


def _shards(part: Any) -> list[ShardedTensor]:
    if isinstance(part, ShardedTensor):
        return [part]
    if isinstance(part, dict):
        return [shard for value in part.values() for shard in _shards(value)]
    if hasattr(part, "build"):  # a factory: gate and up, which lie in one tensor here and in order there
        return _shards(part.build())
    if isinstance(part, list | tuple):
        return [shard for value in part for shard in _shards(value)]
    return []


def _claim_state(engine: Engine, claims: dict[str, list[Box]], shapes: dict[str, tuple[int, ...]]) -> None:
    """Elements of this rank's parameters that its optimizer updates, each tensor rank's apart from the others'."""
    at = engine.mesh.at
    updated = _updated_ranges(engine)
    for virtual_rank, chunk in enumerate(engine.chunks):
        names = engine.global_names(virtual_rank)
        for local, parameter in chunk.named_parameters():
            name = f"optimizer state of {names[local]} on tensor rank {at.tensor}, stage {at.pipeline}"
            shapes[name] = (parameter.numel(),)
            claims[name] += [((start, end),) for start, end in updated[id(parameter)]]


def _updated_ranges(engine: Engine) -> dict[int, list[tuple[int, int]]]:
    """id of a parameter -> the ranges of its elements that this rank's optimizer updates."""
    ranges: dict[int, list[tuple[int, int]]] = defaultdict(list)
    if not engine.config.parallel.distributed_optimizer:
        if engine.mesh.at.data == engine.mesh.at.context == 0:  # the others hold the same
            for chunk in engine.chunks:
                for parameter in chunk.parameters():
                    ranges[id(parameter)].append((0, parameter.numel()))
        return ranges
    for optimizer in engine.optimizer.chained_optimizers:
        for of_buffer in optimizer.gbuf_ranges:
            for of_dtype in of_buffer.values():
                for of_bucket in of_dtype:
                    for parameter, places in of_bucket["param_map"].items():
                        ranges[id(parameter)].append((places["param"].start, places["param"].end))
    return ranges
