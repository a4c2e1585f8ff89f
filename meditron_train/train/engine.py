"""The model, its gradients and its optimizer on one rank: gradients of a global batch, and the update.

It knows nothing of files, schedules, logs or signals. `guard/step.py` makes a step of the two halves, `loop.py` a run
of the steps; `engine_state.py` is what a checkpoint takes and gives.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import record_function

from meditron_train.checkpoint.tensor_map import TensorSource, fill_parameters
from meditron_train.config.model_config import ModelConfig
from meditron_train.config.schema import Config
from meditron_train.mcore import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    Float16Module,
    OptimizerConfig,
    ParamKey,
    finalize_model_grads,
    get_forward_backward_func,
    get_megatron_optimizer,
    get_standard_config_overrides,
    param_is_not_shared,
    param_is_not_tensor_parallel_duplicate,
)
from meditron_train.model import (
    LlamaModel,
    ModelOnRanks,
    PackedSequence,
    build_chunk,
    global_names,
    transformer_config,
)
from meditron_train.model.lora import is_adapter
from meditron_train.parallel import LocalBatch, Mesh, PackedTokens, localize
from meditron_train.train.adapters import dropout_seeds, start_adapters
from meditron_train.train.freezing import is_frozen
from meditron_train.train.stopwatch import Stopwatch

_FROZEN_MARK = "meditron_frozen"

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class StepResult:
    """What one global batch gave, bit-identical on every rank.

    Attributes:
        loss: mean cross-entropy over the labels that count, by their weights, in nats; 0 where none does.
        num_loss_tokens: labels that count in the global batch.
        grad_norm: global L2 norm before clipping.
        own_seconds: what this rank took before it met the others to add up gradients (differs between ranks).
        reduce_seconds: from then until the gradients and their norm were known, waiting for others included.
        skipped: no weight was changed.
    """

    loss: float
    num_loss_tokens: int
    grad_norm: float
    own_seconds: float
    reduce_seconds: float = 0.0
    skipped: bool = False

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Engine:
    """Model chunks, gradient buffers and optimizer of one rank under a layout.

    Args:
        model: the architecture; its vocabulary is padded in memory only.
        source: where the initial weights come from, under Hugging Face names; each rank reads its own slices.
            None leaves them uninitialized, for a checkpoint to fill.
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
        if config.lora is not None:
            for virtual_rank, chunk in enumerate(self.chunks):
                start_adapters(chunk, self.global_names(virtual_rank), config.train.seed, self.mesh.groups.tp)
        self.frozen = self._mark_frozen()
        self.ddp_chunks = self._wrap(self.chunks)
        self.optimizer = self._build_optimizer()
        self._stopwatch, self._update_stopwatch = Stopwatch(mesh.device), Stopwatch(mesh.device)
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
            attention_backend=self.config.train.attention,
            lora=self.config.lora,
        )
        return chunk.to(self.mesh.device)

    def global_names(self, virtual_rank: int) -> dict[str, str]:
        """Local parameter name → name in the whole model, for one chunk: only layer numbers differ."""
        layers = self.mesh.layout.layers_of(self.mesh.at.pipeline, virtual_rank, self.model.num_layers)
        return global_names(self.chunks[virtual_rank], layers.start)

    def load_weights(self, source: TensorSource) -> None:
        """Fill the parameters from a source under Hugging Face names, reading only what this rank holds."""
        for virtual_rank, chunk in enumerate(self.chunks):
            parameters, names = dict(chunk.named_parameters()), self.global_names(virtual_rank)
            fill_parameters(
                {name: parameters[local] for local, name in names.items() if not is_adapter(name)},
                self.model,
                source,
                tp_rank=self.mesh.at.tensor,
                tp_size=self.mesh.layout.tensor,
                padded_vocab_size=self.padded_vocab_size,
            )

    def _mark_frozen(self) -> list[torch.nn.Parameter]:
        """The parameters that `train.freeze` names, marked for the optimizer: their rate and decay are 0.

        They still require a gradient, which `compute_gradients` sets to zero: so that no stage is without a backward
        pass, and every layout has the same optimizer state.
        """
        freeze, frozen = self.config.train.freeze, []
        for virtual_rank, chunk in enumerate(self.chunks):
            parameters = dict(chunk.named_parameters())
            for local, name in self.global_names(virtual_rank).items():
                if is_frozen(name, freeze, tie_embeddings=self.model.tie_embeddings):
                    setattr(parameters[local], _FROZEN_MARK, True)
                    frozen.append(parameters[local])
        return frozen

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
        optimizer_config = OptimizerConfig(
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
        )
        overrides = get_standard_config_overrides(optimizer_config)
        if self.config.train.freeze.freezes_anything:
            overrides[ParamKey(attr=_FROZEN_MARK)] = {"lr_mult": 0.0, "wd_mult": 0.0}
        return get_megatron_optimizer(
            optimizer_config,
            self.ddp_chunks,
            config_overrides=overrides,
            use_gloo_process_groups=False,
        )

    def _connect_schedule(self) -> None:
        """Tell megatron-core's forward-backward schedules how gradients are scaled, held back and reduced."""
        schedule, several = self.transformer_config, len(self.ddp_chunks) > 1
        schedule.finalize_model_grads_func = self._finalize_grads
        self._loss_weight = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
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

    # ---- steps --------------------------------------------------------------------------------------------------

    def compute_gradients(self, batches: Sequence[PackedTokens], step: int = 0) -> StepResult:
        """Forward and backward over this rank's micro-batches of a global batch; changes no weight.

        Gradients are of the mean loss over all labels that count in the global batch, by their weights, whatever the
        layout.
        """
        for ddp_chunk in self.ddp_chunks:
            ddp_chunk.train()
        self.zero_gradients()
        start = time.monotonic()
        self._stopwatch.start()
        with record_function("forward-backward"):
            loss, _, num_loss_tokens = self.forward_backward(batches, forward_only=False, step=step)
        for parameter in self.frozen:
            parameter.main_grad.zero_()  # type: ignore[attr-defined]
        with record_function("reduce"):
            self.optimizer.prepare_grads()
            grad_norm = float(self.optimizer.get_grad_norm())
        # Both are sums over all ranks that hold them. Still one rank may have been given other numbers, and all must
        # decide alike: the largest counts, and what is not a number is larger than all.
        worst = self.mesh.max_over_ranks([x if math.isfinite(x) else math.inf for x in (loss, grad_norm)])
        loss, grad_norm = (
            x if not math.isfinite(x) else y for x, y in zip((loss, grad_norm), worst, strict=True)
        )
        own_seconds = self._stopwatch.seconds()
        reduce_seconds = max(0.0, time.monotonic() - start - own_seconds)
        return StepResult(loss, num_loss_tokens, grad_norm, own_seconds, reduce_seconds)

    @record_function("update")
    def update(self, grad_norm: float, lr: float) -> None:
        """Clip the gradients, whose global norm is `grad_norm`, and change the weights at rate `lr`."""
        self._update_stopwatch.start()
        self._clip(grad_norm)
        self._set_hyperparameters(lr)
        self.optimizer.step_with_ready_grads()
        self._update_stopwatch.stop()

    def update_seconds(self) -> float:
        """What the last update took; on a GPU its work must have been waited for."""
        return self._update_stopwatch.seconds()

    @record_function("reduce")
    def _finalize_grads(self, chunks: list[Any], num_tokens: torch.Tensor, **kwargs: Any) -> None:
        # The schedule adds up whole numbers, which the weights of labels need not be.
        self._stopwatch.stop()  # from here on ranks wait for each other
        finalize_model_grads(chunks, self._loss_weight, **kwargs)

    def evaluate(self, batches: Sequence[PackedTokens]) -> tuple[float, float]:
        """Mean loss in nats, and the sum of the weights it is over, of a global batch; changes nothing."""
        for ddp_chunk in self.ddp_chunks:
            ddp_chunk.eval()
        with torch.no_grad():
            return self.forward_backward(batches, forward_only=True)[:2]

    def on_ranks(self) -> ModelOnRanks:
        """The model, to be asked; after `gather_params`."""
        mesh = self.mesh
        return ModelOnRanks(self.model, tuple(self.chunks), mesh.layout, mesh.at, mesh.groups, mesh.device)

    def zero_gradients(self) -> None:
        """Forget the gradients, in the buffers and in the optimizer."""
        for ddp_chunk in self.ddp_chunks:
            ddp_chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def forward_backward(
        self, batches: Sequence[PackedTokens], *, forward_only: bool, step: int = 0
    ) -> tuple[float, float, int]:
        """Over this rank's micro-batches and all others': mean loss in nats, the sum of the weights it is over, and how
        many labels have one; collective."""
        self._loss_weight.zero_()
        several = len(self.ddp_chunks) > 1
        # Prepared one by one, as the schedule asks for them: a global batch of rotation tables is gigabytes.
        prepared = [
            map(self._prepare, batches, dropout_seeds(self.config, self.mesh, step)) for _ in self.ddp_chunks
        ]
        outputs = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=prepared if several else prepared[0],
            model=self.ddp_chunks if several else self.ddp_chunks[0],
            num_microbatches=len(batches),
            # The schedules ask for the shape of one packed micro-batch and divide it by CP, and TP under SP.
            seq_length=batches[0].tokens_T.numel(),
            micro_batch_size=1,
            forward_only=forward_only,
        )
        # Only the last stage has losses, and each of its tensor-parallel ranks the same ones.
        sums = torch.stack([output["loss"] for output in outputs]).sum(dim=0) if outputs else torch.zeros(3)
        loss_sum, weight, count = self.mesh.sum_over_ranks(sums.tolist())
        tp = self.mesh.layout.tensor
        return loss_sum / weight if weight else 0.0, weight / tp, round(count / tp)

    def _forward_step(self, batches: Any, model: Any) -> tuple[torch.Tensor, Any]:
        local, packed = next(batches)
        output = model(local.tokens_BL, None, None, labels=local.labels_BL, packed_seq_params=packed)

        def loss_sum(losses_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            total = (losses_BL.float() * local.loss_mask_BL).sum()
            weight, count = local.loss_mask_BL.sum(), local.loss_mask_BL.count_nonzero()
            self._loss_weight += weight
            sums = torch.stack([total.detach().double(), weight.double(), count.double()])
            return total, count.int(), {"loss": sums}

        return output, loss_sum

    def _prepare(
        self, batch: PackedTokens, dropout_seed: int | None = None
    ) -> tuple[LocalBatch, PackedSequence]:
        at, layout = self.mesh.at, self.mesh.layout
        local = localize(batch, context_rank=at.context, context_size=layout.context, device=self.mesh.device)
        packed = PackedSequence.build(
            self.model,
            positions_T=local.positions_T,
            cu_seqlens=local.cu_seqlens,
            local_index=local.local_index,
            spans=local.spans,
            gather_index=local.gather_index,
            dropout_seed=dropout_seed,
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

    def gather_params(self) -> None:
        """Make the parameters whole; collective.

        With overlap_param_gather the last update reaches a rank's parameters only when they are next used.
        """
        if self.config.parallel.overlap_param_gather:
            for ddp_chunk in self.ddp_chunks:
                ddp_chunk.start_param_sync(force_sync=True)

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
