"""The batch scripts without Slurm: shellcheck, and what they refuse."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed import free_port

REPOSITORY = Path(__file__).parents[2]
LAUNCH = REPOSITORY / "launch"
SHELLCHECK = Path(sys.executable).with_name("shellcheck")  # a dependency of development, as pytest is
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


def test_shellcheck():
    words = [str(SHELLCHECK), "-x", *(str(path) for path in SCRIPTS)]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_they_are_programs():
    assert {path.name for path in SCRIPTS} >= {
        *("train.sbatch", "convert.sbatch", "evaluate.sbatch"),
        *("node.sh", "local.sh"),
    }
    for path in SCRIPTS:
        assert os.access(path, os.X_OK) == (path.name != "common.sh"), (
            path
        )  # common.sh is only read by others


def test_they_name_no_cluster():
    for path in [*SCRIPTS, LAUNCH / "cluster.env.example"]:
        active = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
        assert not re.search(r"/(scratch|home|mnt|lustre|gpfs)\b", "\n".join(active)), path


def test_the_example_sets_nothing():
    """Every line is a comment: a copy that nobody has edited changes nothing. With the marks gone it is still bash."""
    text = (LAUNCH / "cluster.env.example").read_text()
    assert all(not line.strip() or line.startswith("#") for line in text.splitlines())
    settings = [line[1:] for line in text.splitlines() if re.match(r"#(export )?[A-Z_0-9]+=", line)]
    assert len(settings) > 15
    assert subprocess.run(["bash", "-n"], input="\n".join(settings), text=True).returncode == 0


@pytest.mark.parametrize("script", ["train.sbatch", "convert.sbatch", "evaluate.sbatch"])
def test_without_slurm_they_say_what_to_do(script, tmp_path):
    done = subprocess.run(
        [LAUNCH / script, "x.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"]},
    )
    assert done.returncode == 2 and "this is a batch script: sbatch" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_copy_in_the_spool_of_slurm_finds_the_repository(tmp_path):
    """sbatch runs a copy of the script: its own directory says nothing."""
    shutil.copy(LAUNCH / "train.sbatch", tmp_path / "slurm_script")
    environment = {
        "PATH": os.environ["PATH"],
        "SLURM_JOB_ID": "1",
        "SLURM_SUBMIT_DIR": str(tmp_path / "elsewhere"),
    }
    done = subprocess.run(
        [tmp_path / "slurm_script", "x.yaml"], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2 and "start sbatch from the repository" in done.stderr
    environment["SLURM_SUBMIT_DIR"] = str(REPOSITORY)
    done = subprocess.run(
        [tmp_path / "slurm_script"], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2 and "a configuration is missing" in done.stderr


def test_a_container_without_an_image_is_refused(tmp_path):
    (tmp_path / "cluster.env").write_text("CONTAINER=pyxis\n")
    environment = {
        "PATH": os.environ["PATH"],
        "SLURM_JOB_ID": "1",
        "CLUSTER_ENV": str(tmp_path / "cluster.env"),
    }
    done = subprocess.run(
        [LAUNCH / "convert.sbatch", "verify"], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode != 0 and "needs CONTAINER_IMAGE" in done.stderr


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("", ["--nodelist=n1", "node.sh"]),
        ("CONTAINER=pyxis CONTAINER_IMAGE=some/image", ["--container-image=some/image", "node.sh"]),
        ("CONTAINER=apptainer CONTAINER_IMAGE=x.sif", ["apptainer", "exec", "--nv", "x.sif", "node.sh"]),
    ],
)
def test_what_stands_between_srun_and_the_program(tmp_path, settings, words):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {
        "srun": '#!/bin/sh\nprintf "%s\\n" "$@"\nexit 7\n',
        "scontrol": "#!/bin/sh\necho n1\n",
    }.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / "cluster.env").write_text("\n".join(settings.split()) + "\n")
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "n1",
        "CLUSTER_ENV": str(tmp_path / "cluster.env"),
    }
    done = subprocess.run(
        [LAUNCH / "convert.sbatch", "verify", "a b"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 7, done.stderr  # srun's own exit code comes through
    given = [Path(word).name if word.endswith("node.sh") else word for word in done.stdout.splitlines()]
    assert [word for word in given if word in words] == words
    assert given[-3:] == ["convert", "verify", "a b"]


def test_an_evaluation_is_one_torchrun_on_each_node(tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    launch = tmp_path / "launch"
    shutil.copytree(LAUNCH, launch)
    # srun starts what comes after its options, as on one of the nodes; torchrun shows its words.
    srun = (
        '#!/usr/bin/env bash\necho "srun $*"\nwhile [[ "$1" == -* ]]; do shift; done\n'
        'SLURM_STEP_NUM_NODES=2 "$@"\n'
    )
    for name, text in {
        "srun": srun,
        "scontrol": "#!/bin/sh\nprintf 'n1\\nn2\\n'\n",
        "torchrun": '#!/bin/sh\nprintf "%s\\n" "$@"\nexit 3\n',
    }.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    done = subprocess.run(
        [launch / "evaluate.sbatch", "my model", "parallel.tensor=4", "--tasks", "medqa4"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={
            "PATH": f"{programs}:/usr/bin:/bin",
            "SLURM_JOB_ID": "11",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "NPROC_PER_NODE": "4",
        },
    )
    assert done.returncode == 3, done.stderr  # torchrun's own exit code comes through
    first, *given = done.stdout.splitlines()
    assert "--nodes=2" in first and "--nodelist=n1,n2" in first
    assert given[:4] == ["--nnodes", "2", "--nproc-per-node", "4"]
    assert given[given.index("--rdzv-endpoint") + 1] == "n1:20077"
    words = ["--module", "meditron_train", "evaluate", "my model", "parallel.tensor=4", "--tasks", "medqa4"]
    assert given[-len(words) :] == words
    refused = subprocess.run(
        [launch / "evaluate.sbatch"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "SLURM_JOB_ID": "11"},
    )
    assert refused.returncode == 2 and "a model is missing" in refused.stderr


def run_node(directory: Path, what: str, program: str, settings: str = "", **environment: str) -> str:
    """What `program`, started by launch/node.sh, sees of its environment."""
    programs = directory / "bin"
    programs.mkdir(parents=True)
    (programs / program).write_text("#!/bin/sh\nenv\n")
    (programs / program).chmod(0o755)
    (directory / "cluster.env").write_text(settings)
    launch = directory / "launch"
    shutil.copytree(LAUNCH, launch)
    (directory / ".venv" / "bin").mkdir(parents=True)
    (directory / ".venv" / "bin" / "activate").write_text("export ACTIVATED=yes\n")
    done = subprocess.run(
        [launch / "node.sh", what, "x.yaml"],
        capture_output=True,
        text=True,
        env={
            "PATH": f"{programs}:/usr/bin:/bin",
            "LAUNCH_DIR": str(launch),
            "LOG_DIR": str(directory),
            "CLUSTER_ENV": str(directory / "cluster.env"),
            "SLURM_STEP_NUM_NODES": "1",
            **dict.fromkeys(("MASTER_ADDR", "MASTER_PORT", "RENDEZVOUS_ID"), "1"),
            **environment,
        },
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_ranks_of_the_job_win_over_those_of_the_cluster(tmp_path):
    settings = "NPROC_PER_NODE=4\n"
    assert "NPROC_PER_NODE=4\n" in run_node(tmp_path / "a", "train", "torchrun", settings)
    own = run_node(tmp_path / "b", "train", "torchrun", settings, NPROC_PER_NODE="8")
    assert "NPROC_PER_NODE=8\n" in own
    assert "NPROC_PER_NODE=1\n" in run_node(tmp_path / "c", "train", "torchrun")


def test_the_batch_script_hands_on_the_ranks_of_the_job(tmp_path):
    (tmp_path / "cluster.env").write_text("NPROC_PER_NODE=4\n")
    words = f"LAUNCH_DIR={LAUNCH}; source {LAUNCH}/common.sh; env"
    environment = {
        "PATH": os.environ["PATH"],
        "SLURM_JOB_ID": "1",
        "CLUSTER_ENV": str(tmp_path / "cluster.env"),
        "NPROC_PER_NODE": "8",
    }
    done = subprocess.run(
        ["bash", "-c", words], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert "NPROC_PER_NODE=8\n" in done.stdout


def test_the_hosts_environment_is_not_used_in_a_container(tmp_path):
    assert "ACTIVATED=yes" in run_node(tmp_path / "a", "train", "torchrun")
    for kind in ("apptainer", "pyxis"):
        assert "ACTIVATED" not in run_node(tmp_path / kind, "train", "torchrun", f"CONTAINER={kind}\n")


SAVES_FOR_THREE_SECONDS = f"""#!{sys.executable}
import os, pathlib, signal, sys, time

