"""From the command line of Megatron-LM or Megatron-LLM to a configuration of ours.

The tables below and the functions of `_Reader` are all of it; docs/guides/migration.md shows them. Names are compared
with `_` for `-`: Megatron-LLM writes underscores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meditron_train.config.training import BatchRamp
from meditron_train.data.packing.batch_schedule import BatchSchedule
from meditron_train.errors import UserError

# Argument -> our key; the value is taken as it is.
SAME: dict[str, str] = {
    "tensor_model_parallel_size": "parallel.tensor",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "context_parallel_size": "parallel.context",
    "make_vocab_size_divisible_by": "parallel.vocab_multiple",
    "micro_batch_size": "train.micro_batch_size",
    "global_batch_size": "train.global_batch_size",
    "train_iters": "train.steps",
    "seq_length": "train.seq_len",
    "seed": "train.seed",
    "lr": "optimizer.lr",
    "min_lr": "optimizer.min_lr",
    "weight_decay": "optimizer.weight_decay",
    "clip_grad": "optimizer.clip_grad",
    "adam_eps": "optimizer.eps",
    "lr_warmup_iters": "schedule.warmup_steps",
    "lr_warmup_fraction": "schedule.warmup_fraction",
    "load": "model.from",
    "save": "logging.run_dir",
    "save_interval": "checkpoint.interval",
    "eval_interval": "validation.interval",
    "eval_iters": "validation.steps",
    "log_interval": "logging.interval",
    "wandb_project": "logging.wandb_project",
    "wandb_exp_name": "logging.wandb_name",
}
# What Megatron-LM and Megatron-LLM take where an argument is left out, and our defaults are others.
LEFT_OUT: dict[str, Any] = {
    "optimizer.min_lr": 0.0,
    "optimizer.weight_decay": 0.01,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.eps": 1e-8,
    "schedule.kind": "linear",
}
# Values of SAME that are words, also where they look like a number.
WORDS = ("load", "save", "wandb_project", "wandb_exp_name")
# Any of these turns Weights & Biases on, which is off here unless asked for.
WANDB = ("wandb_logger", "wandb_project", "wandb_exp_name")
# Switch -> our key, which it sets to true.
SWITCHES: dict[str, str] = {
    "sequence_parallel": "parallel.sequence",
    "use_distributed_optimizer": "parallel.distributed_optimizer",
    "overlap_grad_reduce": "parallel.overlap_grad_reduce",
    "overlap_param_gather": "parallel.overlap_param_gather",
    "async_save": "checkpoint.async_save",
}
# Argument -> the name of the shape under Hugging Face's names, for a model that starts from random weights.
SHAPE: dict[str, str] = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "num_attention_heads_kv": "num_key_value_heads",
    "max_position_embeddings": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "layernorm_epsilon": "rms_norm_eps",
    "rotary_base": "rope_theta",
    "rope_theta": "rope_theta",
    "vocab_size": "vocab_size",
}
# What is always so here, or decided by itself.
ALREADY: dict[str, str] = {
    "swiglu": "the model's family says it",
    "use_rms_norm": "the model's family says it",
    "disable_bias_linear": "the model's family says it",
    "untie_embeddings_and_output_weights": "the model's configuration says it",
    "no_tie_embed_logits": "the model's configuration says it",
    "group_query_attention": "num_query_groups says it",
    "reset_position_ids": "always: positions start again in every document",
    "reset_attention_mask": "always: attention stays inside each document",
    "eod_mask_loss": "always: the last token of a document has no label",
    "use_flash_attn": "train.attention: auto takes the best that is installed",
    "transformer_impl": "train.attention: auto takes the best that is installed",
    "use_mcore_models": "always",
    "attention_softmax_in_fp32": "always",
    "accumulate_allreduce_grads_in_fp32": "always",
    "exit_signal_handler": "always: SIGTERM and SIGUSR1 save and stop",
    "finetune": "model.from takes the weights alone; a run continues from its own checkpoints",
    "no_load_optim": "model.from takes the weights alone",
    "no_load_rng": "model.from takes the weights alone",
    "use_checkpoint_args": "always: a checkpoint carries its configuration",
    "dataloader_type": "the order of samples follows from data.seed and the step",
    "ckpt_format": "one format, which every layout loads",
    "use_dist_ckpt": "one format, which every layout loads",
    "distributed_backend": "NCCL on GPUs, gloo on CPUs",
    "use_rotary_position_embeddings": "the model's family says it",
    "position_embedding_type": "the model's family says it",
    "hidden_dropout": "no dropout, as in Llama",
    "attention_dropout": "no dropout, as in Llama",
    "num_workers": "samples are gathered by threads; data.prefetch steps ahead",
    "tensorboard_dir": "RUN_DIR/tensorboard, with logging.tensorboard",
    "profile": "train.profile.from_step and num_steps",
    "distributed_timeout_minutes": "resilience.hang_other_s",
}


@dataclass
class Migration:
    """What came out: values by section, what is already so, and what has no equal here."""

    values: dict[str, Any] = field(default_factory=dict)
    already: list[str] = field(default_factory=list)
    without_equal: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def set(self, key: str, value: Any) -> None:
        """Set `section.key`."""
        *sections, name = key.split(".")
        place = self.values
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value


def migrate(words: Sequence[str]) -> Migration:
    """Read a command line of Megatron's.

    Args:
        words: `--name value ...`, as Megatron's scripts get them; words before the first `--` are ignored.

    Raises:
        UserError: there is no argument, a value is missing, or it is not of its kind.
    """
    given = _arguments(words)
    if not given:
        raise UserError("there is no argument of Megatron's (--name value) in what was given")
    return _Reader(given).read()


def _arguments(words: Sequence[str]) -> dict[str, list[str]]:
    given: dict[str, list[str]] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            text, equals, value = word[2:].partition("=")
            name = text.replace("-", "_")
            given[name] = [value] if equals else []
        elif name is not None:
            given[name].append(word)
    return given


def _value(text: str) -> Any:
    """A number where it is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


