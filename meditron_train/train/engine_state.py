"""What a checkpoint takes from an engine and gives back: shards that any layout reads, or this rank's own tensors."""

from __future__ import annotations

from typing import Any

import torch

from meditron_train.checkpoint.sharded.ranks import STATE_METADATA, without_extra_state
from meditron_train.mcore import offsets_without_padding
from meditron_train.model.lora import is_adapter
from meditron_train.parallel import Mesh
from meditron_train.train.engine import Engine


def sharded_state(engine: Engine, *, with_optimizer: bool, is_loading: bool) -> dict[str, Any]:
    """This rank's part of what is trained (and of its optimizer), as megatron-core's checkpoints describe it: of the
    whole model, or of its adapters alone.

    Collective; before saving, `gather_params` comes first.
    """
    metadata = dict(STATE_METADATA)  # megatron-core adds this rank's process group to it
    models = _models(engine, metadata, adapters=engine.config.lora is not None)
    state: dict[str, Any] = dict(models)
    if with_optimizer:
        of_optimizer = models if len(models) > 1 else models["model0"]
        with offsets_without_padding(engine.optimizer):
            state["optimizer"] = engine.optimizer.sharded_state_dict(
                of_optimizer, is_loading=is_loading, metadata=metadata
            )
    return state


def sharded_base(engine: Engine) -> dict[str, Any]:
    """This rank's part of the model without adapters, to be loaded; collective."""
    return _models(engine, dict(STATE_METADATA), adapters=False)


def _models(engine: Engine, metadata: dict[str, Any], *, adapters: bool) -> dict[str, Any]:
    models = {}
    for virtual_rank, chunk in enumerate(engine.chunks):
        state = without_extra_state(chunk.sharded_state_dict(metadata=metadata))
        models[f"model{virtual_rank}"] = {k: v for k, v in state.items() if is_adapter(k) == adapters}
    return models


def local_state(engine: Engine) -> dict[str, Any]:
    """All tensors that this rank trains, and the settings of its optimizers: views, nothing is copied.

    Enough to continue on the same rank of the same layout. `load_local_state` takes the same structure.
    """
    optimizers = [optimizer.optimizer for optimizer in engine.optimizer.chained_optimizers]
    tensors = [
        parameter.data
        for chunk in engine.chunks
        for parameter in chunk.parameters()
        if parameter.requires_grad
    ]
    for optimizer in optimizers:
        for master in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            tensors.append(master.data)
            tensors += [optimizer.state[master][name] for name in sorted(optimizer.state[master])]
    groups = [
        [{name: value for name, value in group.items() if name != "params"} for group in o.param_groups]
        for o in optimizers
    ]
    return {"tensors": tensors, "groups": groups}


@torch.no_grad()
def load_local_state(engine: Engine, state: dict[str, Any]) -> None:
    """Take over a `local_state`; the optimizer's state must be allocated, as `dry_run.take_dry_step` does."""
    for ours, theirs in zip(local_state(engine)["tensors"], state["tensors"], strict=True):
        ours.copy_(theirs)
    for optimizer, groups in zip(engine.optimizer.chained_optimizers, state["groups"], strict=True):
        for ours, theirs in zip(optimizer.optimizer.param_groups, groups, strict=True):
            ours.update(theirs)


def use_mesh(engine: Engine, mesh: Mesh) -> None:
    """In a forked copy of this rank: let what saving needs talk through the groups of `mesh`."""
    engine.mesh = mesh
    for optimizer in engine.optimizer.chained_optimizers:
        if engine.config.parallel.distributed_optimizer:
            optimizer.data_parallel_group = mesh.groups.dp_cp


def load_state(engine: Engine, state: dict[str, Any]) -> None:
    """Take over what `load_sharded` read into `sharded_state(is_loading=True)` or `sharded_base`."""
    for virtual_rank, chunk in enumerate(engine.chunks):
        weights = state[f"model{virtual_rank}"]
        result = chunk.load_state_dict(weights, strict=False)
        of_adapters = any(map(is_adapter, weights))
        missing = [
            name
            for name in result.missing_keys
            if is_adapter(name) == of_adapters and not name.endswith("_extra_state")
        ]
        assert not missing and not result.unexpected_keys, (missing, result.unexpected_keys)
    if "optimizer" in state:
        engine.optimizer.load_state_dict(state["optimizer"])
    else:
        engine.optimizer.reload_model_params()  # the master weights follow the loaded ones
