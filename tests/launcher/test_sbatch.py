"""The batch script of a run, and what is done with it."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from meditron_train.errors import MeditronError, UserError
from meditron_train.launcher import sbatch
from meditron_train.launcher.sbatch import (
    Job,
    batch_script,
    cluster_environment,
    cluster_options,
    submit,
    submit_commands,
    time_limit_s,
)
from tests.refusal import refused

JOB = Job(
    name="tiny",
    config=Path("configs/tiny.yaml"),
    overrides=("train.steps=10", "data.special_tokens=[a b]"),
    num_nodes=2,
    gpus_per_node=8,
    ranks_per_node=8,
    time_limit="12:00:00",
)


def script(**changes) -> str:
    return batch_script(replace(JOB, **changes), directory=Path("/runs"), launch_dir=Path("/repo/launch"))


def options(text: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    return dict(line.partition("=")[::2] for line in lines)


def test_the_script_says_what_was_asked_for():
    text = script(options=(("partition", "gpu"), ("account", "medical")))
    assert options(text) == {
        "job-name": "tiny",
        "partition": "gpu",
        "account": "medical",
        "nodes": "2",
        "ntasks-per-node": "1",
        "gpus-per-node": "8",
        "exclusive": "",
        "mem": "0",
        "time": "12:00:00",
        "signal": "B:USR1@300",
        "requeue": "",
        "dependency": "singleton",
        "open-mode": "append",
        "chdir": "/runs",
        "output": "logs/%x-%j.out",
    }
    assert text.endswith(
        "exec /repo/launch/train.sbatch configs/tiny.yaml train.steps=10 'data.special_tokens=[a b]'\n"
    )


def test_the_option_to_go_back_reaches_the_batch_script():
    assert script(overrides=(), from_step=100).endswith("train.sbatch configs/tiny.yaml --from-step 100\n")


def test_bash_reads_the_script_as_it_is_meant(tmp_path):
    (tmp_path / "train.sbatch").write_text('#!/bin/sh\nprintf "%s|" "$@" "$TRAIN_NODES" "$NPROC_PER_NODE"\n')
    (tmp_path / "train.sbatch").chmod(0o755)
    job = replace(JOB, overrides=("a.b=it's", "c.d=$HOME"))
    text = batch_script(job, directory=tmp_path, launch_dir=tmp_path)
    done = subprocess.run(["bash"], input=text, capture_output=True, text=True)
    assert done.stdout == "configs/tiny.yaml|a.b=it's|c.d=$HOME|2|8|"


def test_spare_nodes_are_allocated_and_not_trained_on():
    text = script(num_spare_nodes=1)
    assert options(text)["nodes"] == "3" and "TRAIN_NODES=2" in text


def test_values_with_spaces_stay_one_value():
    text = batch_script(JOB, directory=Path("/my runs/a"), launch_dir=Path("/repo/launch"))
    assert "#SBATCH --chdir='/my runs/a'\n" in text


@pytest.mark.parametrize(
    ("changes", "directory", "said"),
    [
        ({"options": (("partition", "gpu\ntouch x\n#"),)}, "/home/me", "the sbatch option partition"),
        ({"options": (("account", "a\r#SBATCH --qos=other"),)}, "/home/me", "the sbatch option account"),
        ({"overrides": ("logging.run_dir=a\x1bb",)}, "/home/me", "the command line"),
        ({"name": "a\u2028b"}, "/home/me", "the sbatch option job-name"),
        ({}, "/home/me\ntouch x", "chdir"),
    ],
)
def test_control_characters_are_refused(changes, directory, said):
    """What follows a line break would be a command, or an option of the job."""
    with refused(said, "control character"):
        batch_script(replace(JOB, **changes), directory=Path(directory), launch_dir=Path("/repo/launch"))


def test_a_cluster_env_that_fails_is_named(tmp_path, monkeypatch):
    (tmp_path / "cluster.env").write_text("exit 3\n")
    monkeypatch.delenv("CLUSTER_ENV", raising=False)
    with refused(f"{tmp_path}/cluster.env", "exit code 3"):
        cluster_environment(tmp_path)


def test_nodes_without_gpus_ask_for_none():
    assert "gpus-per-node" not in options(script(gpus_per_node=0, ranks_per_node=4))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 1800), ("1:30", 90), ("2:00:00", 7200), ("1-0", 86400), ("1-2:30", 95400), ("1-2:30:10", 95410)],
)
def test_time_limits(text, seconds):
    assert time_limit_s(text) == seconds


@pytest.mark.parametrize("text", ["", "1h", "1-", "1:2:3:4", "-1"])
def test_a_wrong_time_limit(text):
    with pytest.raises(UserError, match="--time"):
        time_limit_s(text)


def test_a_time_limit_without_time_to_save():
    with pytest.raises(UserError, match="--save-time"):
        script(time_limit="5")


def test_a_chain_is_submitted_in_order_and_knows_what_follows(tmp_path, monkeypatch):
    programs = tmp_path / "bin"
    programs.mkdir()
    fake = programs / "sbatch"
    fake.write_text(f'#!/bin/sh\necho "$CHAINED-$CHAIN_REST" >>{tmp_path}/calls\nwc -l <{tmp_path}/calls\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    assert submit(replace(JOB, chain=3), Path("x.sbatch")) == ["1", "2", "3"]
    assert (tmp_path / "calls").read_text().split() == ["-2", "yes-1", "yes-0"]
    assert len(submit_commands(replace(JOB, chain=3), Path("x.sbatch"))) == 3


def test_what_slurm_says_is_told(tmp_path, monkeypatch):
    fake = tmp_path / "sbatch"
    fake.write_text("#!/bin/sh\necho 'invalid partition specified: gpo' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(MeditronError, match="invalid partition specified: gpo"):
        submit(JOB, Path("x.sbatch"))


def test_no_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no sbatch here"):
        submit(JOB, Path("x.sbatch"))


def test_the_clusters_own_options(tmp_path, monkeypatch):
    for name in ("CLUSTER_ENV", "SBATCH_PARTITION", "SBATCH_ACCOUNT"):
        monkeypatch.delenv(name, raising=False)
    assert cluster_options(cluster_environment(tmp_path)) == {}
    (tmp_path / "cluster.env").write_text(
        "#export SBATCH_PARTITION=old\nexport SBATCH_PARTITION=gpu # ours\nexport SBATCH_ACCOUNT='my project'\nVENV=x\n"
    )
    assert cluster_options(cluster_environment(tmp_path)) == {"partition": "gpu", "account": "my project"}


def test_the_clusters_variables_are_what_they_are_in_the_job(tmp_path, monkeypatch):
    monkeypatch.setenv("MODELS", "/mine")
    monkeypatch.setenv("DATA", "/mine")
    monkeypatch.setenv("CLUSTER_ENV", str(tmp_path / "our.env"))
    (tmp_path / "our.env").write_text(
        "echo hello\nROOT=/scratch\nexport MODELS=$ROOT/models DATA=${DATA:-$ROOT/data}\nfalse\n"
    )
    found = cluster_environment(tmp_path)
    assert (found["MODELS"], found["DATA"]) == ("/scratch/models", "/mine") and "ROOT" not in found
    monkeypatch.setenv("CLUSTER_ENV", str(tmp_path / "none.env"))
    with pytest.raises(UserError, match="CLUSTER_ENV is .*none.env"):
        cluster_environment(tmp_path)


def test_the_options_of_the_script_win_over_slurms_variables(tmp_path, monkeypatch):
    fake = tmp_path / "sbatch"
    fake.write_text(f'#!/bin/sh\necho "${{SBATCH_PARTITION-unset}}" >{tmp_path}/seen\necho 1\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SBATCH_PARTITION", "slow")
    submit(replace(JOB, options=(("partition", "fast"),)), Path("x.sbatch"))
    assert (tmp_path / "seen").read_text() == "unset\n"


def test_the_launch_scripts_are_found_here_or_beside_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (sbatch.find_launch_dir() / "node.sh").is_file()
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "train.sbatch").touch()
    assert sbatch.find_launch_dir() == tmp_path / "launch"
