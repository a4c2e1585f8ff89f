"""The ranks of a run, their device and their process groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from meditron_train.errors import MeditronError, UserError, cause_of
from meditron_train.layout import ParallelLayout, RankCoordinates
from meditron_train.mcore import ProcessGroupCollection, parallel_state, tensor_parallel
from meditron_train.native.devices import is_gpu


@dataclass(frozen=True)
class Mesh:
    """One rank's view of the run.

    Attributes:
        layout: sizes of the parallel dimensions.
        rank: global rank.
        at: this rank's coordinates.
        device: cpu, or the CUDA device of this rank.
        groups: megatron-core's process groups (tp, pp, cp, dp, dp_cp, mp, …).
    """

    layout: ParallelLayout
    rank: int
    at: RankCoordinates
    device: torch.device
    groups: ProcessGroupCollection

    @property
    def on_gpu(self) -> bool:
        return is_gpu(self.device)

    @property
    def device_name(self) -> str:
        """As the driver calls it, or "cpu"."""
        return torch.cuda.get_device_name(self.device) if self.on_gpu else "cpu"

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        """Sums over all ranks, in float64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def max_over_ranks(self, values: list[float]) -> list[float]:
        """Maxima over all ranks, in float64."""
        largest = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.tolist()

    def gather_objects(self, value: object) -> list:
        """The picklable `value` of every rank, in rank order, on every rank."""
        gathered: list = [None] * self.layout.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def from_first_rank(self, value: Any) -> Any:
        """Rank 0's picklable `value`, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_first_rank(self, action: Callable[[], Any]) -> Any:
        """`action()` on rank 0; its picklable result on every rank.

        Raises:
            MeditronError: as of `action`, on every rank. On other ranks also in place of any other exception
                of rank 0.
        """
        outcome: dict[str, Any] = {}
        failure: Exception | None = None
        if self.rank == 0:
            try:
                outcome = {"value": action()}
            except MeditronError as error:
                outcome = {"error": error}
            except Exception as error:
                failure, outcome = (
                    error,
                    {"error": MeditronError(f"rank 0 failed: {error!r}", cause=cause_of(error))},
                )
        outcome = self.from_first_rank(outcome)
        if failure is not None:
            raise failure
        if "error" in outcome:
            raise outcome["error"]
        return outcome["value"]


def choose_device(wanted: str, local_rank: int, *, one_gpu_per_task: bool = False) -> torch.device:
    """The device of this rank for `train.device` auto, cpu or cuda.

    Args:
        one_gpu_per_task: the launcher shows every rank a GPU of its own, and no other (srun --gpus-per-task).

    Raises:
        UserError: CUDA is asked for and absent, there are more ranks than GPUs, or the CPU is asked for where CUDA is
            present (megatron-core would use the GPU all the same).
    """
    if torch.cuda.is_available():
        if wanted == "cpu":
            raise UserError(
                "train.device is cpu, but this process sees a GPU, which megatron-core would use all the same. "
                "Write CUDA_VISIBLE_DEVICES= (empty) before the command, or train.device=auto"
            )
        if one_gpu_per_task and torch.cuda.device_count() == 1:
            return torch.device("cuda", 0)
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU of its own: this node shows {torch.cuda.device_count()}. "
                "Start at most one process per GPU (torchrun --nproc-per-node, srun --ntasks-per-node)"
            )
        return torch.device("cuda", local_rank)
    if wanted == "cuda":
        raise UserError(
            "train.device is cuda, but torch sees no GPU here. Write train.device=auto, or see `doctor`"
        )
    return torch.device("cpu")


def initialize(
    layout: ParallelLayout,
    *,
    rank: int,
    local_rank: int,
    one_gpu_per_task: bool = False,
    device: str = "auto",
    seed: int = 1234,
    timeout_s: int = 1800,
    store: Any = None,
) -> Mesh:
    """Join the run: default group (NCCL on GPUs, gloo on CPUs) and megatron-core's groups.

    Ranks meet at `store`, a torch Store, or without one at MASTER_ADDR:MASTER_PORT, as torchrun sets them. A lone
    process needs neither.
    """
    torch_device = choose_device(device, local_rank, one_gpu_per_task=one_gpu_per_task)
    if torch_device.type == "cuda":
        torch.cuda.set_device(torch_device)
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if torch_device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout_s),
            device_id=torch_device if torch_device.type == "cuda" else None,
            store=dist.HashStore() if layout.world_size == 1 else store,  # type: ignore[attr-defined]
            rank=rank,
            world_size=layout.world_size,
        )
    parallel_state.initialize_model_parallel(
        layout.tensor,
        layout.pipeline,
        layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        distributed_timeout_minutes=timeout_s / 60,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Mesh(
        layout, rank, layout.coordinates(rank), torch_device, ProcessGroupCollection.use_mpu_process_groups()
    )


def destroy() -> None:
    """Leave the run: megatron-core's groups, then the default group."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
