"""What a configuration needs and how fast it will be, before a GPU is asked for; which layout would be faster."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from meditron_train.config.check import check_config
from meditron_train.config.load import load_config
from meditron_train.config.model_config import ModelConfig
from meditron_train.config.schema import Config
from meditron_train.data.packing.batch_schedule import BatchSchedule
from meditron_train.errors import UserError
from meditron_train.flows.measured import FIRST_LINES, comparable_lines
from meditron_train.layout import ParallelLayout
from meditron_train.planner.cost import RunCost
from meditron_train.planner.flops import gpu_type
from meditron_train.planner.hardware import HARDWARE, Hardware, find_hardware
from meditron_train.planner.memory import MemoryEstimate, estimate_stages
from meditron_train.planner.published_models import published_model
from meditron_train.planner.search import SearchResult, fewest_ranks, search_layouts
from meditron_train.planner.throughput import StepTime, predict_step, predicted_mfu
from meditron_train.report.json_lines import read_json_lines
from meditron_train.report.run_record import launch_of, whole
from meditron_train.train.base_model import resolve_base_model
from meditron_train.train.length import resolve_steps

DEFAULT_GPU = "h100-80gb"
_MOST_NODES = 1024


@dataclass(frozen=True)
class Basis:
    """What the speeds of a plan are taken from.

    Attributes:
        gpu: name of the accelerator; None for train.gpu, that of the calibration run, or a note.
        hardware_file: YAML file of further accelerators, see `read_hardware`.
        calibration_run: run whose measured speed is taken over, see `calibrated`.
        mean_document_tokens: as for `predict_step`.
    """

    gpu: str | None = None
    hardware_file: Path | None = None
    calibration_run: Path | None = None
    mean_document_tokens: float | None = None


@dataclass(frozen=True)
class Plan:
    """A run as predicted.

    Attributes:
        step: with the full batch, after a ramp.
        cost: None where the number of steps is not known.
        notes: what had to be assumed, one sentence each.
    """

    config: Config
    model: ModelConfig
    layout: ParallelLayout
    hardware: Hardware
    stages: list[MemoryEstimate]
    step: StepTime
    cost: RunCost | None
    notes: list[str]

    @property
    def fullest(self) -> MemoryEstimate:
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def fits(self) -> bool:
        return self.fullest.total <= self.hardware.memory_bytes

    @property
    def mfu(self) -> dict[str, float]:
        """Of the step, by each convention of `planner.flops`."""
        train, lora = self.config.train, self.config.lora
        return predicted_mfu(self.step, self.model, train.seq_len, self.hardware, train.precision, lora)

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready description; bytes, seconds, tokens/s."""
        parts = ("weights", "gradients", "optimizer", "activations", "logits", "allowance", "total")
        return {
            "gpu": self.hardware.name,
            "num_gpus": self.layout.world_size,
            "layout": {
                name: getattr(self.layout, name) for name in ("tensor", "pipeline", "context", "data")
            },
            "num_parameters": self.model.num_parameters,
            "memory_bytes": [
                {"stage": stage.stage, **{part: getattr(stage, part) for part in parts}}
                for stage in self.stages
            ],
            "memory_available_bytes": self.hardware.memory_bytes,
            "fits": self.fits,
            "step_time_s": self.step.total,
            "step_time_parts_s": self.step.parts,
            "tokens_per_second": self.step.tokens_per_second,
            "mfu": self.mfu,
            "run": None
            if self.cost is None
            else {
                "seconds": self.cost.seconds,
                "gpu_hours": self.cost.gpu_hours,
                "energy_kwh": self.cost.energy_kwh,
                "co2_kg": self.cost.co2_kg,
                "pue": self.cost.pue,
                "carbon_kg_per_kwh": self.cost.carbon_kg_per_kwh,
            },
            "notes": self.notes,
        }


