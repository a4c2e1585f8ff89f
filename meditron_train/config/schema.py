"""Every key a configuration file may hold: its type, default and meaning.

The text under each key becomes the tooltip in editors that read `configs/schema.json`, which
`python -m meditron_train.config.schema` prints. `null` in a file means the default.
Relative paths are relative to the working directory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from meditron_train.layout import ParallelLayout

GpuName = Literal["a100-80gb", "h100-80gb", "h200-141gb", "cpu"]


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is wanted here, not true or false")
    return value


_NUMBER = BeforeValidator(
    _refuse_bool
)  # last in each Annotated, so that limits stay limits in the JSON Schema
Int = Annotated[int, _NUMBER]
Count = Annotated[int, Field(ge=1), _NUMBER]
Positive = Annotated[float, Field(gt=0), _NUMBER]
NotNegative = Annotated[float, Field(ge=0), _NUMBER]
Beta = Annotated[float, Field(ge=0, lt=1), _NUMBER]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused, finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class ModelSection(Section):
    """Where the model comes from."""

    from_: Path | None = Field(None, alias="from")
    """Directory of a Hugging Face model or of a sharded checkpoint. Needed with init: pretrained."""
    init: Literal["pretrained", "random"] = "pretrained"
    """pretrained: weights of `from`. random: fresh weights of the shape in `hf_config`."""
    hf_config: dict[str, Any] | None = None
    """The model's shape under its Hugging Face names (hidden_size, ...). Needed with init: random."""

    @model_validator(mode="after")
    def _check_source(self) -> ModelSection:
        if self.init == "pretrained" and self.from_ is None:
            raise ValueError("init: pretrained needs `from: DIRECTORY`; init: random needs hf_config instead")
        if self.init == "pretrained" and self.hf_config is not None:
            raise ValueError("hf_config is for init: random; init: pretrained reads the shape from `from`")
        if self.init == "random" and self.hf_config is None:
            raise ValueError("init: random needs `hf_config: {...}` with the model's shape")
        if self.init == "random" and self.from_ is not None:
            raise ValueError("init: random takes no `from`; remove it, or choose init: pretrained")
        return self


