"""The launcher as its environment variables show it. Nothing is set here, and nothing
but the resolver of names is asked (`master_address`).

torchrun wins over Slurm, because `srun torchrun` sets both and the inner one started the process.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from meditron_train.errors import UserError
from meditron_train.log import get_logger

_log = get_logger(__name__)

_FIRST_PORT, _NUM_PORTS = 20000, 12000  # below Linux's ephemeral ports, which start at 32768


@dataclass(frozen=True)
class LaunchEnvironment:
    """One process among `world_size`. `hosts` are all of them where the launcher says so, else this one."""

    kind: Literal["alone", "torchrun", "slurm"]
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    hosts: tuple[str, ...]
    job_id: str | None = None


def detect_launcher(environment: Mapping[str, str] | None = None) -> LaunchEnvironment:
    """Read the process's place from `environment` (default: os.environ).

    Raises:
        UserError: variables are missing, are not integers, or contradict each other.
    """
    env = os.environ if environment is None else environment
    if "RANK" in env or "LOCAL_RANK" in env:
        return _torchrun(env)
    _refuse_mpi(env, ("OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS"))
    if _started_by_srun(env):
        return _slurm(env)
    _refuse_mpi(env, ("PMI_SIZE", "PMIX_SIZE"))  # srun --mpi sets them too
    num_tasks = env.get("SLURM_NTASKS", "1")
    if "SLURM_JOB_ID" in env and num_tasks != "1":
        # In a batch script SLURM_PROCID and SLURM_NTASKS are set too, but only srun starts the tasks:
        # believing them here would wait forever for ranks that are never started.
        _log.warning(
            "Slurm job %s has %s tasks, but this process was not started by srun: it runs alone; "
            "write `srun meditron-train train ...` to use all of them",
            env["SLURM_JOB_ID"],
            num_tasks,
        )
    return LaunchEnvironment(
        kind="alone",
        rank=0,
        world_size=1,
        local_rank=0,
        local_world_size=1,
        master_addr="127.0.0.1",
        master_port=0,  # any free port
        hosts=(socket.gethostname(),),
        job_id=env.get("SLURM_JOB_ID"),
    )


def master_address(place: LaunchEnvironment) -> str:
    """MASTER_ADDR, as long as it is a machine's; the loopback where it is this machine's own name, unknown to DNS, and
    all ranks are here."""
    try:
        socket.getaddrinfo(place.master_addr, place.master_port)
    except socket.gaierror as error:
        if place.local_world_size == place.world_size:
            return "127.0.0.1"
        raise UserError(
            f"MASTER_ADDR is {place.master_addr}, which {socket.gethostname()} cannot resolve ({error.strerror}): give "
            "the name or address of rank 0's machine"
        ) from None
    return place.master_addr


def _refuse_mpi(env: Mapping[str, str], names: Sequence[str]) -> None:
    """Several processes of mpirun would each train alone, in one run directory."""
    for name in names:
        if env.get(name, "1") != "1":
            raise UserError(
                f"this process is one of {env[name]} that mpirun started ({name}={env[name]}), which cannot tell the "
                "ranks where to meet. Start them with `meditron-train train --processes N ...`, torchrun or srun, or "
                "export RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each"
            )


def slurm_tools() -> dict[str, str | None]:
    """Slurm's commands and where they are on PATH (None: not found)."""
    return {name: shutil.which(name) for name in ("sbatch", "srun", "sinfo")}