def make_plan(
    config: Config,
    *,
    num_gpus: int | None,
    basis: Basis,
    pue: float,
    carbon_kg_per_kwh: float,
) -> Plan:
    """Plan a run of the config as it stands.

    Args:
        config: the run.
        num_gpus: None for as few whole nodes as the layout, the batch and the memory need.
        basis: of the speeds.
        pue: power usage effectiveness of the site.
        carbon_kg_per_kwh: CO2 of its electricity.

    Raises:
        UserError: the layout is impossible (says which number must change, and to what), or the GPU or the
            model's shape is unknown.
    """
    notes: list[str] = []
    config, _ = resolve_steps(config)
    model = model_shape(config, notes)
    hardware = _hardware(config, basis, notes)
    layout = config.parallel.layout(num_gpus or _fewest_gpus(config, model, hardware, notes))
    check_config(config, model, layout.world_size, check_files=False)
    predict = partial(
        predict_step, config, model, layout, hardware, mean_document_tokens=basis.mean_document_tokens
    )
    if config.train.batch_ramp is not None:
        notes.append(
            "the step is that of the full batch; the run has the smaller ones of train.batch_ramp, too"
        )
    cost = None
    if config.knows_steps:
        seconds = sum(
            num_steps * predict(batch_size=batch_size).total
            for batch_size, num_steps in BatchSchedule.of(config.train).levels(config.train.steps)
        )
        cost = RunCost(seconds, layout.world_size, hardware.power_w, pue, carbon_kg_per_kwh)
    return Plan(
        config,
        model,
        layout,
        hardware,
        estimate_stages(config, model, layout, on_gpu=hardware.name != "cpu"),
        predict(),
        cost,
        notes,
    )


def search(config: Config, *, num_gpus: int, basis: Basis) -> tuple[Hardware, SearchResult, list[str]]:
    """Every layout of the config's model and batch on `num_gpus` GPUs.

    Args:
        config, basis: as for `make_plan`.
        num_gpus: of all layouts.

    Returns:
        what the GPUs are, the layouts, and the notes as in `Plan`.

    Raises:
        UserError: as `make_plan`.
    """
    notes: list[str] = []
    model = model_shape(config, notes)
    hardware = _hardware(config, basis, notes)
    found = search_layouts(config, model, num_gpus, hardware, mean_document_tokens=basis.mean_document_tokens)
    if found.candidates:  # what is wrong with the rest of the configuration is wrong with all of them
        check_config(found.candidates[0].config, model, num_gpus, check_files=False)
    return hardware, found, notes


def model_shape(config: Config, notes: list[str]) -> ModelConfig:
    """The shape of the config's model, with room for data.special_tokens. No weight is read.

    Raises:
        UserError: the model is neither here nor named after a published one, or its vocabulary is not known.
    """
    source, stored = config.model.from_, None
    if source is not None and not source.is_dir():
        if (known := published_model(source)) is None:
            raise UserError(
                f"model.from: {source} does not exist here and is not named after a published model; give its "
                "directory, or model.init=random with model.hf_config"
            )
        name, stored = known
        notes.append(f"{source} is not here; the published shape of {name} is used")
    base = resolve_base_model(config, stored)
    if base is None:
        raise UserError(
            f"model.from: {source} is neither a Hugging Face model nor one of our checkpoints"
            if source is not None
            else "model.hf_config has no vocab_size, and data.tokenizer, which would say it, is not here"
        )
    return base.model