class TrainSource(Section):
    """One corpus to train on."""

    name: Name
    """Short name, used in metrics and traces."""
    path: Path
    """Prefix of the tokenized files: PATH.bin and PATH.idx."""
    weight: Annotated[float, Field(gt=0), _NUMBER] | None = None
    """Relative share of the samples, on any scale (1.0 when neither weight nor token_budget is given)."""
    token_budget: Count | None = None
    """Tokens to take from this source over the run, instead of a weight."""

    @model_validator(mode="before")
    @classmethod
    def _default_weight(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("weight") is None and values.get("token_budget") is None:
            return {**values, "weight": 1.0}
        return values

    @model_validator(mode="after")
    def _check_share(self) -> TrainSource:
        if self.weight is not None and self.token_budget is not None:
            raise ValueError(f"source {self.name!r} has both weight and token_budget; keep one")
        return self


class ValidationSource(Section):
    """One corpus to measure the validation loss on."""

    name: Name
    """Short name; the loss is reported as validation_loss.NAME."""
    path: Path
    """Prefix of the tokenized files: PATH.bin and PATH.idx."""


class DataSection(Section):
    """What the model reads, and in which form."""

    tokenizer: Path
    """Directory with tokenizer.model (sentencepiece) or tokenizer.json."""
    packing: Literal["concat", "best_fit"] = "best_fit"
    """concat: one stream cut every seq_len, as in Megatron.
    best_fit: documents shorter than seq_len stay whole."""
    seed: Int = 1234
    """Seed of the sample order, which depends on it and on the sample number alone."""
    special_tokens: tuple[str, ...] = ()
    """Tokens added to the tokenizer, in this order."""
    train: Annotated[tuple[TrainSource, ...], Field(min_length=1)]
    """Training sources, all by weight or all by token_budget."""
    validation: tuple[ValidationSource, ...] = ()
    """Validation sources."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1), _NUMBER] = 0.0
    """Share of every training source's documents held out for validation."""
    prefetch: Annotated[int, Field(ge=0), _NUMBER] = 2
    """Steps gathered ahead while the model works; 0: none."""
    cache_dir: Path | None = None
    """Where built sample indexes are kept (default: .index_cache beside the data, else a temporary directory)."""

    @model_validator(mode="after")
    def _check_sources(self) -> DataSection:
        held_out = [source.name for source in self.train] if self.validation_fraction > 0 else []
        for what, names in (
            ("train", [source.name for source in self.train]),
            ("validation", [source.name for source in self.validation] + held_out),
        ):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{what} sources need different names; used twice: {', '.join(twice)}")
        budgeted = [source.name for source in self.train if source.token_budget is not None]
        if budgeted and len(budgeted) < len(self.train):
            weighted = [source.name for source in self.train if source.token_budget is None]
            raise ValueError(
                f"train sources mix token_budget ({', '.join(budgeted)}) and weight ({', '.join(weighted)}); "
                "give all of them the same kind"
            )
        if len(set(self.special_tokens)) < len(self.special_tokens) or "" in self.special_tokens:
            raise ValueError("special_tokens must be different and not empty")
        return self


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

    lr: Annotated[float, Field(gt=0), _NUMBER] = 3.0e-4
    """Peak learning rate."""
    min_lr: Annotated[float, Field(ge=0), _NUMBER] = 1.0e-6
    """Learning rate at the end of the decay."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay rates of the first and second moment."""
    eps: Annotated[float, Field(gt=0), _NUMBER] = 1.0e-5
    """Added to the denominator."""
    weight_decay: Annotated[float, Field(ge=0), _NUMBER] = 0.1
    """Decoupled weight decay."""
    clip_grad: Annotated[float, Field(ge=0), _NUMBER] = 1.0
    """Largest global gradient norm; 0 turns clipping off."""


class ScheduleSection(Section):
    """Learning rate over the steps."""

    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warm-up. wsd: warm-up, stable, then linear decay at the end."""
    warmup_steps: Annotated[int, Field(ge=0), _NUMBER] | None = None
    """Steps of linear warm-up from 0 (default 0)."""
    warmup_fraction: Annotated[float, Field(ge=0, le=1), _NUMBER] | None = None
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


class TrainSection(Section):
    """Length, batch and numerics of the run."""

    steps: Count = 1000
    """Optimizer steps."""
    seq_len: Annotated[int, Field(ge=2), _NUMBER] = 2048
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
    attention: Literal["auto", "native", "flash_attn", "transformer_engine", "sdpa"] = "auto"
    """Who computes attention. native: our fused kernels; sdpa: PyTorch, document by document; auto: the first of a
    fixed order that is there and right on this device (`meditron-train doctor` shows which)."""
    seed: Int = 1234
    """Seed of fresh weights and of everything random but the data order."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is a GPU."""
    gpu: GpuName | None = None
    """Accelerator whose peak speed MFU refers to; absent: detected."""


class CheckpointSection(Section):
    """When to save, and what to keep."""

    interval: Count = 100
    """Steps between checkpoints; the last step is always saved."""
    keep_last: Count = 3
    """Newest checkpoints kept."""
    keep_every: Count | None = None
    """Also keep the checkpoint of every Mth step."""
    async_save: bool = False
    """Write checkpoints while training goes on."""
    export_hf: bool = True
    """Write the final model as a Hugging Face directory."""
    export_interval: Count | None = None
    """Also export every Nth step."""
    local_interval: Count | None = None
    """Also save every Nth step into local_dir, for a quick restart on the same nodes in the same layout."""
    local_dir: Path | None = None
    """A directory on each node's own disk or in its memory (/dev/shm). Needed with local_interval."""

    @model_validator(mode="after")
    def _check_local(self) -> CheckpointSection:
        if (self.local_interval is None) != (self.local_dir is None):
            raise ValueError("local_interval and local_dir need each other; give both or neither")
        return self


class ValidationSection(Section):
    """How often, and on how much, the validation loss is measured."""

    interval: Count = 100
    """Steps between measurements."""
    steps: Count = 10
    """Global batches per source and measurement."""


class LoggingSection(Section):
    """Where the run and its metrics go."""

    run_dir: Path = Path("runs/default")
    """Directory of the run (default: runs/ and the name of the configuration file)."""
    interval: Count = 1
    """Steps between lines of metrics."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online with a key and a network, else offline."""
    wandb_project: str = "meditron-train"
    """Weights & Biases project."""
    tensorboard: bool = True
    """Write TensorBoard files."""


class ResilienceSection(Section):
    """What the run survives, and when it gives up. Numbers that turn something off do so at 0."""

    max_skipped_steps: Count = 10
    """Consecutive skipped steps (loss or gradient not finite, or an anomaly) before the run stops."""
    retry_bad_steps: bool = True
    """Compute a step that is not finite, or an anomaly, once more before believing it: a passing fault of the hardware
    then costs one step's time and changes nothing."""
    anomaly_action: Literal["report", "skip", "rollback"] = "report"
    """On a loss spike or an exploding gradient norm. report: warn only. skip: no update on this batch.
    rollback: take the weights of the last checkpoint and go on with the next batch."""
    anomaly_window: Annotated[int, Field(ge=10), _NUMBER] = 100
    """Past steps that say what is usual."""
    loss_spike_sigma: NotNegative = 6.0
    """A loss this many standard deviations above the mean of the window is a spike; 0: none is."""
    grad_norm_factor: NotNegative = 20.0
    """A gradient norm this many times the median of the window explodes; 0: none does."""
    max_rollbacks: Count = 3
    """Rollbacks to one checkpoint before the run stops."""
    replica_check_interval: Annotated[int, Field(ge=0), _NUMBER] = 100
    """Steps between comparisons of the weights that several ranks hold, which also precede every checkpoint; 0: never.
    Finds flipped bits and names the rank."""
    on_replica_mismatch: Literal["requeue", "stop"] = "requeue"
    """requeue: end with exit code 85, to be started again from the last checkpoint. stop: end with exit code 1."""
    hang_factor: NotNegative = 20.0
    """No finished step for this many median steps is a hang: the run ends, to be requeued; 0: never."""
    hang_min_s: Positive = 300.0
    """The least time without a finished step that is called a hang, in seconds."""
    hang_other_s: Positive = 1800.0
    """The same for what is no step: the start, the first steps, validation, saving, exporting. Collective operations
    give up by themselves after half as long again."""
    slow_rank_factor: NotNegative = 1.3
    """A rank whose own work takes this many times the median of its peers is reported; 0: none is."""
    slow_rank_window: Count = 50
    """Steps over which it is measured."""
    max_failed_saves: Count = 3
    """Checkpoints in a row that could not be written before the run stops. The last one of a run must succeed."""


class Config(Section):
    """A whole configuration file."""

    model: ModelSection
    data: DataSection
    parallel: ParallelSection = ParallelSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    train: TrainSection = TrainSection()
    checkpoint: CheckpointSection = CheckpointSection()
    validation: ValidationSection = ValidationSection()
    logging: LoggingSection = LoggingSection()
    resilience: ResilienceSection = ResilienceSection()

    @property
    def warmup_steps(self) -> int:
        """Steps of warm-up, from warmup_steps or warmup_fraction."""
        if self.schedule.warmup_fraction is not None:
            return round(self.schedule.warmup_fraction * self.train.steps)
        return self.schedule.warmup_steps or 0

    @property
    def decay_steps(self) -> int:
        """`schedule.decay_steps` with its default filled in (see there for its meaning by kind)."""
        if self.schedule.decay_steps is not None:
            return self.schedule.decay_steps
        return max(1, self.train.steps // 10) if self.schedule.kind == "wsd" else self.train.steps


def json_schema() -> str:
    """The JSON Schema of a configuration file, as kept in configs/schema.json."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps({**dialect, **Config.model_json_schema(by_alias=True)}, indent=2) + "\n"


if __name__ == "__main__":
    print(json_schema(), end="")
