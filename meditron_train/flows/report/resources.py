"""Checkpoints with the state of their hashes, the plan against what was measured, and what the run cost."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meditron_train.checkpoint.manifest import added_files, read_manifest, verify_manifest
from meditron_train.checkpoint.sharded.store import FINISHED_NAME
from meditron_train.config.load import load_config
from meditron_train.data.packing.batch_schedule import BatchSchedule
from meditron_train.errors import MeditronError
from meditron_train.files import read_json_object
from meditron_train.flows.measured import FIRST_LINES, comparable_lines
from meditron_train.flows.report.parallel_layout import layout_of, model_of
from meditron_train.planner.cost import RunCost
from meditron_train.planner.flops import gpu_type
from meditron_train.planner.hardware import HARDWARE, Hardware
from meditron_train.planner.memory import estimate_stages
from meditron_train.planner.throughput import predict_step, predicted_mfu
from meditron_train.report.page.blocks import Block, Cell, Section, Text, facts, table
from meditron_train.report.page.training import section
from meditron_train.report.page.words import UNKNOWN, amount, duration, moment, number, percent
from meditron_train.report.run_record import RunRecord, launch_of, listing, mapping, whole
from meditron_train.units import format_num_bytes

_EXPORT = re.compile(r"(hf|adapter)(_step_\d{8,}(_\d+)?)?")
# What an export is called until it has its name, hidden or not.
_UNFINISHED_EXPORT = re.compile(rf"\.?{_EXPORT.pattern}(\.(new|replaced))?(\.tmp)+")


def checkpoints(run: RunRecord, *, check_hashes: bool) -> Section:
    """Every checkpoint and export of the run.

    Args:
        check_hashes: read them whole; else their sizes alone are compared.
    """
    directory = run.path / "checkpoints"
    found = sorted(directory.iterdir()) if directory.is_dir() else []
    finished = [path for path in found if FINISHED_NAME.fullmatch(path.name)]
    rows = [_checkpoint_row(path, check_hashes) for path in finished]
    rows += [_unfinished_row(path) for path in found if path.name.endswith(".tmp")]
    last = run.status.get("last_checkpoint")
    if isinstance(last, str) and last not in [path.name for path in finished]:
        rows.append((last, UNKNOWN, UNKNOWN, UNKNOWN, Cell("missing: status.json names it", "bad")))
    beside = [path for path in sorted(run.path.iterdir()) if path.is_dir()]
    exports = [path for path in beside if _EXPORT.fullmatch(path.name)]
    rows += [_checkpoint_row(path, check_hashes, others_may_add=True) for path in exports]
    rows += [_unfinished_row(path) for path in beside if _UNFINISHED_EXPORT.fullmatch(path.name)]
    note = (
        "All files were read and their SHA-256 compared with the manifest."
        if check_hashes
        else "The sizes of all files were compared with the manifest; --check-hashes reads them and compares SHA-256."
    )
    return section(
        "checkpoints",
        "Checkpoints",
        table(("name", "written", "tokens", "size", "state"), rows, numeric=(2, 3)) if rows else None,
        Text(note) if finished or exports else Text("There is no checkpoint yet."),
    )


def _unfinished_row(path: Path) -> tuple[str | Cell, ...]:
    return path.name, UNKNOWN, UNKNOWN, UNKNOWN, Cell("being written, or left by a kill", "warn")


def _checkpoint_row(
    path: Path, check_hashes: bool, *, others_may_add: bool = False
) -> tuple[str | Cell, ...]:
    """How one directory stands.

    Args:
        others_may_add: further files, such as a model card, do it no harm.
    """
    problems = verify_manifest(path, check_hashes=check_hashes)
    manifest = read_manifest(path) or {}
    sizes = [mapping(entry).get("num_bytes") for entry in mapping(manifest.get("files")).values()]
    num_bytes = sum(size for size in sizes if type(size) is int)
    tokens = None
    if (path / "meta.json").is_file():
        try:
            tokens = read_json_object(path / "meta.json").get("tokens")
        except MeditronError as error:
            problems.append(str(error))
    added = added_files(path) if others_may_add and problems else []
    if problems and len(problems) == len(added):
        more = f" and {len(added) - 1} more" if len(added) > 1 else ""
        state = Cell(f"changed since: {added[0]}{more} was added", "warn")
    elif problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        state = Cell(f"damaged: {problems[0]}{more}", "bad")
    else:
        state = Cell("intact: hashes match" if check_hashes else "complete: sizes match", "good")
    size = format_num_bytes(num_bytes) if num_bytes else UNKNOWN
    written = _modified(path)
    return path.name, moment(written), amount(tokens if type(tokens) is int else None), size, state


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def hardware_of(run: RunRecord) -> Hardware | None:
    """What the run's ranks are in the planner's table; None for what is not in it."""
    name = run.setting("train", "gpu")
    if not isinstance(name, str):
        device = launch_of(run.last_provenance).get("device")
        name = gpu_type(device) if isinstance(device, str) else None
    return HARDWARE.get(name) if name is not None else None


def plan_against_measured(run: RunRecord) -> Section:
    """What `plan` says of this configuration beside what the run did."""
    title = ("plan", "Plan against measured")
    layout, model, hardware = layout_of(run), model_of(run), hardware_of(run)
    times = run.metrics["step_time_s"].finite
    if layout is None or model is None or hardware is None or len(times) <= FIRST_LINES:
        missing = {"its layout": layout, "the model's shape": model, "known hardware": hardware}
        lacks = [name for name, value in missing.items() if value is None]
        lacks += [f"more than {FIRST_LINES} steps"] if len(times) <= FIRST_LINES else []
        return section(*title, Text(f"There is no comparison, as the run lacks {', '.join(lacks)}."))
    try:
        config = load_config(run.path / "config.yaml")
        resumed_after = whole(launch_of(run.last_provenance).get("resumed_after_step"), 0)
        batch_size, chosen = comparable_lines(
            times.steps.tolist(), BatchSchedule.of(config.train), resumed_after
        )
        if not chosen:
            few = f"{FIRST_LINES} steps of one batch size after its last start"
            return section(*title, Text(f"There is no comparison, as the run lacks more than {few}."))
        step = predict_step(config, model, layout, hardware, batch_size=batch_size)
        stages = estimate_stages(config, model, layout, on_gpu=hardware.name != "cpu")
        train = config.train
        planned_mfu = predicted_mfu(step, model, train.seq_len, hardware, train.precision, config.lora)
    except (MeditronError, ValueError, ArithmeticError) as error:
        return section(*title, Text(f"There is no comparison: {error}"))
    measured_s = float(np.median(times.values[chosen]))
    steps = times.steps[chosen]
    tokens, mfu = _median(run, "tokens_per_second", steps), _median(run, "mfu", steps)
    memory = run.metrics["peak_memory_bytes"].last
    planned_memory = max(stage.total for stage in stages)
    counted = "6N" if config.lora is None else "4N and the adapters' 6"
    rows = [
        ("time of a step", duration(step.total), duration(measured_s), _ratio(measured_s, step.total)),
        ("tokens per second", number(step.tokens_per_second), number(tokens), _ratio(tokens, step.tokens_per_second)),
        (f"MFU by {counted}", percent(planned_mfu["parameters"]), percent(mfu), _ratio(mfu, planned_mfu["parameters"])),
        ("memory of the fullest rank", format_num_bytes(planned_memory),
         format_num_bytes(int(memory)) if memory else UNKNOWN, _ratio(memory, planned_memory)),
    ]  # fmt: skip
    if (traced := _traced_memory(run)) is not None:
        rows.append(
            ("memory of the fullest rank, traced", format_num_bytes(traced),
             format_num_bytes(int(memory)) if memory else UNKNOWN, _ratio(memory, traced))
        )  # fmt: skip
    shares = [
        (name.replace("_", " "), duration(seconds), percent(seconds / step.total))
        for name, seconds in sorted(step.parts.items(), key=lambda part: -part[1])
        if seconds / step.total >= 0.005
    ]
    note = (
        f"Measured is the median of the last start's steps of {batch_size:,} samples, without its first few."
    )
    if hardware.name == "cpu":
        note += (
            " The plan's figures for a CPU are placeholders, its memory includes an allowance for a GPU: "
            "`meditron-train plan --calibrate` scales the speeds to a run."
        )
    return section(
        *title,
        table(("", "plan", "measured", "measured / plan"), rows, numeric=(1, 2, 3)),
        table(("part of a planned step", "time", "share"), shares, numeric=(1, 2)),
        Text(f"Planned for {hardware.name}. {note}"),
    )


def _traced_memory(run: RunRecord) -> int | None:
    """The most bytes that a rank holds in the trace of `plan`, if RUN_DIR/plan.json has one."""
    try:
        trace = mapping(read_json_object(run.path / "plan.json").get("trace"))
    except MeditronError:
        return None
    peaks = [
        mapping(peak) for rank in listing(trace.get("ranks")) for peak in listing(mapping(rank).get("peaks"))
    ]
    return max((whole(peak.get("num_bytes"), 0) for peak in peaks), default=0) or None


def rank_seconds_of(run: RunRecord) -> float:
    """Seconds from start to last sign x ranks, over all starts whose end is known."""
    return sum((start.seconds or 0.0) * start.world_size for start in run.starts)


def cost(run: RunRecord) -> tuple[Section, str]:
    """Rank-hours, energy and CO2; the section, and the rank-hours in words."""
    starts = run.starts
    known = [start for start in starts if start.seconds is not None]
    rank_seconds = rank_seconds_of(run)
    hardware = hardware_of(run)
    unit = "rank-hours" if hardware is None or hardware.name == "cpu" else "GPU-hours"
    hours = f"{number(rank_seconds / 3600)} {unit}"
    if not known:
        text = Text("No start has recorded its time, so there is nothing to count.")
        return section("cost", "Cost", text), UNKNOWN
    blocks: list[Block] = []
    rows: list[tuple[str, str | Cell, str]] = [
        (unit, number(rank_seconds / 3600), "all starts, also what was lost: time from start to last sign x ranks")
    ]  # fmt: skip
    measured_w = measured_power_w(run)
    if measured_w is not None:
        rows += _energy_rows("measured", RunCost(rank_seconds, 1, measured_w), unit,
                             f"{measured_w:.0f} W is the mean by NVML's counters over the recorded steps")  # fmt: skip
    elif hardware is not None:
        origin = "an assumption for a rank on a CPU" if hardware.name == "cpu" else "the board's limit"
        power = f"{hardware.power_w:g} W is {origin}"
        rows += _energy_rows("estimated", RunCost(rank_seconds, 1, hardware.power_w), unit, power)
    else:
        blocks.append(Text("The power of this hardware is not known, so energy and CO2 are not estimated."))
    if len(known) < len(starts):
        blocks.append(
            Text(f"The end of {len(starts) - len(known)} starts is not known; they are not counted.", "warn")
        )
    return section("cost", "Cost", facts(rows), *blocks), hours


def _energy_rows(how: str, cost: RunCost, unit: str, power: str) -> list[tuple[str, str | Cell, str]]:
    return [
        (
            f"energy, {how}",
            f"{number(cost.energy_kwh)} kWh",
            f"{unit} x {cost.power_w:.0f} W / 1000 x PUE {cost.pue:g}; {power}",
        ),
        (
            "CO2, estimated",
            f"{number(cost.co2_kg)} kg",
            f"energy x {cost.carbon_kg_per_kwh:g} kg/kWh, an average grid; yours may differ",
        ),
    ]


def measured_power_w(run: RunRecord) -> float | None:
    """Mean power of a rank's GPU between the lines of metrics.jsonl, leaving out where a start lies between two."""
    energy, moments = run.metrics["energy_j"], run.metrics["time"]
    if len(energy) < 2 or not np.isin(energy.steps, moments.steps).all():
        return None
    times = moments.values[np.isin(moments.steps, energy.steps)]
    starts = [(start.began, start.world_size) for start in run.starts]
    joules = rank_seconds = 0.0
    for used, before, now in zip(energy.values[1:], times, times[1:], strict=False):
        begun = [size for began, size in starts if began <= now]
        if any(before < began <= now for began, _ in starts) or not now > before:
            continue
        joules += float(used)
        rank_seconds += float(now - before) * (begun[-1] if begun else 1)
    return joules / rank_seconds if rank_seconds > 0 and np.isfinite(joules) else None


def _median(run: RunRecord, key: str, steps: NDArray[np.int64]) -> float | None:
    """Over the lines of `steps`."""
    curve = run.metrics[key].finite
    values = curve.values[np.isin(curve.steps, steps)]
    return float(np.median(values)) if len(values) else None


def _ratio(measured: float | None, planned: float) -> str:
    return UNKNOWN if measured is None or planned <= 0 else f"{measured / planned:.2f}"
