"""From a run to the batch script that Slurm gets, and the commands that follow it.

The script only sets options and hands over to launch/train.sbatch, which is read from the shared file system at the
start of the job.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from meditron_train.errors import MeditronError, UserError
from meditron_train.files import shipped

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<fields>\d+(?::\d+){0,2})")
_SBATCH_VARIABLES = tuple(
    f"SBATCH_{name}" for name in ("PARTITION", "ACCOUNT", "QOS", "RESERVATION", "CONSTRAINT")
)


@dataclass(frozen=True)
class Job:
    """What is asked of Slurm for one run.

    Attributes:
        name: also what `singleton` goes by: jobs of one name run one after the other.
        num_nodes: nodes that train; `num_spare_nodes` are allocated beside them for those that fail the pre-flight.
        gpus_per_node: 0 on nodes without GPUs.
        time_limit: in Slurm's form; save_time_s seconds before its end the ranks are asked to save.
        chain: number of jobs, each continuing the one before.
        from_step: the step whose checkpoint the run goes back to; checkpoints made since say so, and no later job or
            start goes back again.
        options: further sbatch options, such as {"partition": "gpu"}.
    """

    name: str
    config: Path
    overrides: tuple[str, ...]
    num_nodes: int
    gpus_per_node: int
    ranks_per_node: int
    time_limit: str
    num_spare_nodes: int = 0
    save_time_s: int = 300
    chain: int = 1
    from_step: int | None = None
    options: tuple[tuple[str, str], ...] = ()

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.ranks_per_node


def batch_script(job: Job, *, directory: Path, launch_dir: Path) -> str:
    """The text for sbatch; the job runs in `directory`.

    Raises:
        UserError: the time limit cannot be read or leaves no time to save, or a value would not stay on its
            line of the script.
    """
    if time_limit_s(job.time_limit) <= job.save_time_s:
        raise UserError(
            f"--time {job.time_limit} leaves nothing before the {job.save_time_s} s that are kept for the last "
            "checkpoint; give more time, or a smaller --save-time"
        )
    options = {
        "job-name": job.name,
        **dict(job.options),
        "nodes": str(job.num_nodes + job.num_spare_nodes),
        "ntasks-per-node": "1",
        **({"gpus-per-node": str(job.gpus_per_node)} if job.gpus_per_node else {}),
        "exclusive": "",
        "mem": "0",
        "time": job.time_limit,
        "signal": f"B:USR1@{job.save_time_s}",
        "requeue": "",
        "dependency": "singleton",
        "open-mode": "append",
        "chdir": str(directory),
        "output": "logs/%x-%j.out",
    }
    words = [str(launch_dir / "train.sbatch"), str(job.config), *job.overrides]
    words += [] if job.from_step is None else ["--from-step", str(job.from_step)]
    _refuse_control_characters(options, words)
    lines = ["#!/usr/bin/env bash"]
    lines += [
        f"#SBATCH --{name}={shlex.quote(value)}" if value else f"#SBATCH --{name}"
        for name, value in options.items()
    ]
    lines += [
        "",
        "# Slurm makes no directory for the output: mkdir -p logs, before sbatch.",
        "set -euo pipefail",
        f"export TRAIN_NODES={job.num_nodes} NPROC_PER_NODE={job.ranks_per_node}",
    ]
    lines.append("exec " + shlex.join(words))
    return "\n".join(lines) + "\n"


def _refuse_control_characters(options: Mapping[str, str], words: Sequence[str]) -> None:
    """Check that no value contains a line break or another control character.

    Slurm reads its options line by line, and what stands on a line of its own is a command.

    Raises:
        UserError: a value does.
    """
    named = [(f"the sbatch option {name}", value) for name, value in options.items()]
    for what, value in [*named, *(("the command line", word) for word in words)]:
        if any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in value):
            raise UserError(f"{what} holds a control character: {value!r}. Give a value without line breaks")


def submit_commands(job: Job, script: Path) -> list[str]:
    """The sbatch commands, in order, as a person would type them."""
    if job.chain == 1:
        return [f"sbatch {shlex.quote(str(script))}"]
    return [
        f"CHAINED={'yes' if number else ''} CHAIN_REST={job.chain - 1 - number} sbatch {shlex.quote(str(script))}"
        for number in range(job.chain)
    ]


def submit(job: Job, script: Path) -> list[str]:
    """Give the jobs to Slurm; returns their ids.

    Raises:
        UserError: there is no sbatch here. MeditronError: Slurm refused, with its words.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "there is no sbatch here: run this on a login node of the cluster (--dry-run prints the script anywhere)"
        )
    ids: list[str] = []
    for number in range(job.chain):
        environment = dict(os.environ)
        # Slurm would take its variables for more than the options in the script, which they were read into.
        for name in ("CHAINED", "CHAIN_REST", *_SBATCH_VARIABLES):
            environment.pop(name, None)
        if job.chain > 1:
            environment.update(CHAINED="yes" if number else "", CHAIN_REST=str(job.chain - 1 - number))
        done = subprocess.run(
            ["sbatch", "--parsable", str(script)], env=environment, capture_output=True, text=True
        )
        if done.returncode != 0:
            queued = f" Jobs {' '.join(ids)} of the chain were queued before." if ids else ""
            raise MeditronError(f"Slurm refused {script}: {done.stderr.strip()}.{queued}")
        ids.append(done.stdout.strip().split(";")[0])
    return ids