def calibrated(
    hardware: Hardware, run: Path, notes: list[str], *, mean_document_tokens: float | None = None
) -> Hardware:
    """`hardware` with its efficiencies scaled so that the prediction for `run` is what the run measured.

    Measured is the median step time of its last start, without the first lines, at the batch size that it reached.

    Args:
        hardware: what the run had, as the table says.
        run: directory of the run.
        notes: gets one.
        mean_document_tokens: of the documents of the run, as for `predict_step`.

    Raises:
        UserError: the run has too few steps, no configuration, or no record of its ranks.
    """
    config_file, metrics = run / "config.yaml", read_json_lines(run / "metrics.jsonl")
    timed = [line for line in metrics if line.get("step_time_s") is not None and whole(line.get("step"), 0)]
    launch = _last_launch(run)
    world_size = whole(launch.get("world_size"), 0)
    if not config_file.is_file() or not timed or not world_size:
        raise UserError(
            f"{run} cannot calibrate a plan: it needs config.yaml, metrics.jsonl, and provenance.jsonl with the number "
            "of ranks"
        )
    config = load_config(config_file)
    batch_size, chosen = comparable_lines(
        [line["step"] for line in timed],
        BatchSchedule.of(config.train),
        whole(launch.get("resumed_after_step"), 0),
    )
    if not chosen:
        raise UserError(
            f"{run} cannot calibrate a plan: after its last start it needs more than {FIRST_LINES} lines in "
            "metrics.jsonl whose steps have one batch size"
        )
    model = model_shape(config, [])
    predicted = predict_step(
        config,
        model,
        config.parallel.layout(world_size),
        hardware,
        mean_document_tokens=mean_document_tokens,
        batch_size=batch_size,
    ).total
    factor = predicted / statistics.median(timed[index]["step_time_s"] for index in chosen)
    notes.append(f"calibrated by {run}: {factor:.2f} x the speed of the table")
    return replace(
        hardware,
        matmul_efficiency=hardware.matmul_efficiency * factor,
        attention_efficiency=hardware.attention_efficiency * factor,
        memory_efficiency=hardware.memory_efficiency * factor,
        link_efficiency=hardware.link_efficiency * factor,
        latency_s=hardware.latency_s / factor,
    )


def _last_launch(run: Path) -> dict[str, Any]:
    """What the last start recorded of its ranks; {} where none did."""
    started = read_json_lines(run / "provenance.jsonl")
    return launch_of(started[-1]) if started else {}


def _hardware(config: Config, basis: Basis, notes: list[str]) -> Hardware:
    """What is planned for; with a calibration run at its speeds, and the run's own hardware where none is named."""
    run = basis.calibration_run
    device = None if run is None else _last_launch(run).get("device")
    of_run = gpu_type(device) if isinstance(device, str) else None
    name = basis.gpu or config.train.gpu or of_run
    if basis.mean_document_tokens is None:
        notes.append(
            "attention is counted for documents that fill the sequence; --document-tokens N for shorter ones"
        )
    if config.lora is not None:
        notes.append("times are those of training the whole model; with lora a step is shorter")
    if name is None:
        name = DEFAULT_GPU
        notes.append(f"neither --gpu nor train.gpu names a GPU; {name} is assumed")
    hardware = find_hardware(name, basis.hardware_file)
    if run is None:
        return hardware
    if name in HARDWARE and of_run is not None and name != of_run:
        raise UserError(
            f"{run} ran on {of_run} and cannot calibrate a plan for {name}: write --gpu {of_run}, or leave "
            "--calibrate out"
        )
    return calibrated(hardware, run, notes, mean_document_tokens=basis.mean_document_tokens)


def _fewest_gpus(config: Config, model: ModelConfig, hardware: Hardware, notes: list[str]) -> int:
    """As few GPUs as the layout, the batch and the memory allow: a part of a node, or whole nodes."""
    per_node = hardware.gpus_per_node
    parts_of_a_node = [number for number in range(1, per_node) if per_node % number == 0]
    nodes = range(per_node, (_MOST_NODES + 1) * per_node, per_node)
    number = fewest_ranks(config, model, (*parts_of_a_node, *nodes), hardware.memory_bytes)
    if number is not None:
        notes.append(f"--gpus is not given; {number} is the least on which this layout fits")
        return number
    size = config.parallel.layout(1).model_parallel_size
    raise UserError(
        f"no number of {hardware.name} up to {_MOST_NODES * per_node} suits parallel.tensor x pipeline x context = "
        f"{size}, train.global_batch_size {config.train.global_batch_size} and the memory; give --gpus to see what is "
        "wrong with one, or --search for layouts that fit"
    )
