"""The short form of the fault campaign, and the ends of a job, on a real Slurm. `make test-slurm` runs it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.workload import RunWatch, Workload
from tests.slurm import scenarios
from tests.slurm.cluster import SlurmCluster, cannot_run, run, wait_for
from tests.slurm.run import SlurmRun, prepare

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

STEPS, INTERVAL = 150, 10


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    reason = cannot_run()
    if reason:
        pytest.skip(reason)
    with SlurmCluster(Path("/tmp/meditron-slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def workload(tmp_path_factory) -> Workload:
    return Workload.make(tmp_path_factory.mktemp("workload"))


@pytest.fixture
def start(cluster, workload, tmp_path):
    """start(**sections) → a SlurmRun that is not submitted yet; the cluster is whole before and after."""

    def make(*, reworded: bool = False, **sections) -> SlurmRun:
        directory = prepare(tmp_path)
        run_dir = tmp_path / "runs" / "tiny"
        sections = {"train": {"steps": STEPS}, "checkpoint": {"interval": INTERVAL}, **sections}
        config = workload.config(run_dir, **sections)
        return SlurmRun(cluster, directory, config, run_dir, INTERVAL, reworded=reworded)

    cluster.repair()
    yield make
    run("scancel", "-u", "root", check=False)


@pytest.fixture(scope="module")
def undisturbed(cluster, workload, tmp_path_factory) -> list[float]:
    """Losses of the run that nothing happens to; also the test that a run gets through at all."""
    directory = prepare(tmp_path_factory.mktemp("undisturbed"))
    run_dir = directory / "runs" / "tiny"
    config = workload.config(run_dir, train={"steps": STEPS}, checkpoint={"interval": INTERVAL})
    job = SlurmRun(cluster, directory, config, run_dir, INTERVAL)
    problem = scenarios.undisturbed(job, random.Random(0))
    assert not problem, f"{problem}\n{job.output()}"
    assert RunWatch(run_dir).steps() == list(range(1, STEPS + 1))
    logs = directory / "logs" / job.job_id
    assert {path.name for path in logs.glob("node*.log")} == {"node0-0.log", "node1-1.log"}
    return RunWatch(run_dir).losses()


@pytest.mark.parametrize(
    "scenario", [scenario for scenario in scenarios.SCENARIOS if scenario.short], ids=lambda s: s.name
)
def test_a_run_survives(scenario, start, undisturbed):
    job = start(**dict(scenario.config))
    problem = scenario.act(job, random.Random(scenario.name))
    outcome = job.outcome(scenario, undisturbed, problem)
    assert outcome.kept, f"{outcome}\n{job.output()[-8000:]}"


# Those whose end the batch script has to understand.
BY_CAUSE = (
    "time limit",
    "preempted by a job of higher priority",
    "RUN_DIR/stop, then submitted again",
    "kill -9 of a rank",
    "SIGSTOP of a rank",
)


@pytest.mark.parametrize(
    "scenario",
    [scenario for scenario in scenarios.SCENARIOS if scenario.name in BY_CAUSE],
    ids=lambda s: s.name,
)
def test_a_run_survives_whatever_the_messages_say(scenario, start, undisturbed):
    job = start(reworded=True, **dict(scenario.config))
    problem = scenario.act(job, random.Random(scenario.name))
    outcome = job.outcome(scenario, undisturbed, problem)
    assert outcome.kept, f"{outcome}\n{job.output()[-8000:]}"
    assert "reworded" in "".join(path.read_text() for path in job.directory.glob("logs/*/node*.log"))


@pytest.mark.parametrize("reworded", [False, True])
def test_a_mistake_that_only_the_ranks_find_ends_the_job_at_once(start, reworded):
    job = start(reworded=reworded, train={"attention": "flash_attn"})
    job.sbatch()
    assert job.wait_for_end() == "FAILED"
    assert job.cluster.job(job.job_id)["ExitCode"] == "2:0", job.output()
    assert "nothing is tried again" in job.output()


def test_a_run_without_progress_is_given_up(start):
    job = start()
    problem = scenarios.no_progress(job, random.Random(0))
    assert not problem, f"{problem}\n{job.output()[-8000:]}"


def test_a_job_that_is_cancelled_while_it_starts_stays_cancelled(start):
    job = start()
    job.sbatch()
    wait_for("the job has started", lambda: job.said("start 1 on"), 60)
    run("scancel", job.job_id)
    assert job.wait_for_end() == "CANCELLED"
    wait_for("its nodes are free", lambda: len(job.cluster.idle_nodes()) == 4, 60)
    assert job.cluster.state(job.job_id) == "CANCELLED" and not job.said("back to the queue")


def test_a_broken_installation_blames_no_node(start, tmp_path):
    job = start()
    job.sbatch(environment={"VENV": str(tmp_path / "nothing")})
    assert job.wait_for_end() == "FAILED"
    assert "the pre-flight failed on every node" in job.output() and "bad node" not in job.output()


def test_a_wrong_configuration_ends_the_job_at_once(start):
    job = start(parallel={"tensor": 3})
    job.sbatch()
    assert job.wait_for_end() == "FAILED"
    assert job.cluster.job(job.job_id)["ExitCode"] == "2:0"
    assert "world size 2 is not divisible" in job.output()
    assert "giving up" not in job.output()