def time_limit_s(text: str) -> int:
    """Seconds of Slurm's time formats: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S.

    Raises:
        UserError: the text has another form.
    """
    match = _TIME.fullmatch(text)
    if match is None:
        raise UserError(
            f"--time {text!r} is not a time limit; write hours:minutes:seconds (24:00:00) or days-hours (2-12)"
        )
    fields = [int(field) for field in match["fields"].split(":")]
    if match["days"] is not None:  # from the hours down
        days, units = int(match["days"]), (3600, 60, 1)
    elif len(fields) == 3:
        days, units = 0, (3600, 60, 1)
    else:  # from the minutes down
        days, units = 0, (60, 1, 0)
    return days * 86400 + sum(field * unit for field, unit in zip(fields, units, strict=False))


def find_launch_dir() -> Path:
    """launch/ of the working directory, else the one that comes with the program.

    Raises:
        UserError: it is in neither place.
    """
    candidates = (Path.cwd() / "launch", shipped("launch"))
    for candidate in candidates:
        if (candidate / "train.sbatch").is_file():
            return candidate
    raise UserError(
        f"there is no train.sbatch in {' or '.join(map(str, candidates))}: `meditron-train launch-scripts launch` "
        "writes the scripts here"
    )


def cluster_environment(launch_dir: Path) -> dict[str, str]:
    """This process's environment as the cluster's settings change it: bash reads them, as it does in the job.

    So a variable that is set already loses, unless the file asks for it (`export X=${X:-...}`), here as
    there.

    Raises:
        UserError: CLUSTER_ENV names no file.
    """
    chosen = os.environ.get("CLUSTER_ENV")
    path = Path(chosen or launch_dir / "cluster.env").absolute()
    if not path.is_file():
        if chosen:
            raise UserError(f"CLUSTER_ENV is {chosen}, but there is no such file")
        return dict(os.environ)
    done = subprocess.run(
        ["bash", "-c", 'source "$1" >&2; env -0', "bash", str(path)], stdout=subprocess.PIPE, check=False
    )
    if done.returncode != 0:
        raise UserError(f"{path} ended with exit code {done.returncode}; it must only set variables")
    pairs = (pair.partition("=") for pair in os.fsdecode(done.stdout).split("\0") if pair)
    return {name: value for name, _, value in pairs}


def cluster_options(environment: Mapping[str, str]) -> dict[str, str]:
    """Slurm's own variables (SBATCH_PARTITION ...) as sbatch options."""
    return {
        name.removeprefix("SBATCH_").lower(): environment[name]
        for name in _SBATCH_VARIABLES
        if environment.get(name)
    }
