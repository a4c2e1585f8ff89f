"""Every key a configuration file may hold: its type, default and meaning.

The text under each key becomes the tooltip in editors that read `configs/schema.json`, which
`python -m meditron_train.config.schema` prints. `null` in a file means the default.
Relative paths are relative to the working directory. data.py, training.py and finetuning.py hold larger groups of
keys.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from meditron_train.config.data import DataSection
from meditron_train.config.finetuning import LoraSection
from meditron_train.config.section import NUMBER, Count, Name, NotNegative, Positive, Section
from meditron_train.config.training import OptimizerSection, ParallelSection, ScheduleSection, TrainSection


class ModelSection(Section):
    """Where the model comes from."""

    from_: Path | None = Field(None, alias="from")
    """Directory of a Hugging Face model or of a sharded checkpoint. Needed with init: pretrained."""
    init: Literal["pretrained", "random"] = "pretrained"
    """pretrained: weights of `from`. random: fresh weights of the shape in `hf_config`."""
    hf_config: dict[str, Any] | None = None
    """The model's shape under its Hugging Face names (hidden_size, ...). Needed with init: random."""
    license: str | None = None
    """License of `from` as the Hugging Face Hub spells it (llama2, apache-2.0, ...), for `publish`."""
    allow_nonfinite: bool = False
    """Start from weights with NaN or infinity, and export them, all the same."""

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
    at_start: bool = False
    """Also measure before the first step."""
    tasks: tuple[Name, ...] = ()
    """Benchmarks (`meditron-train evaluate --tasks list`) whose questions are answered at each measurement, by the
    likeliest option and with no examples shown: task_accuracy.NAME."""
    tasks_data: Path = Path("benchmarks-data")
    """Directory of their files."""
    tasks_items: Count = 100
    """The first so many questions of each."""


class LoggingSection(Section):
    """Where the run and its metrics go."""

    run_dir: Path = Path("runs/default")
    """Directory of the run (default: runs/ and the name of the configuration file)."""
    interval: Count = 1
    """Steps between lines of metrics."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "disabled"
    """Weights & Biases gets metrics and the configuration only where it is asked for.
    auto: online with a key and a network, else offline."""
    wandb_project: str = "meditron-train"
    """Weights & Biases project."""
    wandb_name: str | None = None
    """The run's name there (default: that of its directory)."""
    wandb_tags: tuple[str, ...] = ()
    """Its tags there."""
    tensorboard: bool = True
    """Write TensorBoard files, with the configuration as a text."""


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
    anomaly_window: Annotated[int, Field(ge=10), NUMBER] = 100
    """Past steps that say what is usual."""
    loss_spike_sigma: NotNegative = 6.0
    """A loss this many standard deviations above the mean of the window is a spike; 0: none is."""
    grad_norm_factor: NotNegative = 20.0
    """A gradient norm this many times the median of the window explodes; 0: none does."""
    max_rollbacks: Count = 3
    """Rollbacks to one checkpoint before the run stops."""
    replica_check_interval: Annotated[int, Field(ge=0), NUMBER] = 100
    """Steps between comparisons of the weights that several ranks hold, which also precede every checkpoint; 0: never.
    Finds flipped bits and names the rank."""
    on_replica_mismatch: Literal["requeue", "stop"] = "requeue"
    """requeue: end with exit code 85, to be started again from the last checkpoint. stop: end with exit code 1."""
    hang_factor: NotNegative = 20.0
    """No finished step for this many median steps is a hang: the run ends, to be requeued; 0: never."""
    hang_min_s: Positive = 300.0
    """The least time without a finished step that is called a hang, in seconds."""
    hang_other_s: Positive = 1800.0
    """The same outside steps: the start, the first steps, validation, saving, exporting. Collective operations
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
    lora: LoraSection | None = None
    checkpoint: CheckpointSection = CheckpointSection()
    validation: ValidationSection = ValidationSection()
    logging: LoggingSection = LoggingSection()
    resilience: ResilienceSection = ResilienceSection()

    @model_validator(mode="after")
    def _check_lora(self) -> Config:
        if self.lora is not None and self.train.freeze.freezes_anything:
            raise ValueError("lora freezes the whole model already; leave train.freeze out")
        if self.lora is not None and self.model.from_ is None:
            raise ValueError("lora adapts a model that exists; name it with model.from")
        return self

    @property
    def export_name(self) -> str:
        """The directory in the run's own that the final model, or its adapters, are exported to."""
        return "hf" if self.lora is None else "adapter"

    @property
    def knows_steps(self) -> bool:
        """Whether `train.steps` is the length of the run. Else train.tokens, train.epochs or the sources' token_budget
        say it, and `train.length` makes steps of them."""
        if self.train.tokens is not None or self.train.epochs is not None:
            return False
        return "steps" in self.train.model_fields_set or self.data.train[0].token_budget is None

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
