"""launch/local.sh starts the right command; meditron-train, nvidia-smi and nproc are stand-ins on PATH."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "local.sh"
PROGRAM = """#!/bin/sh
printf '%s\\n' "$@"
echo "OMP_NUM_THREADS=$OMP_NUM_THREADS"
echo "CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS-unset}"
exit 7
"""


@pytest.fixture
def local_sh(tmp_path):
    """local_sh(*words, gpus=…, cores=…, **environment) → the finished process.

    gpus=None: there is no nvidia-smi; 0: it finds no driver.
    """
    system = [name for name in ("bash", "sh", "sed", "tr", "awk", "dirname", "getconf") if shutil.which(name)]

    def run(
        *words: str, gpus: int | None = None, cores: int = 16, installed: bool = True, **environment: str
    ):
        programs = tmp_path / "bin"
        programs.mkdir()
        for name in system:
            (programs / name).symlink_to(shutil.which(name))
        fakes = {"nproc": f"#!/bin/sh\necho ${{OMP_NUM_THREADS-{cores}}}\n"}
        if installed:
            fakes["meditron-train"] = PROGRAM
        if gpus is not None:
            lines = "".join(
                f"GPU {i}: NVIDIA H200 (UUID: GPU-{i})\n  MIG 1g.18gb Device 0\n" for i in range(gpus)
            )
            fakes["nvidia-smi"] = f"#!/bin/sh\nprintf '%s' '{lines}'\nexit {0 if gpus else 9}\n"
        for name, text in fakes.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        script = SCRIPT
        if not installed:  # away from the repository, whose .venv has one
            script = tmp_path / "launch" / "local.sh"
            script.parent.mkdir()
            shutil.copy(SCRIPT, script)
        return subprocess.run(
            [script, *words], env={"PATH": str(programs), **environment}, capture_output=True, text=True
        )

    return run


def started(process) -> tuple[int, list[str], dict[str, str]]:
    """(processes, further words, environment) that `meditron-train train` was given."""
    assert process.returncode == 7, process.stderr  # its exit code comes through
    lines = process.stdout.splitlines()
    verb, option, number, *rest = lines[:-2]
    assert (verb, option) == ("train", "--processes")
    return int(number), rest, dict(line.split("=") for line in lines[-2:])


def test_without_gpus_one_process_has_all_cores(local_sh):
    number, words, environment = started(local_sh("a b.yaml", "train.steps=3", "data.special_tokens=[x, y]"))
    assert number == 1
    assert words == ["a b.yaml", "train.steps=3", "data.special_tokens=[x, y]"]
    assert environment == {"OMP_NUM_THREADS": "16", "CUDA_DEVICE_MAX_CONNECTIONS": "unset"}


@pytest.mark.parametrize(
    ("gpus", "environment", "number", "threads"),
    [
        (4, {}, 4, 4),
        (1, {}, 1, 8),  # a GPU's process does not need 16 threads
        (8, {"CUDA_VISIBLE_DEVICES": "2,5"}, 2, 8),
        (8, {"CUDA_VISIBLE_DEVICES": "GPU-3"}, 1, 8),
        (8, {"CUDA_VISIBLE_DEVICES": "0,1,-1,2"}, 2, 8),
        (8, {"NPROC": "3"}, 3, 5),
    ],
)
def test_one_process_per_visible_gpu(local_sh, gpus, environment, number, threads):
    got, _, variables = started(local_sh("c.yaml", gpus=gpus, **environment))
    assert got == number
    assert variables == {"OMP_NUM_THREADS": str(threads), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}


@pytest.mark.parametrize(
    ("gpus", "environment"),
    [
        (0, {}),
        (8, {"CUDA_VISIBLE_DEVICES": ""}),
        (8, {"CUDA_VISIBLE_DEVICES": "-1"}),
        (None, {"CUDA_VISIBLE_DEVICES": "0,1"}),
    ],
)
def test_gpus_that_cannot_be_seen_do_not_count(local_sh, gpus, environment):
    number, _, variables = started(local_sh("c.yaml", gpus=gpus, **environment))
    assert number == 1 and variables["CUDA_DEVICE_MAX_CONNECTIONS"] == "unset"


def test_processes_on_a_cpu_share_the_cores(local_sh):
    number, _, variables = started(local_sh("c.yaml", NPROC="3"))
    assert number == 3 and variables["OMP_NUM_THREADS"] == "5"


def test_more_processes_than_cores(local_sh):
    _, _, variables = started(local_sh("c.yaml", cores=2, NPROC="4"))
    assert variables["OMP_NUM_THREADS"] == "1"


def test_what_the_user_has_set_is_kept(local_sh):
    process = local_sh("c.yaml", gpus=2, OMP_NUM_THREADS="3", CUDA_DEVICE_MAX_CONNECTIONS="8")
    assert started(process)[2] == {"OMP_NUM_THREADS": "3", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}


@pytest.mark.parametrize("number", ["0", "two", "-1", "1.5"])
def test_a_wrong_number_of_processes(local_sh, number):
    process = local_sh("c.yaml", NPROC=number)
    assert process.returncode == 2 and f"NPROC is '{number}'" in process.stderr and not process.stdout


def test_more_processes_than_gpus(local_sh):
    process = local_sh("c.yaml", gpus=2, NPROC="3")
    assert process.returncode == 2 and "at most one process per GPU" in process.stderr


def test_nothing_installed(local_sh):
    process = local_sh("c.yaml", installed=False)
    assert process.returncode == 2 and "there is no meditron-train" in process.stderr


def test_usage(local_sh):
    process = local_sh()
    assert process.returncode == 2 and "launch/local.sh CONFIG.yaml" in process.stderr
    assert os.access(SCRIPT, os.X_OK)


def test_help(local_sh):
    process = local_sh("--help")
    assert process.returncode == 0 and "NPROC sets the number of processes" in process.stdout
