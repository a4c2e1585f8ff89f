"""What ranks do in these tests, on a device of choice; whatever they return lies on the CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from tests.train.ranks import document_gradients, local_weights, take_steps
from tests.train.reference import Packed


def start_engine(rank: int, world_size: int, device: str, config: Any) -> Any:
    """An engine with the weights of `config.model.from`, on NCCL for device cuda and on gloo for cpu."""
    from meditron_train.checkpoint.hf.read import open_hf_model
    from meditron_train.parallel import initialize
    from meditron_train.train.engine import Engine

    torch.set_float32_matmul_precision("highest")  # no TF32: fp32 is compared as fp32
    mesh = initialize(
        config.parallel.layout(world_size), rank=rank, local_rank=rank, device=device, timeout_s=60
    )
    assert mesh.device.type == device
    assert dist.get_backend() == {"cuda": "nccl", "cpu": "gloo"}[device]
    model, source = open_hf_model(config.model.from_)
    engine = Engine(config, model, mesh, source)
    places = {parameter.device for chunk in engine.chunks for parameter in chunk.parameters()}
    assert places == {mesh.device}, f"parameters lie on {places}, this rank's device is {mesh.device}"
    return engine


def train_ranks(
    rank: int, world_size: int, device: str, config: Any, steps: list[list[Packed]]
) -> tuple[list[tuple[float, float]], dict[tuple[str, int], torch.Tensor]]:
    """Take all steps; returns [(loss, gradient norm)] and this rank's weights in fp32."""
    engine = start_engine(rank, world_size, device, config)
    history = take_steps(engine, steps)
    return history, {key: tensor.cpu() for key, tensor in local_weights(engine).items()}


def logits_and_gradients(
    rank: int, world_size: int, device: str, config: Any, batches: list[Packed], document: int
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Per batch: logits of the local tokens, and the gradient of `document`'s loss at the embedded local tokens.

    Returns (places of the local tokens in the sequence, logits, places of the embedded tokens, gradient).
    """
    engine = start_engine(rank, world_size, device, config)
    return document_gradients(engine, batches, document)


def cuda_state(rank: int, world_size: int) -> dict[str, Any]:
    """What a forked rank inherits of CUDA, and a sum that it then computes there."""
    inherited = {
        "is_initialized": torch.cuda.is_initialized(),
        "forked_from_initialized": torch.cuda._is_in_bad_fork(),
    }
    return {**inherited, "sum": float(torch.arange(5, device="cuda").sum())}
