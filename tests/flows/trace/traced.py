"""What the tests of the trace share: shapes, configurations, a rank traced in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from meditron_train.config.model_config import ModelConfig
from meditron_train.config.schema import Config
from meditron_train.flows.trace.results import Coverage, RankTrace
from meditron_train.flows.trace.trace import first_rank
from meditron_train.layout import ParallelLayout
from tests.distributed import run_ranks

SHAPE = ModelConfig(
    vocab_size=500,
    hidden_size=64,
    intermediate_size=176,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
)


def make_config(world_size: int, num_micro_batches: int = 4, **sections: dict[str, Any]) -> Config:
    """Of micro-batches of two samples of 64 tokens, in bf16."""
    values: dict[str, dict[str, Any]] = {
        "model": {"from": "none"},
        "data": {"tokenizer": "none", "train": [{"name": "none", "path": "none"}]},
        "train": {
            "seq_len": 64,
            "micro_batch_size": 2,
            "precision": "bf16",
            "recompute": "selective",
            "steps": 1,
            "global_batch_size": 1,
        },
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    layout = Config.model_validate(values).parallel.layout(world_size)
    values["train"]["global_batch_size"] = (
        num_micro_batches * values["train"]["micro_batch_size"] * layout.data
    )
    return Config.model_validate(values)


def trace_stage(
    config: Config,
    world_size: int,
    stage: int = 0,
    *,
    model: ModelConfig = SHAPE,
    plant: Callable[[], None] | None = None,
) -> RankTrace:
    """The first rank of a stage, after `plant()` has broken something in its process."""
    return run_ranks(_trace, 1, config, model, config.parallel.layout(world_size), stage, plant)[0]


def audit(
    config: Config, world_size: int, *, model: ModelConfig = SHAPE, plant: Callable[[], None] | None = None
) -> Coverage:
    return run_ranks(_audit, 1, config, model, config.parallel.layout(world_size), plant)[0]


def _trace(
    _rank: int,
    _world_size: int,
    config: Config,
    model: ModelConfig,
    layout: ParallelLayout,
    stage: int,
    plant: Any,
) -> RankTrace:
    from meditron_train.flows.trace.rank import trace_rank

    if plant is not None:
        plant()
    return trace_rank(config, model, layout, first_rank(layout, stage))


def _audit(
    _rank: int, _world_size: int, config: Config, model: ModelConfig, layout: ParallelLayout, plant: Any
) -> Coverage:
    from meditron_train.flows.trace.coverage import audit_ownership

    if plant is not None:
        plant()
    return audit_ownership(config, model, layout)
