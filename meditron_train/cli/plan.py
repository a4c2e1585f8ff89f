"""`meditron-train plan`: what a run needs and how fast it will be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meditron_train.cli.trace import trace_lines
from meditron_train.errors import ExitCode, UserError
from meditron_train.units import format_num_bytes

if TYPE_CHECKING:
    from meditron_train.flows.plan import Plan
    from meditron_train.planner.hardware import Hardware
    from meditron_train.planner.search import SearchResult

_MAX_LISTED = 10


def plan(
    config: Annotated[Path, typer.Argument(help="Configuration file (YAML).", metavar="CONFIG.yaml")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Values that replace those of the file.", metavar="[section.field=value]..."),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=1, help="GPUs; absent: as few as this layout fits on.")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help="a100-40gb, a100-80gb, h100-80gb, h200-141gb, cpu, or one of --hardware."),
    ] = None,
    hardware: Annotated[
        Path | None, typer.Option("--hardware", metavar="FILE.yaml", help="Further accelerators and nodes.")
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Rank every layout that fits on --gpus by predicted speed.")
    ] = False,
    calibrate: Annotated[
        Path | None, typer.Option("--calibrate", metavar="RUN_DIR", help="Scale speeds to those of this run.")
    ] = None,
    document_tokens: Annotated[
        float | None,
        typer.Option(
            "--document-tokens", min=1, help="Length of the document that a token is in, on average."
        ),
    ] = None,
    pue: Annotated[
        float, typer.Option("--pue", min=1, help="Power usage effectiveness of the center.")
    ] = 1.2,
    carbon: Annotated[float, typer.Option("--carbon", min=0, help="kg of CO2 per kWh of the grid.")] = 0.4,
    trace: Annotated[
        bool,
        typer.Option("--trace", help="Take the real step on a pretended GPU, one process for each stage."),
    ] = False,
    stages: Annotated[
        list[int] | None, typer.Option("--stage", min=0, help="With --trace: only this stage (repeatable).")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Predict memory, speed, time and cost of a run; nothing is loaded, no GPU is needed.

    Exits with 2 where the layout is impossible. A plan that does not fit the memory says so and exits with 0; one whose
    trace finds a problem exits with 1.

    \b
    Examples:
      meditron-train plan configs/meditron-70b.yaml --gpus 128 --gpu a100-80gb
      meditron-train plan configs/llama2-7b.yaml --gpus 8 --search
      meditron-train plan configs/llama2-7b.yaml parallel.tensor=2 --json
    """
    from meditron_train.config.load import load_config
    from meditron_train.flows import plan as flow

    settings = load_config(config, overrides or [])
    basis = flow.Basis(gpu, hardware, calibrate, document_tokens)
    if search:
        if gpus is None:
            raise UserError("--search needs the number of GPUs: --gpus N")
        if trace or stages:
            raise UserError(
                "--search does not trace: give --trace and --stage with the overrides of the layout that you choose"
            )
        found = flow.search(settings, num_gpus=gpus, basis=basis)
        _print_search(*found, num_gpus=gpus, json_output=json_output)
        return
    planned = flow.make_plan(settings, num_gpus=gpus, basis=basis, pue=pue, carbon_kg_per_kwh=carbon)
    traced = None
    if trace:
        from meditron_train.flows.trace.trace import trace as trace_ranks

        traced = trace_ranks(planned.config, planned.model, planned.layout, stages=stages)
    elif stages:
        raise UserError("--stage says what to trace: it needs --trace")
    if json_output:
        document = planned.as_json() | ({} if traced is None else {"trace": traced.as_json()})
        print(json.dumps(document, indent=2))
    else:
        print("\n".join([*_lines(planned), *([] if traced is None else trace_lines(traced))]))
    if traced is not None and traced.problems:
        raise typer.Exit(ExitCode.FAILED)


def _lines(planned: Plan) -> list[str]:
    from meditron_train.planner.memory import describe
    from meditron_train.train.length import UNKNOWN_STEPS

    layout, step, cost, train = planned.layout, planned.step, planned.cost, planned.config.train
    full, available = planned.fullest, planned.hardware.memory_bytes
    mfu = planned.mfu
    per_token = "6N" if planned.config.lora is None else "4N and the adapters' 6"
    shares = ", ".join(
        f"{name.replace('_', ' ')} {seconds / step.total:.0%}"
        for name, seconds in sorted(step.parts.items(), key=lambda part: -part[1])
        if seconds / step.total >= 0.005
    )
    if cost is None:
        run = UNKNOWN_STEPS
    else:
        run = (
            f"{train.steps:,} steps in {_duration(cost.seconds)}: {cost.gpu_hours:,.0f} GPU-hours, "
            f"{cost.energy_kwh:,.0f} kWh, {cost.co2_kg:,.0f} kg CO2 (PUE {cost.pue:g}, "
            f"{cost.carbon_kg_per_kwh:g} kg/kWh)"
        )
    return [
        f"model     {planned.model.num_parameters / 1e9:.2f} billion parameters",
        f"layout    {layout.world_size} x {planned.hardware.name}: tensor {layout.tensor}, pipeline {layout.pipeline}, "
        f"context {layout.context}, data {layout.data}",
        f"memory    {format_num_bytes(full.total)} of {format_num_bytes(available)} on stage {full.stage}: "
        + ("fits" if planned.fits else "DOES NOT FIT; try --search"),
        f"          GiB: {describe(full)}",
        f"step      {step.total:.2f} s for {step.num_tokens:,} tokens: {step.tokens_per_second:,.0f} tokens/s",
        f"          {shares}",
        f"MFU       {mfu['parameters']:.1%} by {per_token}, {mfu['causal_attention']:.1%} with causal attention, "
        f"{mfu['attention']:.1%} with full attention",
        f"run       {run}",
        *(f"note      {note}" for note in planned.notes),
    ]


def _print_search(
    hardware: Hardware, found: SearchResult, notes: list[str], *, num_gpus: int, json_output: bool
) -> None:
    if json_output:
        rows = [
            {
                "overrides": candidate.overrides(),
                "tokens_per_second": candidate.step.tokens_per_second,
                "memory_bytes": candidate.memory.total,
            }
            for candidate in found.candidates
        ]
        print(json.dumps({"candidates": rows, "rejected": found.rejected, "notes": notes}, indent=2))
        return
    print(f"{len(found.candidates)} layouts fit on {num_gpus} x {hardware.name}; the fastest:")
    for candidate in found.candidates[:_MAX_LISTED]:
        print(
            f"  {candidate.step.tokens_per_second:>12,.0f} tokens/s  {format_num_bytes(candidate.memory.total)}\n"
            f"      {' '.join(candidate.overrides())}"
        )
    if found.rejected:
        print("rejected:")
    for reason, count in sorted(found.rejected.items(), key=lambda item: -item[1]):
        print(f"  {count:>6}  {reason}")
    for note in notes:
        print(f"note      {note}")


def _duration(seconds: float) -> str:
    days, hours = divmod(seconds / 3600, 24)
    return f"{int(days)} d {hours:.0f} h" if days else f"{hours:.1f} h"
