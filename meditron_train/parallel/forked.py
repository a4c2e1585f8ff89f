"""New process groups for forked copies of ranks: the copies talk to each other, beside the ranks themselves.

A fork shares its parent's sockets but has none of its threads, so the copy must never touch the groups it inherited,
not even to close them: closing would reach the parent's connections.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from meditron_train.mcore import ProcessGroupCollection, parallel_state
from meditron_train.parallel.mesh import Mesh

_kept_alive: list[Any] = []  # what the copy inherited; the process ends without taking it apart


def free_port() -> int:
    """A free port of this host, for rank 0's copy."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def rejoin(mesh: Mesh, port: int, *, timeout_s: float) -> Mesh:
    """In a forked copy of a rank on the CPU: meet the copies of the other ranks at MASTER_ADDR:`port`.

    Returns:
        The same mesh with gloo groups of the copies; megatron-core's global groups are replaced as well.
    """
    _forget_groups(mesh)
    torch.set_num_threads(1)  # the threads of OpenMP did not come along
    dist.init_process_group(
        "gloo",
        timeout=timedelta(seconds=timeout_s),
        store=_store(mesh, port, timeout_s),
        rank=mesh.rank,
        world_size=mesh.layout.world_size,
    )
    layout = mesh.layout
    parallel_state.initialize_model_parallel(
        layout.tensor,
        layout.pipeline,
        layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        distributed_timeout_minutes=timeout_s / 60,
        create_gloo_process_groups=False,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return Mesh(layout, mesh.rank, mesh.at, mesh.device, groups)


def _store(mesh: Mesh, port: int, timeout_s: float) -> Any:
    if mesh.layout.world_size == 1:
        return dist.HashStore()  # type: ignore[attr-defined]
    return dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        port,
        mesh.layout.world_size,
        is_master=mesh.rank == 0,
        timeout=timedelta(seconds=timeout_s),
    )


def _forget_groups(mesh: Mesh) -> None:
    _kept_alive.extend([mesh, c10d._world.default_pg, dict(c10d._world.pg_map), dict(vars(parallel_state))])
    for registry in (
        *(c10d._world.pg_map, c10d._world.pg_names, c10d._world.pg_group_ranks),
        *(c10d._world.pg_backend_config, c10d._world.tags_to_pg, c10d._world.pg_to_tag),
    ):
        registry.clear()
    c10d._world.default_pg = None
    c10d._world.group_count = 0
    torch._C._distributed_c10d._unregister_all_process_groups()
    parallel_state.destroy_model_parallel()
