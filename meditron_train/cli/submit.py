"""`meditron-train submit`: a run on a Slurm cluster, checked before it takes a node."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from meditron_train.flows.submit import Submission


def submit(
    config: Annotated[Path, typer.Argument(help="Configuration file (YAML).", metavar="CONFIG.yaml")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Values that replace those of the file.", metavar="[section.field=value]..."),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option("--nodes", min=1, help="Nodes; absent: as few as the layout and the memory need."),
    ] = None,
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", min=0, help="0: nodes without GPUs.")] = 8,
    ranks_per_node: Annotated[
        int | None, typer.Option("--ranks-per-node", min=1, help="Processes per node (default: one per GPU).")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            help="a100-40gb, a100-80gb, h100-80gb or h200-141gb: refuse what does not fit into its memory.",
        ),
    ] = None,
    time_limit: Annotated[str, typer.Option("--time", help="Time limit of one job.")] = "24:00:00",
    save_time: Annotated[
        int,
        typer.Option(
            "--save-time", min=1, help="Seconds before the time limit at which the run saves and stops."
        ),
    ] = 300,
    partition: Annotated[str | None, typer.Option("--partition", help="Slurm partition.")] = None,
    account: Annotated[str | None, typer.Option("--account", help="Slurm account.")] = None,
    spare_nodes: Annotated[
        int, typer.Option("--spare-nodes", min=0, help="Nodes more than needed, to replace bad ones at once.")
    ] = 0,
    chain: Annotated[
        int,
        typer.Option(
            "--chain", min=1, help="Jobs one after the other; 1: one job that requeues itself until done."
        ),
    ] = 1,
    from_step: Annotated[
        int | None,
        typer.Option(
            "--from-step",
            min=1,
            help="Go back to the run's checkpoint of this step, once; later ones are set aside.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the batch script; submit nothing.")
    ] = False,
) -> None:
    """Write a batch script for CONFIG.yaml and give it to Slurm.

    Checks the configuration, and the memory with --gpu, first. A job continues its run until train.steps is reached:
    through time limits, preemption and failures (docs/guides/slurm.md).

    \b
    Examples:
      meditron-train submit configs/meditron-70b.yaml --gpu h100-80gb --dry-run
      meditron-train submit configs/llama2-7b.yaml --nodes 1 --time 12:00:00
    """
    from meditron_train.flows.submit import Wishes, plan_job, submit_job
    from meditron_train.launcher.sbatch import submit_commands

    wishes = Wishes(
        num_nodes=nodes,
        gpus_per_node=gpus_per_node,
        ranks_per_node=ranks_per_node,
        gpu=gpu,
        time_limit=time_limit,
        save_time_s=save_time,
        partition=partition,
        account=account,
        num_spare_nodes=spare_nodes,
        chain=chain,
        from_step=from_step,
    )
    planned = plan_job(config, overrides or [], wishes)
    typer.echo(_summary(planned), err=True)
    if dry_run:
        typer.echo(planned.text, nl=False)
        commands = " && ".join(submit_commands(planned.job, planned.script))
        typer.echo(f"\nnot submitted; without --dry-run: {commands}", err=True)
        return
    typer.echo(_next_steps(planned, submit_job(planned)))


def _summary(planned: Submission) -> str:
    from meditron_train.train.length import UNKNOWN_STEPS

    job = planned.job
    layout = planned.settings.parallel.layout(job.world_size)
    parts = (
        f"tensor {layout.tensor}, pipeline {layout.pipeline}, context {layout.context}, data {layout.data}"
    )
    spare = f" and {job.num_spare_nodes} spare" if job.num_spare_nodes else ""
    count = f"{job.num_nodes} node{'s' if job.num_nodes > 1 else ''}{spare}"
    length = "" if planned.settings.knows_steps else f"\n{UNKNOWN_STEPS}"
    return f"{job.name}: {count} with {job.ranks_per_node} ranks each: {parts}\n{planned.memory}{length}"


def _next_steps(planned: Submission, ids: list[str]) -> str:
    job, run_dir, first = planned.job, planned.settings.logging.run_dir, ids[0]
    cancel = f"scancel {first}" if len(ids) == 1 else f"scancel --name {job.name}"
    chain = f", then {', '.join(ids[1:])}" if ids[1:] else ""
    return (
        f"Submitted job {first}{chain}.\n"
        f"  where it is     squeue --name {job.name}\n"
        f"  watch it        tail -F logs/{job.name}-{first}.out\n"
        f"  ranks' logs     logs/{first}/NODE-RANK.log\n"
        f"  status          {run_dir}/status.json\n"
        f"  save now        touch {run_dir}/save\n"
        f"  save and stop   touch {run_dir}/stop\n"
        f"  cancel          {cancel}"
    )