def _torchrun(env: Mapping[str, str]) -> LaunchEnvironment:
    wanted = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in wanted if name not in env]
    if missing:
        found = ", ".join(f"{name}={env[name]}" for name in wanted if name in env)
        raise UserError(
            f"the environment is half of torchrun's: {found} but no {', '.join(missing)}; "
            "start with `torchrun --nproc-per-node N -m meditron_train train ...`, or unset them to run alone"
        )
    rank, world_size, local_rank = (_integer(env, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    local_world_size = _integer(env, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in env else world_size
    _check_rank(rank, world_size, "RANK", "WORLD_SIZE")
    _check_rank(local_rank, local_world_size, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return LaunchEnvironment(
        kind="torchrun",
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        master_addr=env["MASTER_ADDR"],
        master_port=_integer(env, "MASTER_PORT"),
        hosts=(socket.gethostname(),),
        job_id=env.get("SLURM_JOB_ID"),
    )


def _started_by_srun(env: Mapping[str, str]) -> bool:
    """True for a task of a job step. `srun --pty` gives a person a shell, whose programs are not tasks; an
    srun inside that shell inherits SLURM_PTY_PORT but gives its tasks no terminal."""
    is_task = all(name in env for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"))
    return is_task and not ("SLURM_PTY_PORT" in env and _has_terminal())


def _has_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _slurm(env: Mapping[str, str]) -> LaunchEnvironment:
    rank, local_rank = _integer(env, "SLURM_PROCID"), _integer(env, "SLURM_LOCALID")
    world_size = _integer(env, "SLURM_STEP_NUM_TASKS")  # of this step; SLURM_NTASKS may be the allocation's
    _check_rank(rank, world_size, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    node_list = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or socket.gethostname()
    hosts = expand_node_list(node_list)
    tasks_per_node = _expand_tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node_number = _integer(env, "SLURM_NODEID") if "SLURM_NODEID" in env else 0
    # Without the list, the ranks divide evenly, as srun's default distribution does.
    local_world_size = (
        tasks_per_node[node_number] if node_number < len(tasks_per_node) else -(-world_size // len(hosts))
    )
    job_number = _integer(env, "SLURM_JOB_ID") if "SLURM_JOB_ID" in env else 0
    step_number = _integer(env, "SLURM_STEP_ID") if "SLURM_STEP_ID" in env else 0
    return LaunchEnvironment(
        kind="slurm",
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        # Rank 0 lives on the step's first host; a port from the job's number keeps jobs on one host apart.
        master_addr=env.get("MASTER_ADDR", hosts[0] if len(hosts) > 1 else "127.0.0.1"),
        master_port=(
            _integer(env, "MASTER_PORT")
            if "MASTER_PORT" in env
            else _FIRST_PORT + (job_number * 7 + step_number) % _NUM_PORTS
        ),
        hosts=hosts,
        job_id=env.get("SLURM_JOB_ID"),
    )


def expand_node_list(node_list: str) -> tuple[str, ...]:
    """Host names of Slurm's short form: "gpu[08-10,12],login" -> gpu08 gpu09 gpu10 gpu12 login.

    Raises:
        UserError: the list is empty or cannot be read.
    """
    if node_list.count("[") != node_list.count("]"):
        raise UserError(f"cannot read Slurm's node list {node_list!r}: its brackets do not match")
    hosts: list[str] = []
    for entry in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", node_list):
        pieces = [
            _expand_range(piece[1:-1]) if piece.startswith("[") else [piece]
            for piece in re.findall(r"\[[^\]]*\]|[^\[]+", entry)
        ]
        hosts += ["".join(combination) for combination in itertools.product(*pieces)]
    if not hosts:
        raise UserError("Slurm's node list is empty")
    return tuple(hosts)


def _expand_range(text: str) -> list[str]:
    numbers: list[str] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UserError(f"cannot read {text!r} in Slurm's node list: expected numbers such as 1-3,5")
        width = len(first)
        numbers += [str(n).zfill(width) for n in range(int(first), int(last or first) + 1)]
    return numbers


def _expand_tasks_per_node(text: str) -> list[int]:
    """Tasks on each node of Slurm's short form: "4(x2),3" -> 4 4 3."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


def _integer(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise UserError(f"the environment variable {name} is {env[name]!r}; expected an integer") from None


def _check_rank(rank: int, world_size: int, rank_name: str, size_name: str) -> None:
    if not 0 <= rank < world_size:
        raise UserError(
            f"{rank_name} is {rank} and {size_name} is {world_size}: ranks go from 0 to {size_name} - 1"
        )
