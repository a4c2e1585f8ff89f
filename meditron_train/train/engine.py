"""The model, its gradients and its optimizer on one rank: one object that takes steps.

It knows nothing of files, schedules, logs or signals; `loop.py` composes those.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from meditron_train.checkpoint.hf_map import TensorSource, rank_slice, tensor_specs
from meditron_train.checkpoint.sharded import STATE_METADATA, without_extra_state
from meditron_train.config.model_config import ModelConfig
from meditron_train.config.schema import Config
from meditron_train.data.packed import PackedBatch
from meditron_train.mcore import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    Float16Module,
    OptimizerConfig,
    finalize_model_grads,
    get_forward_backward_func,
    get_megatron_optimizer,
    param_is_not_shared,
    param_is_not_tensor_parallel_duplicate,
)
from meditron_train.model import LlamaModel, PackedSequence, build_chunk, transformer_config
from meditron_train.parallel import LocalBatch, Mesh, PackedTokens, localize

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class StepResult:
    """What one global batch gave, the same numbers on every rank, to the bit.

    Attributes:
        loss: mean cross-entropy over the labels that count, in nats.
        num_loss_tokens: labels that count in the global batch.
        grad_norm: global L2 norm before clipping.
        own_seconds: what this rank took before it met the others to add up gradients (differs between ranks).
        skipped: no weight was changed.
    """

    loss: float
    num_loss_tokens: int
    grad_norm: float
    own_seconds: float
    skipped: bool = False

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Engine:
    """Model chunks, gradient buffers and optimizer of one rank under a layout.

    Args:
        model: the architecture; its vocabulary is padded in memory only.
        source: where the initial weights come from, under Hugging Face names; each rank reads its own slices.
            None leaves them uninitialised, for a checkpoint to fill.
    """

    def __init__(self, config: Config, model: ModelConfig, mesh: Mesh, source: TensorSource | None) -> None:
        self.config, self.model, self.mesh = config, model, mesh
        self.padded_vocab_size = model.padded_vocab_size(mesh.layout.tensor, config.parallel.vocab_multiple)
        self.dtype = DTYPES[config.train.precision]
        self.transformer_config = transformer_config(
            model, mesh.layout, dtype=self.dtype, recompute=config.train.recompute, on_gpu=mesh.on_gpu
        )
        self.chunks = [
            self._build_chunk(virtual_rank) for virtual_rank in range(mesh.layout.virtual_pipeline)
        ]
        if source is not None:
            self.load_weights(source)
        self.ddp_chunks = self._wrap(self.chunks)
        self.optimizer = self._build_optimizer()
        self._stopwatch = Stopwatch(mesh.device)
        self._connect_schedule()

    # ---- construction -------------------------------------------------------------------------------------------

    def _build_chunk(self, virtual_rank: int) -> LlamaModel:
        chunk = build_chunk(
            self.transformer_config,
            self.model,
            self.mesh.layout,
            self.mesh.groups,
            pipeline_rank=self.mesh.at.pipeline,
            virtual_rank=virtual_rank,
            padded_vocab_size=self.padded_vocab_size,
        )
        return chunk.to(self.mesh.device)

    def global_names(self, virtual_rank: int) -> dict[str, str]:
        """Local parameter name → name in the whole model, for one chunk: only layer numbers differ."""
        first_layer = self.mesh.layout.layers_of(
            self.mesh.at.pipeline, virtual_rank, self.model.num_layers
        ).start
        names = {}
        for local, _ in self.chunks[virtual_rank].named_parameters():
            head, layers, rest = local.partition("decoder.layers.")
            if layers:
                number, _, rest = rest.partition(".")
                names[local] = f"{head}{layers}{first_layer + int(number)}.{rest}"
            else:
                names[local] = local
        return names

    @torch.no_grad()
    def load_weights(self, source: TensorSource) -> None:
        """Fill the parameters from a source under Hugging Face names, reading only what this rank holds."""
        specs = {spec.name: spec for spec in tensor_specs(self.model)}
        for virtual_rank, chunk in enumerate(self.chunks):
            parameters = dict(chunk.named_parameters())
            for local, name in self.global_names(virtual_rank).items():
                if name == "output_layer.weight" and self.model.tie_embeddings:
                    name = "embedding.word_embeddings.weight"  # the last stage's copy of it
                spec = specs[name]
                value = rank_slice(
                    spec,
                    source,
                    tp_rank=self.mesh.at.tensor,
                    tp_size=self.mesh.layout.tensor,
                    padded_vocab_size=self.padded_vocab_size,
                )
                parameters[local].copy_(value)

    def _wrap(self, chunks: list[LlamaModel]) -> list[DistributedDataParallel]:
        parallel = self.config.parallel
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            use_distributed_optimizer=parallel.distributed_optimizer,
            average_in_collective=False,
        )
        wrapped = []
        for index, chunk in enumerate(chunks):
            module = Float16Module(self.transformer_config, chunk) if self.dtype == torch.bfloat16 else chunk
            # Later chunks of an interleaved stage come last in the backward pass: one bucket is as good as many.
            wrapped.append(
                DistributedDataParallel(
                    self.transformer_config, ddp_config, module, disable_bucketing=index > 0
                )
            )
        return wrapped

    def _build_optimizer(self) -> Any:
        settings = self.config.optimizer
        return get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=settings.lr,
                min_lr=settings.min_lr,
                weight_decay=settings.weight_decay,
                adam_beta1=settings.betas[0],
                adam_beta2=settings.betas[1],
                adam_eps=settings.eps,
                clip_grad=settings.clip_grad,
                bf16=self.dtype == torch.bfloat16,
                params_dtype=self.dtype,
                use_distributed_optimizer=self.config.parallel.distributed_optimizer,
                overlap_param_gather=self.config.parallel.overlap_param_gather,
            ),
            self.ddp_chunks,
            use_gloo_process_groups=False,
        )

    def _connect_schedule(self) -> None:
        """Tell megatron-core's forward-backward schedules how gradients are scaled, held back and reduced."""
        schedule, several = self.transformer_config, len(self.ddp_chunks) > 1
        schedule.finalize_model_grads_func = self._finalize_grads
        schedule.grad_scale_func = self.optimizer.scale_loss
        per_chunk = {"no_sync_func": [chunk.no_sync for chunk in self.ddp_chunks]}
        if self.config.parallel.overlap_grad_reduce:
            per_chunk["grad_sync_func"] = [chunk.start_grad_sync for chunk in self.ddp_chunks]
        if self.config.parallel.overlap_param_gather:
            per_chunk["param_sync_func"] = [chunk.start_param_sync for chunk in self.ddp_chunks]
        for name, functions in per_chunk.items():
            # The plain schedules overlap gradients by DDP's own hooks; only interleaving asks for sync functions.
            if several or name == "no_sync_func":
                setattr(schedule, name, functions if several else functions[0])

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def sharded_state(self, *, with_optimizer: bool, is_loading: bool) -> dict[str, Any]:
        """This rank's part of the model's (and optimizer's) state, as megatron-core's checkpoints describe it.

        Collective; before saving, `gather_params` comes first.
        """
        models = {
            f"model{virtual_rank}": without_extra_state(chunk.sharded_state_dict(metadata=STATE_METADATA))
            for virtual_rank, chunk in enumerate(self.chunks)
        }
        state: dict[str, Any] = dict(models)
        if with_optimizer:
            of_optimizer = models if len(models) > 1 else models["model0"]
            state["optimizer"] = self.optimizer.sharded_state_dict(
                of_optimizer, is_loading=is_loading, metadata=STATE_METADATA
            )
        return state

    def gather_params(self) -> None:
        """Make the parameters whole; collective.

        With overlap_param_gather the last update reaches a rank's parameters only when they are next used.
        """
        if self.config.parallel.overlap_param_gather:
            for ddp_chunk in self.ddp_chunks:
                ddp_chunk.start_param_sync(force_sync=True)

    def local_state(self) -> dict[str, Any]:
        """All tensors that this rank trains with, and the settings of its optimizers: views, nothing is copied.

        Enough to continue on the same rank of the same layout. `load_local_state` takes the same structure.
        """
        optimizers = [optimizer.optimizer for optimizer in self.optimizer.chained_optimizers]
        tensors = [parameter.data for chunk in self.chunks for parameter in chunk.parameters()]
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
    def load_local_state(self, state: dict[str, Any]) -> None:
        """Take over a `local_state`; the optimizer's state must be allocated, as `dry_run` does."""
        for ours, theirs in zip(self.local_state()["tensors"], state["tensors"], strict=True):
            ours.copy_(theirs)
        for optimizer, groups in zip(self.optimizer.chained_optimizers, state["groups"], strict=True):
            for ours, theirs in zip(optimizer.optimizer.param_groups, groups, strict=True):
                ours.update(theirs)

    def rejoin(self, mesh: Mesh) -> None:
        """In a forked copy of this rank: let what saving needs talk through the groups of `mesh`."""
        self.mesh = mesh
        for optimizer in self.optimizer.chained_optimizers:
            if self.config.parallel.distributed_optimizer:
                optimizer.data_parallel_group = mesh.groups.dp_cp

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `load_sharded` read into `sharded_state(is_loading=True)`."""
        for virtual_rank, chunk in enumerate(self.chunks):
            result = chunk.load_state_dict(state[f"model{virtual_rank}"], strict=False)
            missing = [name for name in result.missing_keys if not name.endswith("_extra_state")]
            assert not missing and not result.unexpected_keys, (missing, result.unexpected_keys)
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            self.optimizer.reload_model_params()  # the master weights follow the loaded ones

    # ---- steps --------------------------------------------------------------------------------------------------

    def train_step(self, batches: Sequence[PackedTokens], lr: float) -> StepResult:
        """Gradients of a global batch, and one update at rate `lr` if they are finite."""
        result = self.compute_gradients(batches)
        if result.is_finite:
            self.update(result.grad_norm, lr)
            return result
        return replace(result, skipped=True)

    def compute_gradients(self, batches: Sequence[PackedTokens]) -> StepResult:
        """Forward and backward over this rank's micro-batches of a global batch; changes no weight.

        Gradients are of the mean loss over all labels that count in the global batch, whatever the layout.
        """
        for ddp_chunk in self.ddp_chunks:
            ddp_chunk.train()
            ddp_chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._stopwatch.start()
        loss, num_loss_tokens = self._forward_backward(batches, forward_only=False)
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        # Both are sums over all ranks that hold them. Still one rank may have been given other numbers, and all must
        # decide alike: the largest counts, and what is not a number is larger than all.
        worst = self.mesh.max_over_ranks([x if math.isfinite(x) else math.inf for x in (loss, grad_norm)])
        loss, grad_norm = (
            x if not math.isfinite(x) else y for x, y in zip((loss, grad_norm), worst, strict=True)
        )
        return StepResult(loss, num_loss_tokens, grad_norm, self._stopwatch.seconds())

    def update(self, grad_norm: float, lr: float) -> None:
        """Clip the gradients, whose global norm is `grad_norm`, and change the weights at rate `lr`."""
        self._clip(grad_norm)
        self._set_hyperparameters(lr)
        self.optimizer.step_with_ready_grads()

    def _finalize_grads(self, *args: Any, **kwargs: Any) -> None:
        self._stopwatch.stop()  # from here on ranks wait for each other
        finalize_model_grads(*args, **kwargs)

    def evaluate(self, batches: Sequence[PackedTokens]) -> tuple[float, int]:
        """Mean loss in nats, and the labels it is over, of a global batch; changes nothing."""
        for ddp_chunk in self.ddp_chunks:
            ddp_chunk.eval()
        with torch.no_grad():
            return self._forward_backward(batches, forward_only=True)

    def _forward_backward(self, batches: Sequence[PackedTokens], *, forward_only: bool) -> tuple[float, int]:
        several = len(self.ddp_chunks) > 1
        # Prepared one by one, as the schedule asks for them: a global batch of rotation tables is gigabytes.
        prepared = [map(self._prepare, batches) for _ in self.ddp_chunks]
        outputs = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=prepared if several else prepared[0],
            model=self.ddp_chunks if several else self.ddp_chunks[0],
            num_microbatches=len(batches),
            # The schedules ask for the shape of one packed micro-batch and divide it by CP, and TP under SP.
            seq_length=batches[0].tokens_T.numel(),
            micro_batch_size=1,
            forward_only=forward_only,
        )
        # Only the last stage has losses, and each of its tensor-parallel ranks the same ones.
        sums = (
            torch.stack([output["loss"] for output in outputs]).double().sum(dim=0)
            if outputs
            else torch.zeros(2)
        )
        loss_sum, count = self.mesh.sum_over_ranks(sums.tolist())
        return loss_sum / count if count else 0.0, round(count / self.mesh.layout.tensor)

    def _prepare(self, batch: PackedTokens) -> tuple[LocalBatch, PackedSequence]:
        at, layout = self.mesh.at, self.mesh.layout
        local = localize(batch, context_rank=at.context, context_size=layout.context, device=self.mesh.device)
        packed = PackedSequence.build(
            self.model,
            positions_T=local.positions_T,
            cu_seqlens=local.cu_seqlens,
            local_index=local.local_index,
            spans=local.spans,
            gather_index=local.gather_index,
        )
        return local, packed

    def _clip(self, grad_norm: float) -> None:
        """Scale all gradients so that their global norm is at most clip_grad (0: off)."""
        coefficient = self.config.optimizer.clip_grad / (grad_norm + 1e-6)
        if self.config.optimizer.clip_grad == 0 or coefficient >= 1:
            return
        for optimizer in self.optimizer.chained_optimizers:
            gradients = [p.grad for p in optimizer.get_parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, coefficient)

    def _set_hyperparameters(self, lr: float) -> None:
        """Of every group, at every step: a resumed optimizer has those of its checkpoint."""
        settings = self.config.optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
            group["weight_decay"] = settings.weight_decay * group.get("wd_mult", 1.0)
            group["betas"], group["eps"] = settings.betas, settings.eps

    @torch.no_grad()
    def param_norm(self) -> float:
        """Global L2 norm of the parameters, replicas and shared copies counted once."""
        self.gather_params()
        counted = [
            parameter
            for chunk in self.chunks
            for parameter in chunk.parameters()
            if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter)
        ]
        square = sum((p.double().square().sum() for p in counted), torch.zeros((), dtype=torch.float64))
        copies = self.mesh.layout.data * self.mesh.layout.context
        return math.sqrt(self.mesh.sum_over_ranks([float(square)])[0] / copies)

    def dry_run(self, batches: Sequence[PackedTokens]) -> None:
        """Take all the memory a training step takes, and change nothing.

        Runs forward and backward on invented micro-batches, and allocates the optimizer's state.
        """
        for ddp_chunk in self.ddp_chunks:
            ddp_chunk.zero_grad_buffer()
        self._forward_backward(batches, forward_only=False)
        for ddp_chunk in self.ddp_chunks:
            ddp_chunk.zero_grad_buffer()
        for optimizer in self.optimizer.chained_optimizers:
            optimizer.init_state_fn(optimizer.optimizer)
        self.optimizer.zero_grad()


class Stopwatch:
    """Seconds of this rank's own work; on a GPU those of its stream, read without making the host wait."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._start: Any = 0.0
        self._end: Any = 0.0

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        self._start = self._end = self._now()

    def stop(self) -> None:
        self._end = self._now()

    def seconds(self) -> float:
        """Between start and stop; on a GPU the work between must have been waited for."""
        return self._start.elapsed_time(self._end) / 1000 if self._on_gpu else self._end - self._start


def _forward_step(batches: Any, model: Any) -> tuple[torch.Tensor, Any]:
    local, packed = next(batches)
    output = model(local.tokens_BL, None, None, labels=local.labels_BL, packed_seq_params=packed)

    def loss_sum(losses_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        total = (losses_BL.float() * local.loss_mask_BL).sum()
        count = local.loss_mask_BL.sum()
        return total, count.int(), {"loss": torch.stack([total.detach(), count])}

    return output, loss_sum


def invented_batch(seq_len: int, micro_batch_size: int, vocab_size: int) -> PackedBatch:
    """A micro-batch with one token id everywhere and one document per sample: the worst case for attention."""
    num_tokens = seq_len * micro_batch_size
    return PackedBatch(
        tokens_T=torch.full((num_tokens,), vocab_size - 1),
        labels_T=torch.full((num_tokens,), vocab_size - 1),
        loss_mask_T=torch.ones(num_tokens),
        positions_T=torch.arange(seq_len).repeat(micro_batch_size),
        cu_seqlens=torch.arange(0, num_tokens + 1, seq_len, dtype=torch.int32),
    )
