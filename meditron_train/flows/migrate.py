"""From the command line of Megatron-LM or Megatron-LLM to a configuration of ours.

The tables of `megatron_arguments` and the functions of `_Reader` are all of it; docs/guides/migration.md shows them.
Names are compared with `_` for `-`: Megatron-LLM writes underscores.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meditron_train.config.training import BatchRamp
from meditron_train.data.packing.batch_schedule import BatchSchedule
from meditron_train.errors import UserError
from meditron_train.flows.megatron_arguments import (
    ALREADY,
    LEFT_OUT,
    LEFT_OUT_OF_SHAPE,
    SAME,
    SHAPE,
    SWITCHES,
    WANDB,
    WORDS,
)


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
        for name, key in SAME.items():
            if (value := self.one(name)) is not None:
                self.result.set(key, value)
        for name, key in SWITCHES.items():
            if self.has(name):
                self.result.set(key, True)
        wanted = [self.has(name) for name in WANDB]  # each is taken
        if any(wanted):
            self.result.set("logging.wandb", "auto")
        self.model()
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
        if isinstance(value, str) or (isinstance(value, float) and not math.isfinite(value)):
            raise UserError(f"--{name} is {str(value)!r}, not a number")
        return value

    def count(self, name: str) -> int | None:
        value = self.number(name)
        if value is not None and (value < 1 or value != int(value)):
            raise UserError(f"--{name} is {value}: it takes a whole number of 1 or more")
        return None if value is None else int(value)

    def model(self) -> None:
        """The weights that a run starts from, or the shape of fresh ones."""
        load, save, notes = self.one("load"), self.one("save"), self.result.notes
        if load is not None and save is not None and Path(load) == Path(save):
            del self.result.values["model"]
            notes.append(
                "--load is --save, so the run starts from scratch where nothing is saved: here it continues from its "
                "own checkpoints by itself. If the weights of another model lie there, convert them for model.from"
            )
            load = None
        shape = {name: value for name in SHAPE if (value := self.one(name)) is not None}
        if load is not None:
            if shape:
                left_out = ", ".join(f"--{name} {value}" for name, value in shape.items())
                notes.append(f"the shape is that of model.from; not taken: {left_out}")
            notes.append(
                "model.from takes a checkpoint of Megatron's once it is converted: "
                f"meditron-train convert megatron-to-hf {shlex.quote(load)} HF_DIR --tokenizer TOKENIZER_DIR"
            )
        elif shape:
            self.result.set("model.init", "random")
            for name, value in shape.items():
                self.result.set(f"model.hf_config.{SHAPE[name]}", value)
            for key, (value, names) in LEFT_OUT_OF_SHAPE.items():
                given = [self.has(name) for name in names]  # each is taken
                if not any(given):
                    self.left_out(f"model.hf_config.{key}", value)
                elif value is True:
                    self.result.set(f"model.hf_config.{key}", False)

    def left_out(self, key: str, value: Any) -> None:
        self.result.set(key, value)
        words = str(value).lower() if isinstance(value, bool) else value
        self.result.notes.append(f"{key}: {words}, Megatron's default, as the argument was left out")

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
                self.left_out(key, value)

    def batch(self) -> None:
        ramp = self.ramp()
        is_wsd = self.result.values.get("schedule", {}).get("kind") == "wsd"
        decay = "lr_wsd_decay" if is_wsd else "lr_decay"
        self.steps_from_samples("train_samples", "train.steps", ramp)
        self.steps_from_samples("lr_warmup_samples", "schedule.warmup_steps", ramp)
        self.steps_from_samples(f"{decay}_samples", "schedule.decay_steps", None if is_wsd else ramp)
        if (steps := self.number(f"{decay}_iters")) is not None:
            self.result.set("schedule.decay_steps", steps)
        self.warmup_fraction(ramp)
        if is_wsd:
            # Megatron-LM ends the decay at --lr-decay-iters, which is the length of the run by default.
            for name in ("lr_decay_iters", "lr_decay_samples"):
                if self.has(name):
                    self.result.notes.append(f"--{name}: wsd decays over the last steps of the run")
            style = self.one("lr_wsd_decay_style") or "exponential"
            if style != "linear":
                self.result.notes.append(f"--lr_wsd_decay_style {style}: the decay of wsd is linear here")
        self.virtual_pipeline()

    def warmup_fraction(self, ramp: BatchRamp | None) -> None:
        """A share of Megatron's whole decay, which is as long as the run unless an argument says otherwise."""
        fraction, batch = self.number("lr_warmup_fraction"), self.count("global_batch_size")
        if fraction is None:
            return
        samples = self.number("lr_decay_samples") if batch else None
        if samples is None and batch and ramp is not None:  # a share of samples is not one of steps
            samples = self.number("train_samples")
        steps = self.number("lr_decay_iters")
        self.result.values["schedule"].pop("warmup_steps", None)  # 0, or Megatron refuses both
        if samples is not None and batch:
            warmup_steps = (
                BatchSchedule(batch, ramp).steps_for(round(fraction * samples)) if fraction > 0 else 0
            )
        elif steps is not None:
            warmup_steps = round(fraction * steps)
        else:
            return self.result.set("schedule.warmup_fraction", fraction)
        self.result.set("schedule.warmup_steps", warmup_steps)
        whole = f"{steps} steps" if samples is None else f"{samples} samples"
        self.result.notes.append(
            f"--lr_warmup_fraction: {fraction} of the {whole} of decay = {warmup_steps} steps"
        )

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
        samples, batch = self.number(name), self.count("global_batch_size")
        if samples is None:
            return
        if not batch:
            self.result.notes.append(f"--{name}: {key} counts steps; --global_batch_size was not given")
            self.taken.remove(name)
            return
        schedule = BatchSchedule(batch, ramp)
        steps = schedule.steps_for(int(samples)) if samples > 0 else 0
        self.result.set(key, steps)
        self.result.notes.append(
            f"--{name}: {samples} samples at {'the ramp and then ' if ramp else ''}{batch} a step = {steps} steps"
        )

    def virtual_pipeline(self) -> None:
        layers = self.count("num_layers_per_virtual_pipeline_stage")
        if layers is not None:
            total, stages = self.count("num_layers"), self.count("pipeline_model_parallel_size")
            if total is None or stages is None:
                self.result.notes.append(
                    "--num_layers_per_virtual_pipeline_stage: parallel.virtual_pipeline is num_layers / "
                    "pipeline_model_parallel_size / this; --num_layers was not given"
                )
            else:
                self.result.set("parallel.virtual_pipeline", total // stages // layers)

    def data(self) -> None:
        for name, key in (
            ("data_path", "train"),
            ("train_data_path", "train"),
            ("valid_data_path", "validation"),
        ):
            if self.has(name):
                self.result.set(f"data.{key}", list(_sources(name, self.given[name])))
        if self.has("split"):
            shares = _shares("".join(self.given["split"]))
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


def _shares(text: str) -> list[float]:
    try:
        shares = [float(share) for share in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 <= share < math.inf for share in shares):
        raise UserError(f"--split is {text!r}: it takes shares, as 969,30,1")
    return shares


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
