"""A run on a Slurm cluster, checked before it takes a node."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from meditron_train.config.check import check_config
from meditron_train.config.load import load_config
from meditron_train.config.model_config import ModelConfig
from meditron_train.config.schema import Config
from meditron_train.errors import UserError
from meditron_train.launcher.sbatch import (
    Job,
    batch_script,
    cluster_environment,
    cluster_options,
    find_launch_dir,
    submit,
)
from meditron_train.planner.hardware import HARDWARE, find_hardware
from meditron_train.planner.memory import describe, fullest_stage, require_fit
from meditron_train.planner.search import fewest_ranks
from meditron_train.train.base_model import resolve_base_model, with_a_base
from meditron_train.train.length import resolve_steps

_GIB = 2**30
_MOST_NODES = 1024


@dataclass(frozen=True)
class Wishes:
    """What a person asks of Slurm for a run; None: as the run and the cluster's settings want it."""

    num_nodes: int | None
    gpus_per_node: int
    ranks_per_node: int | None
    gpu: str | None
    time_limit: str
    save_time_s: int
    partition: str | None
    account: str | None
    num_spare_nodes: int
    chain: int
    from_step: int | None


@dataclass(frozen=True)
class Submission:
    """A job that was checked, and everything that Slurm needs for it.

    Attributes:
        script: where `text`, the batch script, goes, relative to the current directory.
        memory: one line on the memory of the fullest GPU.
    """

    settings: Config
    job: Job
    model: ModelConfig | None
    script: Path
    text: str
    memory: str


def plan_job(config: Path, overrides: Sequence[str], wishes: Wishes) -> Submission:
    """Check a run and write its batch script, without a file or a job yet.

    The cluster's settings enter this process's environment, as the presets name files by variables.

    Raises:
        UserError: the configuration, the layout or the memory do not fit what is asked for.
    """
    launch_dir = find_launch_dir()
    os.environ.update(cluster_environment(launch_dir))
    settings, _ = resolve_steps(load_config(config, list(overrides)))
    options = cluster_options(os.environ)
    named = {"partition": wishes.partition, "account": wishes.account}
    options |= {name: value for name, value in named.items() if value is not None}
    ranks = wishes.ranks_per_node or max(wishes.gpus_per_node, 1)
    if wishes.gpus_per_node and ranks > wishes.gpus_per_node:
        raise UserError(
            f"--ranks-per-node {ranks} on {wishes.gpus_per_node} GPUs: at most one process per GPU"
        )
    base = resolve_base_model(with_a_base(settings))
    model = base.model if base is not None else None
    gpu = wishes.gpu or settings.train.gpu
    job = Job(
        name=job_name(settings.logging.run_dir),
        config=config,
        overrides=tuple(overrides),
        num_nodes=wishes.num_nodes or _fewest_nodes(settings, model, ranks, gpu),
        gpus_per_node=wishes.gpus_per_node,
        ranks_per_node=ranks,
        time_limit=wishes.time_limit,
        num_spare_nodes=wishes.num_spare_nodes,
        save_time_s=wishes.save_time_s,
        chain=wishes.chain,
        from_step=wishes.from_step,
        options=tuple(options.items()),
    )
    check_config(settings, model, job.world_size, check_files=False)
    memory = _check_memory(settings, model, job.world_size, gpu)
    text = batch_script(job, directory=Path.cwd(), launch_dir=launch_dir)
    return Submission(settings, job, model, Path("logs") / f"{job.name}.sbatch", text, memory)


def submit_job(planned: Submission) -> list[str]:
    """Check the files, write the script and give the jobs to Slurm; returns their ids."""
    check_config(with_a_base(planned.settings), planned.model, planned.job.world_size)
    planned.script.parent.mkdir(exist_ok=True)
    planned.script.write_text(planned.text)
    return submit(planned.job, planned.script)


def job_name(run_dir: Path) -> str:
    """A name for the job out of letters, digits and `_.-`: that of the run directory, wherever it is given from."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", run_dir.absolute().resolve().name) or "train"


def _fewest_nodes(settings: Config, model: ModelConfig | None, ranks_per_node: int, gpu: str | None) -> int:
    """As few nodes as the layout, the batch and (where it can be checked) the memory allow."""
    numbers = range(ranks_per_node, (_MOST_NODES + 1) * ranks_per_node, ranks_per_node)
    memory_bytes = HARDWARE[gpu].memory_bytes if gpu in HARDWARE else None
    number = fewest_ranks(settings, model, numbers, memory_bytes)
    if number is not None:
        return number // ranks_per_node
    raise UserError(
        f"no number of nodes up to {_MOST_NODES} with {ranks_per_node} ranks each suits parallel.tensor x pipeline x "
        f"context = {settings.parallel.layout(1).model_parallel_size}, train.global_batch_size "
        f"{settings.train.global_batch_size} and the memory; give --nodes to see what is wrong with it"
    )


def _check_memory(settings: Config, model: ModelConfig | None, world_size: int, gpu: str | None) -> str:
    """One line on the memory.

    Raises:
        UserError: the step does not fit into `gpu`.
    """
    if model is None:
        return f"memory: not checked, as {settings.model.from_} is not on this machine"
    estimate = fullest_stage(settings, model, settings.parallel.layout(world_size))
    needed = f"memory: about {estimate.total / _GIB:.0f} GiB on a GPU of stage {estimate.stage} ({describe(estimate)})"
    if gpu is None or gpu == "cpu":
        return f"{needed}; not compared with a GPU, as neither --gpu nor train.gpu names one"
    require_fit(estimate, gpu)
    return f"{needed} of {find_hardware(gpu).memory_bytes / _GIB:.0f}"
