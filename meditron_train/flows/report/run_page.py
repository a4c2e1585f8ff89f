"""From run directories to a page: of one run everything, of several what sets them apart."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meditron_train import __version__
from meditron_train.flows.report.parallel_layout import layout_section
from meditron_train.flows.report.resources import checkpoints, cost, plan_against_measured
from meditron_train.report.page.blocks import Cell, Page, Section, Text, facts, table
from meditron_train.report.page.life import STATES, data_mixture, evaluations, provenance, stability
from meditron_train.report.page.training import (
    charts_of_runs,
    flops_counted,
    other_metrics,
    section,
    step_time,
    validation_summary,
)
from meditron_train.report.page.words import UNKNOWN, amount, duration, moment, number, percent
from meditron_train.report.run_record import RunRecord, launch_of, listing, mapping, read_run


def make_page(
    run_dirs: Sequence[Path],
    *,
    evaluation_files: Sequence[Path] = (),
    check_hashes: bool = False,
    refresh_s: int | None = None,
) -> Page:
    """The report of one run, or the comparison of several.

    Args:
        evaluation_files: results of `evaluate --output` to show, beside those in the run.
        check_hashes: read all checkpoints; else their sizes alone are compared.
        refresh_s: how often a page of a run that goes on loads itself again where it is served.

    Raises:
        UserError: a directory is not that of a run, a file not the result of an evaluation.
    """
    runs = [read_run(path, tuple(evaluation_files) if len(run_dirs) == 1 else ()) for path in run_dirs]
    footer = f"Made by meditron-train {__version__} at {moment(time.time())}."
    if len(runs) == 1:
        return _one(runs[0], check_hashes, footer, refresh_s)
    return _several(runs, footer, refresh_s)


def _one(run: RunRecord, check_hashes: bool, footer: str, refresh_s: int | None) -> Page:
    costs, hours = cost(run)
    loss, optimization, speed = charts_of_runs({run.name: run})
    speed = section(speed.name, speed.title, *speed.blocks, *step_time(run))
    scores = other_metrics(run) or section("scores", "Scores and further metrics")
    scores = section(scores.name, scores.title, *evaluations(run), *scores.blocks)
    sections = [
        section("notes", "Notes", *(Text(problem, "warn") for problem in run.problems)),
        *([stability(run)] if _needs_attention(run) else []),
        loss,
        optimization,
        speed,
        *([] if _needs_attention(run) else [stability(run)]),
        data_mixture(run),
        scores,
        checkpoints(run, check_hashes=check_hashes),
        layout_section(run),
        plan_against_measured(run),
        costs,
        provenance(run),
    ]
    return Page(
        run.name,
        STATES.get(run.state, Cell(run.state, "warn")),
        _lead(run),
        facts(_tiles(run, hours)),
        tuple(part for part in sections if part.blocks),
        footer,
        refresh_s if _goes_on(run) else None,
    )


def _needs_attention(run: RunRecord) -> bool:
    return STATES.get(run.state, Cell("", "warn")).tone != "good"


def _lead(run: RunRecord) -> str:
    """What the run is, and how it stands, in two sentences."""
    record = run.last_provenance
    parameters = mapping(record.get("model")).get("num_parameters")
    size = f"{amount(parameters)} parameters, " if isinstance(parameters, int) else ""
    origin = run.setting("model", "from")
    start = f"from {origin}" if origin else "from random weights"
    sources = [str(mapping(source).get("name")) for source in listing(run.setting("data", "train"))]
    data = f", on {', '.join(sources)}" if sources else ""
    what = f"{size}{start}{data}." if run.config else "Its configuration is not there."
    if run.state in ("running", "starting"):
        return f"{what} Last sign of it: {moment(_updated(run))}."
    return f"{what} {run.diagnosis.summary}"


def _updated(run: RunRecord) -> float | None:
    starts = run.starts
    return starts[-1].ended if starts else None


def _tiles(run: RunRecord, hours: str) -> list[tuple[str, str | Cell, str]]:
    metrics, steps = run.metrics, run.status.get("steps") or run.setting("train", "steps")
    loss, speed, mfu = metrics["loss"].finite, metrics["tokens_per_second"].finite, metrics["mfu"].finite
    recent = slice(-100, None)
    memory = metrics["peak_memory_bytes"].last
    skipped = metrics["num_skipped_steps"].last
    num_starts = len(run.starts)
    left = _time_left(run, steps)
    return [
        ("steps", f"{run.step:,} of {steps:,}" if isinstance(steps, int) else f"{run.step:,}",
         f"about {duration(left)} left" if left else ""),
        ("tokens", amount(metrics["tokens"].last), "padding included"),
        ("training loss", number(loss.last), "last" if len(loss) else "none yet"),
        ("validation loss", validation_summary(metrics), "last, by source"),
        ("speed", f"{amount(float(speed.values[recent].mean()))} tokens/s" if len(speed) else UNKNOWN, "recent mean"),
        ("MFU", percent(float(mfu.values[recent].mean())) if len(mfu) else UNKNOWN,
         f"by {flops_counted([run])}" if len(mfu) else "not known: no published peak for this hardware"),
        ("peak memory", f"{memory / 2**30:,.2f} GiB" if memory else UNKNOWN, "of the fullest rank"),
        ("skipped steps", Cell(number(skipped), "warn" if skipped else ""), ""),
        ("starts", f"{num_starts:,}", "" if num_starts < 2 else "their causes are below"),
        ("cost", hours, ""),
    ]  # fmt: skip


def _time_left(run: RunRecord, steps: Any) -> float | None:
    times = run.metrics["step_time_s"].finite.values[-100:]
    if run.state != "running" or not isinstance(steps, int) or not len(times):
        return None
    return max(0, steps - run.step) * float(times.mean())


# ---- several runs ----------------------------------------------------------------------------------------------------


def _several(runs: list[RunRecord], footer: str, refresh_s: int | None) -> Page:
    names = _unique_names(runs)
    rows = []
    for name, run in zip(names, runs, strict=True):
        state = STATES.get(run.state, Cell(run.state, "warn"))
        speed = run.metrics["tokens_per_second"].finite.values[-100:]
        rows.append(
            (
                name, state, f"{run.step:,}", amount(run.metrics["tokens"].last),
                number(run.metrics["loss"].finite.last), validation_summary(run.metrics),
                amount(float(speed.mean())) if len(speed) else UNKNOWN, cost(run)[1],
            )
        )  # fmt: skip
    columns = ("run", "state", "step", "tokens", "loss", "validation loss", "tokens/s", "cost")
    sections = [
        section("runs", "Runs", table(columns, rows, numeric=(2, 3, 4, 6, 7))),
        differences(dict(zip(names, runs, strict=True))),
        *charts_of_runs(dict(zip(names, runs, strict=True))),
        section(
            "notes",
            "Notes",
            *(
                Text(f"{n}: {problem}", "warn")
                for n, run in zip(names, runs, strict=True)
                for problem in run.problems
            ),
        ),
    ]
    return Page(
        f"{len(runs)} runs",
        Cell("comparison"),
        f"{', '.join(names)}: their curves on top of each other, and what differs in their configurations.",
        facts([]),
        tuple(part for part in sections if part.blocks),
        footer,
        refresh_s if any(map(_goes_on, runs)) else None,
    )


def _goes_on(run: RunRecord) -> bool:
    return run.state in ("starting", "running", "silent")


def _unique_names(runs: list[RunRecord]) -> list[str]:
    """The directories' names; their paths where two have the same one."""
    names = [run.name for run in runs]
    return [str(run.path) if names.count(run.name) > 1 else run.name for run in runs]


