"""The keys that say how the model is trained: on which ranks, with which optimizer, for how long."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from meditron_train.config.profiling import ProfileSection
from meditron_train.config.section import NUMBER, Beta, Count, Int, Section
from meditron_train.layout import ParallelLayout

GpuName = Literal["a100-40gb", "a100-80gb", "h100-80gb", "h200-141gb", "cpu"]


class ParallelSection(Section):
    """How the ranks share the model. Data parallelism is what is left of the world size."""

    tensor: Count = 1
    """Tensor-parallel size (TP)."""
    pipeline: Count = 1
    """Pipeline stages (PP)."""
    virtual_pipeline: Count = 1
    """Model chunks per stage; above 1 the interleaved schedule is used."""
    context: Count = 1
    """Context-parallel size (CP): ranks that share one sequence."""
    sequence: bool = False
    """Sequence parallelism inside the tensor-parallel group; has no effect when tensor is 1."""
    distributed_optimizer: bool = True
    """Share optimizer state among data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather parameters while the forward pass runs; needs distributed_optimizer and overlap_grad_reduce."""
    vocab_multiple: Count = 128
    """The embedding is padded in memory to a multiple of this (and of tensor); padding never leaves."""

    def layout(self, world_size: int) -> ParallelLayout:
        """These sizes on `world_size` ranks; without tensor parallelism there is no sequence parallelism."""
        return ParallelLayout(
            world_size=world_size,
            tensor=self.tensor,
            pipeline=self.pipeline,
            virtual_pipeline=self.virtual_pipeline,
            context=self.context,
            sequence=self.sequence and self.tensor > 1,
        )


class OptimizerSection(Section):
    """AdamW. Weight decay applies to matrices only."""

    lr: Annotated[float, Field(gt=0), NUMBER] = 3.0e-4
    """Peak learning rate."""
    min_lr: Annotated[float, Field(ge=0), NUMBER] = 1.0e-6
    """Learning rate at the end of the decay."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay rates of the first and second moment."""
    eps: Annotated[float, Field(gt=0), NUMBER] = 1.0e-5
    """Added to the denominator."""
    weight_decay: Annotated[float, Field(ge=0), NUMBER] = 0.1
    """Decoupled weight decay."""
    clip_grad: Annotated[float, Field(ge=0), NUMBER] = 1.0
    """Largest global gradient norm; 0 turns clipping off."""


class ScheduleSection(Section):
    """Learning rate over the steps."""

    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warm-up. wsd: warm-up, stable, then linear decay at the end."""
    warmup_steps: Annotated[int, Field(ge=0), NUMBER] | None = None
    """Steps of linear warm-up from 0 (default 0)."""
    warmup_fraction: Annotated[float, Field(ge=0, le=1), NUMBER] | None = None
    """Warm-up as a share of train.steps, instead of warmup_steps."""
    decay_steps: Count | None = None
    """cosine, linear: the step at which min_lr is reached (default train.steps).
    wsd: length of the final decay (default a tenth of train.steps)."""

    @model_validator(mode="after")
    def _check_warmup(self) -> ScheduleSection:
        if self.warmup_steps is not None and self.warmup_fraction is not None:
            raise ValueError("both warmup_steps and warmup_fraction are given; keep one")
        return self


class BatchRamp(Section):
    """A global batch that grows to train.global_batch_size over the first `samples` samples."""

    start: Count
    """Global batch size of the first steps."""
    increment: Count
    """Added at each stage."""
    samples: Count
    """Samples over which the full global batch size is reached, in stages of equal length."""

    def stages(self, global_batch_size: int) -> tuple[int, ...]:
        """All batch sizes of the ramp, the final one included."""
        return (*range(self.start, global_batch_size, self.increment), global_batch_size)


class FreezeSection(Section):
    """What is not trained: it keeps every bit. Gradients and optimizer state are kept all the same, so that memory and
    time do not change."""

    embeddings: bool = False
    """The input embedding, and with tied weights the output layer."""
    first_layers: Annotated[int, Field(ge=0), NUMBER] = 0
    """The first N layers."""
    all_but_layers: tuple[Annotated[int, Field(ge=0), NUMBER], ...] = ()
    """Only these layers, counted from 0, are trained and nothing else, as the new layers of block expansion."""

    @model_validator(mode="after")
    def _check_kinds(self) -> FreezeSection:
        if self.all_but_layers and (self.embeddings or self.first_layers):
            raise ValueError(
                "all_but_layers freezes everything else already; leave embeddings and first_layers out"
            )
        return self

    @property
    def freezes_anything(self) -> bool:
        return bool(self.embeddings or self.first_layers or self.all_but_layers)


class TrainSection(Section):
    """Length, batch and numerics of the run."""

    steps: Count = 1000
    """Optimizer steps (default 1000; with token_budget: as many as use up the budgets)."""
    tokens: Count | None = None
    """Tokens to train on, padding included, instead of steps; rounded up to whole steps."""
    epochs: Annotated[float, Field(gt=0), NUMBER] | None = None
    """Passes over all training sources together, instead of steps; rounded up to whole steps."""
    seq_len: Annotated[int, Field(ge=2), NUMBER] = 2048
    """Tokens per sample."""
    micro_batch_size: Count = 1
    """Samples per forward pass of one data-parallel rank."""
    global_batch_size: Count = 16
    """Samples per optimizer step, over all ranks."""
    batch_ramp: BatchRamp | None = None
    """Optional ramp up to global_batch_size."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16 keeps fp32 master weights and accumulates gradients in fp32."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass."""
    freeze: FreezeSection = FreezeSection()
    """Parts of the model that stay as they are."""
    attention: Literal["auto", "native", "flash_attn", "transformer_engine", "sdpa"] = "auto"
    """Who computes attention. native: our fused kernels; sdpa: PyTorch, document by document; auto: the first of a
    fixed order that is there and right on this device (`meditron-train doctor` shows which)."""
    seed: Int = 1234
    """Seed of fresh weights and of everything random but the data order."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is a GPU."""
    gpu: GpuName | None = None
    """Accelerator whose peak speed MFU refers to; absent: detected."""
    profile: ProfileSection = ProfileSection()
    """Steps recorded by torch's profiler."""

    @model_validator(mode="after")
    def _check_length(self) -> TrainSection:
        given = [name for name in ("steps", "tokens", "epochs") if name in self.model_fields_set]
        given = [name for name in given if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} all say how long to train; keep one")
        return self
