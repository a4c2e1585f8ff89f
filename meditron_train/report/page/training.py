"""Sections on what the training itself did: loss, optimizer, speed, memory, and the metrics that others added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from meditron_train.report.curves import Curve, Metrics
from meditron_train.report.metrics import SOURCE_PREFIX, VALIDATION_PREFIX
from meditron_train.report.page.blocks import Block, Section, Text, table
from meditron_train.report.page.charts import over_steps, stacked
from meditron_train.report.page.words import UNKNOWN, duration, number, percent
from meditron_train.report.run_record import RunRecord

# Key of metrics.jsonl -> what it is called in the step's breakdown.
STEP_PARTS = {
    "data_time_s": "waiting for data",
    "forward_backward_time_s": "forward and backward",
    "reduce_time_s": "gradients and waiting",
    "update_time_s": "optimizer",
}
_SHOWN_KEYS = {
    *("time", "tokens", "loss", "lr", "grad_norm", "param_norm", "num_loss_tokens", "tokens_per_second"),
    *("step_time_s", "mfu", "num_skipped_steps", "peak_memory_bytes", "energy_j", *STEP_PARTS),
}
_GIB = 2**30


def charts_of_runs(records: Mapping[str, RunRecord]) -> list[Section]:
    """The curves of one run, or of several on top of each other, by name."""
    runs = {name: run.metrics for name, run in records.items()}
    counted = flops_counted(list(records.values()))
    return [
        section(
            "loss",
            "Loss",
            over_steps("training-loss", "Training loss", _of(runs, "loss"), unit="nats per token", smooth=True),
            over_steps(
                "validation-loss",
                "Validation loss",
                _with_prefix(runs, VALIDATION_PREFIX),
                unit="nats per token",
            ),
            Text("No step has been recorded yet, so there is no loss to show.")
            if not any(len(metrics["loss"]) for metrics in runs.values())
            else None,
        ),
        section(
            "optimization",
            "Optimization",
            over_steps("learning-rate", "Learning rate", _of(runs, "lr"), exponents="power"),
            over_steps(
                "gradient-norm",
                "Gradient norm before clipping",
                _of(runs, "grad_norm"),
                logarithmic=True,
                smooth=True,
            ),
            over_steps("parameter-norm", "Norm of the weights", _of(runs, "param_norm")),
        ),
        section(
            "speed",
            "Speed and memory",
            over_steps(
                "tokens-per-second",
                "Tokens per second, all ranks",
                _of(runs, "tokens_per_second"),
                smooth=True,
            ),
            over_steps(
                "mfu",
                "Model FLOPs utilization (MFU)",
                _scaled(runs, "mfu", 100),
                unit="%",
                smooth=True,
                note=f"By {counted}, over the peak of the hardware; recomputed work does not count.",
            ),
            over_steps(
                "memory",
                "Peak memory of the fullest rank",
                _scaled(runs, "peak_memory_bytes", 1 / _GIB),
                unit="GiB",
                note="On a GPU what PyTorch has allocated at most, on a CPU the resident memory of the process.",
            ),
        ),
    ]  # fmt: skip


def step_time(run: RunRecord) -> list[Block]:
    """Where the time of a step, and of the whole run, went."""
    metrics, total = run.metrics, run.metrics["step_time_s"]
    parts = {label: metrics[key] for key, label in STEP_PARTS.items() if len(metrics[key])}
    if not len(total.finite):
        return []
    blocks: list[Block] = []
    rows = []
    whole_step = float(np.mean(total.finite.values))
    if parts:
        rest = _rest(total, parts)
        chart = stacked(
            "step-time",
            "Time of a step",
            {**{label: curve.scaled(1000) for label, curve in parts.items()}, "other": rest.scaled(1000)},
            unit="ms",
            note="Means over the ranks. Gradients and waiting: from the end of a rank's own backward pass until the "
            "gradients of all are added up. Validation and saving stand outside.",
        )
        blocks += [chart] if chart else []
        for label, curve in [*parts.items(), ("other: checks, the loop itself", rest)]:
            seconds = float(np.mean(curve.finite.values)) if len(curve.finite) else 0.0
            rows.append((label, duration(seconds), percent(seconds / whole_step)))
    else:
        blocks.append(Text("This run was recorded by a version that did not divide the time of a step."))
    rows.append(("a step, on average", duration(whole_step), percent(1.0)))
    blocks.append(table(("part", "mean", "share"), rows, caption="Time of a step", numeric=(1, 2)))
    return [*blocks, *_whole_time(run)]


def _whole_time(run: RunRecord) -> list[Block]:
    known = [start.seconds for start in run.starts if start.seconds is not None]
    if not known:
        return []
    wall = sum(known)
    gaps = np.diff(run.metrics["step_time_s"].steps, prepend=0)
    stepping = float(np.nansum(gaps * run.metrics["step_time_s"].values))
    outside = {
        "steps": stepping,
        "validation": _seconds(run, "validation_s"),
        "standing still to save": _seconds(run, "saving_s"),
    }
    outside["starting, exporting, steps that were done again"] = max(0.0, wall - sum(outside.values()))
    rows = [
        (name, duration(seconds), percent(seconds / wall if wall else None))
        for name, seconds in outside.items()
    ]
    rows.append(("all starts together", duration(wall), percent(1.0)))
    return [table(("spent on", "time", "share"), rows, caption="Time of the run", numeric=(1, 2))]


def _seconds(run: RunRecord, key: str) -> float:
    value = run.status.get(key)
    return float(value) if isinstance(value, int | float) else 0.0


def other_metrics(run: RunRecord) -> Section | None:
    """Metrics that this page has no place for, such as scores of tasks: a chart for each word before the first dot."""
    groups: dict[str, dict[str, Curve]] = {}
    for key, curve in run.metrics.curves.items():
        if key in _SHOWN_KEYS or key.startswith((VALIDATION_PREFIX, SOURCE_PREFIX)):
            continue
        group, _, name = key.partition(".")
        groups.setdefault(group, {})[name or group] = curve
    charts = [
        over_steps(f"metric-{number}", group.replace("_", " "), curves)
        for number, (group, curves) in enumerate(groups.items())
    ]
    found = section("scores", "Scores and further metrics", *charts)
    return found if found.blocks else None


def skipped_steps(run: RunRecord) -> list[Block]:
    """How many steps changed no weight, and when."""
    curve = run.metrics["num_skipped_steps"]
    if not len(curve) or not curve.last:
        return [Text("No step was skipped.")] if len(curve) else []
    increases = np.diff(curve.values, prepend=0) > 0
    # The count is written every logging.interval steps: which of the steps since the last line was skipped is unknown.
    first = (np.concatenate(([0], curve.steps[:-1])) + 1)[increases]
    stretches = zip(first[:20].tolist(), curve.steps[increases][:20].tolist(), strict=True)
    listed = ", ".join(f"{b:,}" if a == b else f"{a:,}–{b:,}" for a, b in stretches)
    more = f" and {int(increases.sum()) - 20} more" if increases.sum() > 20 else ""
    chart = over_steps("skipped-steps", "Skipped steps so far", {"skipped": curve}, staircase=True)
    steps = "1 step" if curve.last == 1 else f"{number(curve.last)} steps"
    text = f"{steps} changed no weight; the count rose in steps {listed}{more}."
    return [Text(text, "warn"), *([chart] if chart else [])]


def validation_summary(metrics: Metrics) -> str:
    """The last validation loss of each source, in words."""
    curves = metrics.with_prefix(VALIDATION_PREFIX)
    return ", ".join(f"{name} {number(curve.last)}" for name, curve in curves.items()) or UNKNOWN


def section(name: str, title: str, *blocks: Block | None) -> Section:
    """A section of the blocks that are there."""
    return Section(name, title, tuple(block for block in blocks if block is not None))


def _of(runs: Mapping[str, Metrics], key: str) -> dict[str, Curve]:
    return {name: metrics[key] for name, metrics in runs.items()}


def _scaled(runs: Mapping[str, Metrics], key: str, factor: float) -> dict[str, Curve]:
    return {name: curve.scaled(factor) for name, curve in _of(runs, key).items()}


def _with_prefix(runs: Mapping[str, Metrics], prefix: str) -> dict[str, Curve]:
    """Of one run by source; of several by run and source."""
    return {
        source if len(runs) == 1 else f"{name}: {source}": curve
        for name, metrics in runs.items()
        for source, curve in metrics.with_prefix(prefix).items()
    }


def _rest(total: Curve, parts: Mapping[str, Curve]) -> Curve:
    """What is left of the total where all parts are known."""
    steps = total.steps
    for curve in parts.values():
        steps = np.intersect1d(steps, curve.steps)
    rest = total.values[np.isin(total.steps, steps)]
    for curve in parts.values():
        rest = rest - curve.values[np.isin(curve.steps, steps)]
    return Curve(steps, np.maximum(rest, 0.0))


def flops_counted(runs: Sequence[RunRecord]) -> str:
    """What the MFU of the runs counts: with adapters the model's own matrices have no gradient to be computed."""
    whole = "6 FLOPs a parameter and token"
    adapted = "4 FLOPs a parameter and token, 6 of the adapters"
    found = [adapted if run.setting("lora") is not None else whole for run in runs]
    return f"{whole} (with adapters: {adapted})" if len(set(found)) > 1 else found[0]