class _Reader:
    """Takes the arguments one group after another; what nobody takes has no equal."""

    def __init__(self, given: dict[str, list[str]]) -> None:
        self.given, self.taken = given, set[str]()
        self.result = Migration()

    def read(self) -> Migration:
        starts_from_weights = "load" in self.given
        for name, key in SAME.items():
            if (value := self.one(name)) is not None:
                self.result.set(key, value)
        for name, key in SWITCHES.items():
            if self.has(name):
                self.result.set(key, True)
        wanted = [self.has(name) for name in WANDB]  # each is taken
        if any(wanted):
            self.result.set("logging.wandb", "auto")
        for name, key in SHAPE.items():
            if (value := self.one(name)) is not None and not starts_from_weights:
                self.result.set("model.init", "random")
                self.result.set(f"model.hf_config.{key}", value)
        self.precision_and_recomputation()
        self.schedule()
        self.batch()
        self.data()
        self.result.already = [f"--{name}: {why}" for name, why in ALREADY.items() if self.has(name)]
        self.result.without_equal = [
            " ".join([f"--{name}", *values]) for name, values in self.given.items() if name not in self.taken
        ]
        return self.result

    def has(self, name: str) -> bool:
        self.taken.add(name)
        return name in self.given

    def one(self, name: str) -> Any:
        """The value of an argument, None where it was not given."""
        if not self.has(name):
            return None
        values = self.given[name]
        if len(values) != 1:
            raise UserError(f"--{name} has {len(values)} values ({' '.join(values)}): it takes one")
        return values[0] if name in WORDS else _value(values[0])

    def number(self, name: str) -> int | float | None:
        value = self.one(name)
        if isinstance(value, str):
            raise UserError(f"--{name} is {value!r}, not a number")
        return value

    def precision_and_recomputation(self) -> None:
        if self.has("bf16"):
            self.result.set("train.precision", "bf16")
        elif self.has("fp16"):
            self.result.set("train.precision", "bf16")
            self.result.notes.append("--fp16: there is no fp16 here; bf16 needs no loss scale")
        else:
            self.result.set("train.precision", "fp32")
        granularity = self.one("recompute_granularity")
        if self.has("recompute_activations"):
            granularity = "selective"
        if granularity is not None:
            self.result.set("train.recompute", granularity)
        for name in ("recompute_method", "recompute_num_layers"):
            if self.has(name):
                self.result.notes.append(f"--{name}: full recomputation is of every layer")

    def schedule(self) -> None:
        style = self.one("lr_decay_style")
        if style is not None:
            kind = str(style).lower()
            if kind not in ("cosine", "linear", "constant", "wsd"):
                raise UserError(
                    f"--lr_decay_style is {style}: cosine, linear, constant and wsd are known here"
                )
            self.result.set("schedule.kind", kind)
        betas = self.number("adam_beta1"), self.number("adam_beta2")
        if betas != (None, None):
            usual = LEFT_OUT["optimizer.betas"]
            self.result.set(
                "optimizer.betas", [b if b is not None else u for b, u in zip(betas, usual, strict=True)]
            )
        for key, value in LEFT_OUT.items():
            section, name = key.split(".")
            if name not in self.result.values.get(section, {}):
                self.result.set(key, value)
                self.result.notes.append(f"{key}: {value}, Megatron's default, as the argument was left out")

    def batch(self) -> None:
        ramp = self.ramp()
        is_wsd = self.result.values.get("schedule", {}).get("kind") == "wsd"
        decay = "lr_wsd_decay" if is_wsd else "lr_decay"
        self.steps_from_samples("train_samples", "train.steps", ramp)
        self.steps_from_samples("lr_warmup_samples", "schedule.warmup_steps", ramp)
        self.steps_from_samples(f"{decay}_samples", "schedule.decay_steps", None if is_wsd else ramp)
        if (steps := self.number(f"{decay}_iters")) is not None:
            self.result.set("schedule.decay_steps", steps)
        if (
            is_wsd
        ):  # Megatron-LM ends the decay at --lr-decay-iters, which is the length of the run by default
            for name in ("lr_decay_iters", "lr_decay_samples"):
                if self.has(name):
                    self.result.notes.append(f"--{name}: wsd decays over the last steps of the run")
            style = self.one("lr_wsd_decay_style") or "exponential"
            if style != "linear":
                self.result.notes.append(f"--lr_wsd_decay_style {style}: the decay of wsd is linear here")
        self.virtual_pipeline()

    def ramp(self) -> BatchRamp | None:
        if not self.has("rampup_batch_size"):
            return None
        values = self.given["rampup_batch_size"]
        if len(values) != 3 or not all(value.isdigit() and int(value) > 0 for value in values):
            raise UserError(f"--rampup_batch_size is {' '.join(values)!r}: it takes START INCREMENT SAMPLES")
        start, increment, samples = map(int, values)
        ramp = BatchRamp(start=start, increment=increment, samples=samples)
        self.result.set("train.batch_ramp", ramp.model_dump())
        return ramp

    def steps_from_samples(self, name: str, key: str, ramp: BatchRamp | None) -> None:
        """Samples become steps by the global batch, which `ramp` lets grow from the first step on."""
        samples, batch = self.number(name), self.number("global_batch_size")
        if samples is None:
            return
        if not batch:
            self.result.notes.append(f"--{name}: {key} counts steps; --global_batch_size was not given")
            self.taken.remove(name)
            return
        schedule = BatchSchedule(int(batch), ramp)
        steps = schedule.steps_for(int(samples)) if samples > 0 else 0
        self.result.set(key, steps)
        self.result.notes.append(
            f"--{name}: {samples} samples at {'the ramp and then ' if ramp else ''}{batch} a step = {steps} steps"
        )

    def virtual_pipeline(self) -> None:
        layers = self.number("num_layers_per_virtual_pipeline_stage")
        if layers is not None:
            total, stages = self.number("num_layers"), self.number("pipeline_model_parallel_size")
            if total is None or stages is None:
                self.result.notes.append(
                    "--num_layers_per_virtual_pipeline_stage: parallel.virtual_pipeline is num_layers / "
                    "pipeline_model_parallel_size / this; --num_layers was not given"
                )
            else:
                self.result.set("parallel.virtual_pipeline", int(total // stages // layers))

    def data(self) -> None:
        for name, key in (
            ("data_path", "train"),
            ("train_data_path", "train"),
            ("valid_data_path", "validation"),
        ):
            if self.has(name):
                self.result.set(f"data.{key}", list(_sources(name, self.given[name])))
        if self.has("split"):
            shares = [float(share) for share in "".join(self.given["split"]).split(",")]
            if len(shares) > 1 and sum(shares) > 0:
                self.result.set("data.validation_fraction", shares[1] / sum(shares))
                self.result.notes.append(
                    "--split: documents are held out by their hash, not by their place; a test part is not made"
                )
        tokenizer = self.one("tokenizer_model")
        vocab_file = self.one("vocab_file")
        self.has("tokenizer_type")
        file = tokenizer if tokenizer is not None else vocab_file
        if file is not None:
            path = Path(str(file))
            self.result.set(
                "data.tokenizer", str(path.parent if path.suffix in (".model", ".json") else path)
            )
        if self.has("vocab_extra_ids_list"):
            tokens = [token for value in self.given["vocab_extra_ids_list"] for token in value.split(",")]
            self.result.set("data.special_tokens", tokens)


def _sources(name: str, values: Sequence[str]) -> list[dict[str, Any]]:
    """`PREFIX`, or `WEIGHT PREFIX WEIGHT PREFIX ...`."""
    if values and all(not isinstance(_value(value), str) for value in values[::2]):
        if len(values) % 2:
            raise UserError(f"--{name} {' '.join(values)}: a weight has no path behind it")
        return [
            {"path": path, "weight": _value(weight)}
            for weight, path in zip(values[::2], values[1::2], strict=True)
        ]
    return [{"path": path} for path in values]
