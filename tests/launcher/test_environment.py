from __future__ import annotations

import logging
import socket

import pytest

from meditron_train.errors import UserError
from meditron_train.launcher import environment
from meditron_train.launcher.environment import detect_launcher, expand_node_list, slurm_tools

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "gpu[08-09]",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
SRUN = {
    **BATCH_SCRIPT,
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[08-09]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}


@pytest.mark.parametrize(
    "variables",
    [
        {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"},
        {"PMI_SIZE": "2", "PMI_RANK": "0"},
        {"OMPI_COMM_WORLD_SIZE": "4", **SRUN},  # mpirun's own daemons are tasks of srun
    ],
)
def test_several_processes_of_mpirun_do_not_train_alone(variables):
    with pytest.raises(UserError, match="mpirun started .* train --processes N"):
        detect_launcher(variables)


@pytest.mark.parametrize(
    ("variables", "kind"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "1"}, "alone"),
        ({"OMPI_COMM_WORLD_SIZE": "8", **TORCHRUN}, "torchrun"),
        ({"PMI_SIZE": "8", **SRUN}, "slurm"),  # srun --mpi=pmi2
    ],
)
def test_what_mpi_leaves_beside_another_launcher_does_no_harm(variables, kind):
    assert detect_launcher(variables).kind == kind


def test_alone():
    found = detect_launcher({})
    assert (found.kind, found.rank, found.world_size, found.local_rank) == ("alone", 0, 1, 0)
    assert found.hosts == (socket.gethostname(),)


def test_reads_the_process_environment(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert detect_launcher().kind == "torchrun"


def test_torchrun():
    found = detect_launcher(TORCHRUN)
    assert (found.kind, found.rank, found.world_size) == ("torchrun", 5, 8)
    assert (found.local_rank, found.local_world_size) == (1, 4)
    assert (found.master_addr, found.master_port) == ("node0", 29500)


def test_torchrun_under_srun_is_torchrun():
    found = detect_launcher({**SRUN, **TORCHRUN})
    assert (found.kind, found.rank, found.job_id) == ("torchrun", 5, "4711")


def test_srun():
    found = detect_launcher(SRUN)
    assert (found.kind, found.rank, found.world_size) == ("slurm", 6, 8)
    assert (found.local_rank, found.local_world_size) == (2, 4)
    assert found.hosts == ("gpu08", "gpu09")
    assert found.master_addr == "gpu08"
    assert 20000 <= found.master_port < 32768
    assert found.job_id == "4711"


def test_all_tasks_of_a_step_agree_on_the_meeting_point_and_two_jobs_do_not():
    one, other = (detect_launcher({**SRUN, "SLURM_PROCID": rank}) for rank in ("0", "7"))
    assert (one.master_addr, one.master_port) == (other.master_addr, other.master_port)
    assert detect_launcher({**SRUN, "SLURM_JOB_ID": "4712"}).master_port != one.master_port
    assert detect_launcher({**SRUN, "SLURM_STEP_ID": "4"}).master_port != one.master_port


def test_the_step_counts_and_not_the_allocation():
    found = detect_launcher({**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"})
    assert (found.kind, found.world_size) == ("slurm", 1)


def test_uneven_nodes():
    found = detect_launcher({**SRUN, "SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "4,3"})
    assert found.local_world_size == 3


def test_plain_python_in_a_batch_script_runs_alone_and_says_so(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("meditron_train"), "propagate", True)
    found = detect_launcher(BATCH_SCRIPT)
    assert (found.kind, found.world_size, found.job_id) == ("alone", 1, "4711")
    assert "not started by srun" in caplog.text


@pytest.mark.parametrize(("terminal", "kind"), [(True, "alone"), (False, "slurm")])
def test_a_shell_from_srun_pty_runs_alone_and_an_srun_inside_it_does_not(monkeypatch, terminal, kind):
    monkeypatch.setattr(environment, "_has_terminal", lambda: terminal)
    assert detect_launcher({**SRUN, "SLURM_PTY_PORT": "40000"}).kind == kind


def test_given_master_wins():
    found = detect_launcher({**SRUN, "MASTER_ADDR": "elsewhere", "MASTER_PORT": "1234"})
    assert (found.master_addr, found.master_port) == ("elsewhere", 1234)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "no WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({**TORCHRUN, "RANK": "eight"}, "RANK is 'eight'; expected an integer"),
        ({**TORCHRUN, "RANK": "8"}, "RANK is 8 and WORLD_SIZE is 8"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "LOCAL_RANK is 4 and LOCAL_WORLD_SIZE is 4"),
        ({**SRUN, "SLURM_PROCID": "9"}, "SLURM_PROCID is 9 and SLURM_STEP_NUM_TASKS is 8"),
        ({**SRUN, "SLURM_STEP_NODELIST": "gpu[08-"}, "brackets do not match"),
    ],
)
def test_contradictions_are_refused(variables, message):
    with pytest.raises(UserError) as caught:
        detect_launcher(variables)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("short", "names"),
    [
        ("node1", "node1"),
        ("a,b,c", "a b c"),
        ("gpu[08-10,12],login", "gpu08 gpu09 gpu10 gpu12 login"),
        ("rack[1-2]-n[01-02]", "rack1-n01 rack1-n02 rack2-n01 rack2-n02"),
        ("n[9-11].cluster", "n9.cluster n10.cluster n11.cluster"),
    ],
)
def test_node_lists(short, names):
    assert expand_node_list(short) == tuple(names.split())


@pytest.mark.parametrize("bad", ["", "gpu[a-b]", "gpu[1-]"])
def test_bad_node_lists(bad):
    with pytest.raises(UserError):
        expand_node_list(bad)


def test_slurm_tools_looks_on_the_path(tmp_path, monkeypatch):
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm_tools() == {"sbatch": str(tmp_path / "sbatch"), "srun": None, "sinfo": None}