def differences(runs: dict[str, RunRecord]) -> Section:
    """A table of the settings, and of the circumstances, in which the runs differ."""
    flat = {name: {**_flat(run.config), **_circumstances(run)} for name, run in runs.items()}
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    rows = [
        (key, *(values.get(key, UNKNOWN) for values in flat.values()))
        for key in keys
        if len({values.get(key, UNKNOWN) for values in flat.values()}) > 1
    ]
    if not rows:
        return section("differences", "What differs", Text("Nothing differs in their configurations."))
    return section("differences", "What differs", table(("setting", *flat), rows))


def _circumstances(run: RunRecord) -> dict[str, str]:
    record, launch = run.last_provenance, launch_of(run.last_provenance)
    versions = mapping(record.get("versions"))
    return {
        "(commit)": str(mapping(record.get("git")).get("commit") or UNKNOWN),
        "(ranks)": str(launch.get("world_size", UNKNOWN)),
        "(device)": str(launch.get("device", UNKNOWN)),
        **{f"(version of {name})": str(version) for name, version in versions.items()},
    }


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Dotted keys; lists of named sources by their name, other lists in one piece."""
    if isinstance(value, list) and value and all(isinstance(item, dict) and "name" in item for item in value):
        value = {
            str(item["name"]): {key: each for key, each in item.items() if key != "name"} for item in value
        }
    if isinstance(value, dict) and value:
        found: dict[str, str] = {}
        for key, item in value.items():
            found |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
        return found
    return {prefix: str(value)}
