"""The batch scripts without Slurm: shellcheck, and what they refuse."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
LAUNCH = REPOSITORY / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    words = ["shellcheck", "-x", *(str(path) for path in SCRIPTS)]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_they_are_programs():
    assert {path.name for path in SCRIPTS} >= {"train.sbatch", "convert.sbatch", "node.sh", "local.sh"}
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


@pytest.mark.parametrize("script", ["train.sbatch", "convert.sbatch"])
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
