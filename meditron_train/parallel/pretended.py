"""One rank of a run whose other ranks, device and network are pretended."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from meditron_train.layout import ParallelLayout
from meditron_train.mcore import ProcessGroupCollection, cpu_redirects, parallel_state, tensor_parallel
from meditron_train.parallel.mesh import Mesh

_BACKEND = "pretended"


def pretend(layout: ParallelLayout, rank: int, device: torch.device) -> Mesh:
    """The mesh as rank `rank` of `layout` sees it, on a pretended GPU. Collectives return at once and move nothing.

    For a process that does nothing else: megatron-core is given `device` for CUDA's from now on.
    """
    cpu_redirects.answer_with(device)
    _register_backend(device)
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(_BACKEND, store=store, rank=rank, world_size=layout.world_size)
    parallel_state.initialize_model_parallel(
        layout.tensor,
        layout.pipeline,
        layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return Mesh(layout, rank, layout.coordinates(rank), device, groups)


def _register_backend(device: torch.device) -> None:
    """torch's fake process group, also for tensors of the pretended GPU."""
    from torch._C._distributed_c10d import FakeProcessGroup

    def create(common: Any, options: Any) -> Any:
        return FakeProcessGroup._create_internal(  # type: ignore[call-arg]
            common.group_rank, common.group_size, options
        )

    if _BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(_BACKEND, create, extended_api=True, devices=["cpu", device.type])
