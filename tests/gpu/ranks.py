"""What ranks do in these tests, on a device of choice; whatever they return lies on the CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from tests.train.ranks import local_weights, share_of
from tests.train.reference import Packed


def start_engine(rank: int, world_size: int, device: str, config: Any) -> Any:
    """An engine with the weights of `config.model.from`, on NCCL for device cuda and on gloo for cpu."""
    from meditron_train.checkpoint.hf_read import open_hf_model
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
    history = []
    for batches in steps:
        result = engine.train_step(share_of(batches, engine), config.optimizer.lr)
        assert not result.skipped
        history.append((result.loss, result.grad_norm))
    for chunk in engine.ddp_chunks:
        if config.parallel.overlap_param_gather:
            chunk.disable_forward_pre_hook()
    return history, {key: tensor.cpu() for key, tensor in local_weights(engine).items()}


def logits_and_gradients(
    rank: int, world_size: int, device: str, config: Any, batches: list[Packed], document: int
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Per batch: logits of the local tokens, and the gradient of `document`'s loss at the embedded local tokens.

    Returns (places of the local tokens in the sequence, logits, places of the embedded tokens, gradient).
    """
    engine = start_engine(rank, world_size, device, config)
    (chunk,) = engine.chunks
    results = []
    for batch in batches:
        local, packed = engine._prepare(batch)
        places = torch.arange(batch.tokens_T.numel())
        if local.local_index is not None:
            places = places[local.local_index.cpu()]
        embedded: list[torch.Tensor] = []
        hook = chunk.embedding.register_forward_hook(lambda _, __, output, kept=embedded: kept.append(output))
        with torch.no_grad():
            logits = chunk(local.tokens_BL, None, None, packed_seq_params=packed)[0]
        losses = chunk(local.tokens_BL, None, None, labels=local.labels_BL, packed_seq_params=packed)[0]
        hook.remove()
        start, end = batch.cu_seqlens[document : document + 2].tolist()
        chosen = ((places >= start) & (places < end)).to(losses.device)
        (gradient,) = torch.autograd.grad((losses * chosen).sum(), embedded[1])
        embedded_places = places
        if config.parallel.sequence:  # each rank embeds its part of the sequence
            embedded_places = places.chunk(world_size)[rank]
        results.append((places, logits.cpu(), embedded_places, gradient[:, 0].cpu()))
    return results


def cuda_state(rank: int, world_size: int) -> dict[str, Any]:
    """What a forked rank inherits of CUDA, and a sum that it then computes there."""
    inherited = {
        "is_initialized": torch.cuda.is_initialized(),
        "forked_from_initialized": torch.cuda._is_in_bad_fork(),
    }
    return {**inherited, "sum": float(torch.arange(5, device="cuda").sum())}