def save(*_):
    time.sleep(3)
    pathlib.Path("saved").touch()
    sys.exit(0)

signal.signal(signal.SIGTERM, save)
pathlib.Path("pid.tmp").write_text(str(os.getpid()))
os.rename("pid.tmp", "pid")
time.sleep(100)
"""


@pytest.mark.long
def test_torchrun_leaves_its_ranks_the_time_that_slurm_gives(tmp_path):
    """Slurm's TERM reaches torchrun too, which would kill a rank that saves for longer than its own patience."""
    rank = tmp_path / "rank.py"
    rank.write_text(SAVES_FOR_THREE_SECONDS)
    rank.chmod(0o755)
    launch = tmp_path / "launch"
    shutil.copytree(LAUNCH, launch)
    script = (LAUNCH / "node.sh").read_text()
    assert '"$LAUNCH_DIR/node.sh" rank' in script
    (launch / "node.sh").write_text(script.replace('"$LAUNCH_DIR/node.sh" rank', str(rank)))
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "LAUNCH_DIR": str(launch),
        "LOG_DIR": str(tmp_path),
        "NPROC_PER_NODE": "1",
        "SLURM_STEP_NUM_NODES": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "RENDEZVOUS_ID": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1",
    }
    process = subprocess.Popen([launch / "node.sh", "train"], cwd=tmp_path, env=environment)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "pid").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        for pid in (process.pid, int((tmp_path / "pid").read_text())):
            os.kill(pid, signal.SIGTERM)
        assert process.wait(60) == 0 and (tmp_path / "saved").exists()
    finally:
        process.kill()
