"""`meditron-train submit`: a run on a Slurm cluster, checked before it takes a node."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meditron_train.errors import UserError

if TYPE_CHECKING:
    from meditron_train.config.model_config import ModelConfig
    from meditron_train.config.schema import Config
    from meditron_train.launcher.sbatch import Job

_GIB = 2**30
_MOST_NODES = 1024


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
            "--gpu", help="a100-80gb, h100-80gb or h200-141gb: refuse what does not fit into its memory."
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the batch script; submit nothing.")
    ] = False,
) -> None:
    """Write a batch script for CONFIG.yaml and give it to Slurm.

    Checks the configuration, and the memory with --gpu, first. A job continues its run until train.steps is reached:
    through time limits, preemption and failures (docs/slurm.md).
    """
    from meditron_train.config.check import check_config
    from meditron_train.config.load import load_config
    from meditron_train.launcher import sbatch

    launch_dir = sbatch.find_launch_dir()
    os.environ.update(sbatch.cluster_environment(launch_dir))  # the presets name files by variables
    settings = load_config(config, overrides or [])
    options = sbatch.cluster_options(os.environ)
    options |= {k: v for k, v in {"partition": partition, "account": account}.items() if v is not None}
    ranks = ranks_per_node or max(gpus_per_node, 1)
    if gpus_per_node and ranks > gpus_per_node:
        raise UserError(f"--ranks-per-node {ranks} on {gpus_per_node} GPUs: at most one process per GPU")
    model = _shape(settings)
    gpu = gpu or settings.train.gpu
    job = sbatch.Job(
        name=re.sub(r"[^A-Za-z0-9_.-]", "_", settings.logging.run_dir.name),
        config=config,
        overrides=tuple(overrides or ()),
        num_nodes=nodes or _fewest_nodes(settings, model, ranks, gpu),
        gpus_per_node=gpus_per_node,
        ranks_per_node=ranks,
        time_limit=time_limit,
        num_spare_nodes=spare_nodes,
        save_time_s=save_time,
        chain=chain,
        options=tuple(options.items()),
    )
    check_config(settings, model, job.world_size, check_files=False)
    memory = _check_memory(settings, model, job.world_size, gpu)
    directory = Path.cwd()
    text = sbatch.batch_script(job, directory=directory, launch_dir=launch_dir)
    script = Path("logs") / f"{job.name}.sbatch"
    typer.echo(_summary(settings, job, memory), err=True)
    if dry_run:
        typer.echo(text, nl=False)
        typer.echo(
            f"\nnot submitted; without --dry-run: {' && '.join(sbatch.submit_commands(job, script))}",
            err=True,
        )
        return
    check_config(settings, model, job.world_size)  # now the files, too
    script.parent.mkdir(exist_ok=True)
    script.write_text(text)
    ids = sbatch.submit(job, script)
    typer.echo(_next_steps(settings, job, ids))


def _shape(settings: Config) -> ModelConfig | None:
    """The model's shape with room for data.special_tokens; None where its files are not on this machine."""
    from meditron_train.checkpoint.hf_config import model_config_from_hf, read_hf_config
    from meditron_train.checkpoint.hf_read import is_hf_directory
    from meditron_train.checkpoint.megatron_read import MegatronSource, is_megatron_directory

    source = settings.model.from_
    if source is None:
        assert settings.model.hf_config is not None
        model = model_config_from_hf(dict(settings.model.hf_config), where="model.hf_config")
    elif is_megatron_directory(source):
        model = MegatronSource(source).model
    elif is_hf_directory(source):
        model = read_hf_config(source)
    else:
        return None
    return model.model_copy(update={"vocab_size": model.vocab_size + len(settings.data.special_tokens)})


def _fewest_nodes(settings: Config, model: ModelConfig | None, ranks_per_node: int, gpu: str | None) -> int:
    """As few nodes as the layout, the batch and (where it can be checked) the memory allow."""
    from meditron_train.planner.memory import GPU_MEMORY_BYTES, fullest_stage

    train = settings.train
    for number in range(1, _MOST_NODES + 1):
        layout = settings.parallel.layout(number * ranks_per_node)
        if layout.problems() or train.global_batch_size % (train.micro_batch_size * layout.data):
            continue
        if model is None or gpu not in GPU_MEMORY_BYTES:
            return number
        if fullest_stage(settings, model, layout).total <= GPU_MEMORY_BYTES[gpu]:
            return number
    raise UserError(
        f"no number of nodes up to {_MOST_NODES} with {ranks_per_node} ranks each suits parallel.tensor x pipeline x "
        f"context = {settings.parallel.layout(1).model_parallel_size}, train.global_batch_size "
        f"{train.global_batch_size} and the memory; give --nodes to see what is wrong with it"
    )


def _check_memory(settings: Config, model: ModelConfig | None, world_size: int, gpu: str | None) -> str:
    """One line on the memory. Raises UserError where the step does not fit into `gpu`."""
    from meditron_train.planner.memory import GPU_MEMORY_BYTES, describe, fullest_stage, require_fit

    if model is None:
        return f"memory: not checked, as {settings.model.from_} is not on this machine"
    estimate = fullest_stage(settings, model, settings.parallel.layout(world_size))
    needed = f"memory: about {estimate.total / _GIB:.0f} GiB on a GPU of stage {estimate.stage} ({describe(estimate)})"
    if gpu is None or gpu == "cpu":
        return f"{needed}; not compared with a GPU, as neither --gpu nor train.gpu names one"
    require_fit(estimate, gpu)
    return f"{needed} of {GPU_MEMORY_BYTES[gpu] / _GIB:.0f}"


def _summary(settings: Config, job: Job, memory: str) -> str:
    layout = settings.parallel.layout(job.world_size)
    parts = (
        f"tensor {layout.tensor}, pipeline {layout.pipeline}, context {layout.context}, data {layout.data}"
    )
    spare = f" and {job.num_spare_nodes} spare" if job.num_spare_nodes else ""
    count = f"{job.num_nodes} node{'s' if job.num_nodes > 1 else ''}{spare}"
    return f"{job.name}: {count} with {job.ranks_per_node} ranks each: {parts}\n{memory}"


def _next_steps(settings: Config, job: Job, ids: list[str]) -> str:
    run_dir, first = settings.logging.run_dir, ids[0]
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
