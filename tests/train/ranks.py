"""What ranks do in the tests of training: build an engine, take steps, return losses and weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.train.reference import Packed


def make_config(model_dir: Path | str, sections: dict[str, dict[str, Any]] | None = None) -> Any:
    """A Config for the engine; the data section is a placeholder, batches are given directly."""
    from meditron_train.config.schema import Config

    values: dict[str, dict[str, Any]] = {
        "model": {"from": str(model_dir)},
        "data": {"tokenizer": str(model_dir), "train": [{"name": "none", "path": "none"}]},
        "optimizer": {"lr": 3e-3, "weight_decay": 0.1, "clip_grad": 1.0, "betas": [0.9, 0.95], "eps": 1e-5},
        "train": {"precision": "fp32", "seq_len": 64, "micro_batch_size": 1, "global_batch_size": 8},
    }
    for name, section in (sections or {}).items():
        values[name] = {**values.get(name, {}), **section}
    return Config.model_validate(values)


def start_engine(rank: int, world_size: int, config: Any) -> Any:
    from meditron_train.checkpoint.hf.read import open_hf_model
    from meditron_train.parallel import initialize
    from meditron_train.train.engine import Engine

    layout = config.parallel.layout(world_size)
    mesh = initialize(layout, rank=rank, local_rank=rank, device="cpu", timeout_s=60)
    model, source = open_hf_model(config.model.from_)
    return Engine(config, model, mesh, source)


def share_of(batches: list[Packed], engine: Any) -> list[Packed]:
    """The micro-batches of this data-parallel rank."""
    return batches[engine.mesh.at.data :: engine.mesh.layout.data]


def local_weights(engine: Any) -> dict[tuple[str, int], torch.Tensor]:
    """(global name, tensor-parallel rank) → this rank's piece, of the first data and context rank only."""
    if engine.mesh.at.data or engine.mesh.at.context:
        return {}
    weights = {}
    for virtual_rank, chunk in enumerate(engine.chunks):
        parameters = dict(chunk.named_parameters())
        for local, name in engine.global_names(virtual_rank).items():
            weights[name, engine.mesh.at.tensor] = parameters[local].detach().float().clone()
    return weights


def assemble(
    model: Any, pieces: list[dict[tuple[str, int], torch.Tensor]], tp: int
) -> dict[str, torch.Tensor]:
    """Hugging Face tensors from all ranks' pieces, independently of the checkpoint code's own reader."""
    from meditron_train.checkpoint.tensor_map import tensor_specs
    from tests.checkpoint.whole import to_hf

    merged = {key: tensor for piece in pieces for key, tensor in piece.items()}
    weights = {}
    for spec in tensor_specs(model):
        parts = [merged[spec.name, r] for r in range(tp)]
        if spec.kind == "gate_up":  # each rank holds its gate part, then its up part
            halves = [part.chunk(2) for part in parts]
            whole = torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
        else:
            whole = parts[0] if spec.tp_dim is None or tp == 1 else torch.cat(parts, dim=spec.tp_dim)
        weights.update(to_hf(spec, whole))
    return weights


def train_ranks(rank: int, world_size: int, config: Any, steps: list[list[Packed]]) -> tuple[list, dict]:
    """Take all steps; returns [(loss, gradient norm)] and this rank's weights."""
    engine = start_engine(rank, world_size, config)
    return take_steps(engine, steps), local_weights(engine)


def take_steps(engine: Any, steps: list[list[Packed]]) -> list[tuple[float, float]]:
    """Take all steps, none of them skipped; (loss, gradient norm) of each. The parameters are whole afterwards."""
    config, history = engine.config, []
    guard = make_guard(engine)
    for step, batches in enumerate(steps, start=1):
        result = take_step(guard, step, share_of(batches, engine))
        assert not result.skipped
        history.append((result.loss, result.grad_norm))
    for chunk in engine.ddp_chunks:
        if config.parallel.overlap_param_gather:
            chunk.disable_forward_pre_hook()
    return history


def make_guard(engine: Any) -> Any:
    """What takes the steps of a run, without a history."""
    from meditron_train.train.guard.step import StepGuard

    return StepGuard(engine, engine.config.resilience, ["host"] * engine.mesh.layout.world_size, ())


def take_step(guard: Any, step: int, batches: Sequence[Packed]) -> Any:
    """One step as the training loop takes it, at the peak rate, on this rank's micro-batches; its StepResult."""
    lr = guard.engine.config.optimizer.lr
    return guard.take_step(step, batches, lr, seconds_waited_for_data=0.0, is_saved=False).result


def document_gradients(
    engine: Any, batches: list[Packed], document: int
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Per batch: logits of the local tokens, and the gradient of `document`'s loss at the embedded local tokens.

    Returns (places of the local tokens in the sequence, logits, places of the embedded tokens, gradient), on the CPU.
    """
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
        if engine.config.parallel.sequence:  # each rank embeds its part of the sequence
            embedded_places = places.chunk(engine.mesh.layout.tensor)[engine.mesh.at.tensor]
        results.append((places, logits.cpu(), embedded_places, gradient[:, 0].cpu()))
    return results
