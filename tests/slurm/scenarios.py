"""What happens to runs on a cluster. Each scenario starts a run, hits it, and returns when it should have recovered.

Used by the tests (the short form) and by the campaign (all of them, tests/faults/campaign.py). A scenario returns a
problem, or "" when the promise was kept as far as it can see; losses and steps are judged by the caller.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.slurm.cluster import run, wait_for
from tests.slurm.run import SlurmRun


@dataclass(frozen=True)
class Scenario:
    name: str
    promise: str
    act: Callable[[SlurmRun, random.Random], str]
    short: bool = False
    config: tuple[tuple[str, dict], ...] = ()
    """Sections of the configuration that differ."""
    tolerance: float = 0.0
    """Relative difference of losses that is allowed: 0 in the same layout."""
    intervals: int = 0
    """Checkpoint intervals that may be lost."""
    starts: int = 2
    """How often the run has started at its end."""


def _expect(job: SlurmRun, state: str = "COMPLETED", said: str = "", timeout_s: float = 900) -> str:
    got = job.wait_for_end(timeout_s)
    if got != state:
        return f"the job ended {got}, not {state}"
    return "" if job.said(said) else f"the job's log does not say {said!r}"


def _expect_without(job: SlurmRun, node: str) -> str:
    """The job gets to its end on other nodes than `node`."""
    return _expect(job) or (f"it ended with {node} again" if node in job.nodes() else "")


def _a_step(dice: random.Random) -> int:
    return dice.randrange(15, 90)


def undisturbed(job: SlurmRun, dice: random.Random) -> str:
    job.submit()
    return _expect(job, said="done")


# From step 100 on a step takes a second: there is time for the time limit, and the losses are the same.
SLOW_END = {"MEDITRON_INJECT": "slow@100:rank=1"}


def _reach_the_time_limit(job: SlurmRun) -> None:
    """Bring Slurm's time limit close when the run is at step 100, wait for its warning, and put it back."""
    job.wait_for_step(100)
    hours, minutes, _ = job.cluster.job(job.job_id)["RunTime"].split(":")
    run("scontrol", "update", f"JobId={job.job_id}", f"TimeLimit={int(hours) * 60 + int(minutes) + 2}")
    wait_for("the warning", lambda: job.said("the time limit is near"), 120, 0.1)
    job.fault()
    run("scontrol", "update", f"JobId={job.job_id}", "TimeLimit=20")


def time_limit(job: SlurmRun, dice: random.Random) -> str:
    job.sbatch("--signal=B:USR1@120", environment=SLOW_END)
    _reach_the_time_limit(job)
    return _expect(job, said="stopped by the time limit: back to the queue")


def preemption(job: SlurmRun, dice: random.Random) -> str:
    job.sbatch()
    job.wait_for_step(_a_step(dice))
    job.fault()
    run(
        "sbatch",
        "--partition=urgent",
        "--nodes=4",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=sleep 3",
        cwd=job.directory,
    )
    return _expect(job)


def scancel(job: SlurmRun, dice: random.Random) -> str:
    job.sbatch()
    job.wait_for_step(_a_step(dice))
    job.fault()
    run("scancel", job.job_id)
    state = job.wait_for_end()
    if state != "CANCELLED":
        return f"the job ended {state}, not CANCELLED"
    wait_for("its nodes are free", lambda: len(job.cluster.idle_nodes()) == 4, 60)
    job.sbatch()  # what a person does who wants to go on
    return _expect(job)


def stop_file(job: SlurmRun, dice: random.Random) -> str:
    job.sbatch()
    job.wait_for_step(_a_step(dice))
    job.fault()
    (job.watch.run_dir / "stop").touch()
    problem = _expect(job, said="stopped as asked")
    job.sbatch()
    return problem or _expect(job)


def kill_rank(job: SlurmRun, dice: random.Random) -> str:
    job.sbatch()
    job.wait_for_step(_a_step(dice))
    ranks = job.cluster.ranks(dice.choice(job.nodes()))
    job.fault()
    job.cluster.kill(ranks)
    return _expect(job, said="the ranks ended with exit code")


def kill_agent(job: SlurmRun, dice: random.Random) -> str:
    job.sbatch()
    job.wait_for_step(_a_step(dice))
    agents = job.cluster.agents(dice.choice(job.nodes()))
    job.fault()
    job.cluster.kill(agents)
    return _expect(job)


def kill_slurmd(job: SlurmRun, dice: random.Random) -> str:
    job.sbatch()
    job.wait_for_step(_a_step(dice))
    node = job.nodes()[1]
    job.fault()
    job.cluster.kill([job.cluster.slurmd_pid(node)])
    return _expect(job)  # the step's own daemon lives on


def lose_node(job: SlurmRun, dice: random.Random) -> str:
    job.sbatch()
    job.wait_for_step(_a_step(dice))
    node = job.nodes()[1]
    job.fault()
    job.cluster.lose_node(node)
    return _expect_without(job, node)


def lose_head(job: SlurmRun, dice: random.Random) -> str:
    job.sbatch()
    job.wait_for_step(_a_step(dice))
    node = job.nodes()[0]
    job.fault()
    job.cluster.lose_node(node)
    return _expect_without(job, node)


def stop_rank(job: SlurmRun, dice: random.Random) -> str:
    """SIGSTOP: the process lives and does nothing, as one whose GPU or file system hangs."""
    job.sbatch()
    job.wait_for_step(_a_step(dice))
    ranks = job.cluster.ranks(dice.choice(job.nodes()))
    job.fault()
    job.cluster.kill(ranks, signal.SIGSTOP)
    return _expect(job, said="reworded" if job.reworded else "hang in .* gives no sign of life")


def cut_briefly(job: SlurmRun, dice: random.Random) -> str:
    job.sbatch()
    job.wait_for_step(_a_step(dice))
    node = job.nodes()[1]
    job.fault()
    job.cluster.set_link(node, up=False)
    time.sleep(5)
    job.cluster.set_link(node, up=True)
    return _expect(job)


def cut_for_ever(job: SlurmRun, dice: random.Random) -> str:
    job.sbatch()
    job.wait_for_step(_a_step(dice))
    node = job.nodes()[1]
    job.fault()
    job.cluster.set_link(node, up=False)
    return _expect_without(job, node)


def bad_node(job: SlurmRun, dice: random.Random) -> str:
    """One of three nodes has no shared memory: named before the training, which takes the other two."""
    node = "node1"
    job.cluster.in_node(node, "mount", "-o", "remount,size=1m", "/dev/shm")
    try:
        job.sbatch("--nodelist=node0,node1,node2", nodes=3, environment={"TRAIN_NODES": "2"})
        job.fault()
        return _expect(job, said=f"bad node: {node} 1 MiB of /dev/shm") or (
            "" if job.said("training on node0 node2") else "the training did not take the other nodes"
        )
    finally:
        job.cluster.in_node(node, "mount", "-o", "remount,size=50%", "/dev/shm")


def bad_node_without_spare(job: SlurmRun, dice: random.Random) -> str:
    """No spare: the job goes back to the queue, excludes the node, and gets another one."""
    node = "node0"
    job.cluster.in_node(node, "mount", "-o", "remount,size=1m", "/dev/shm")
    try:
        job.sbatch()
        job.fault()
        problem = _expect_without(job, node)
        return problem or ("" if job.said(f"bad node: {node} 1 MiB of /dev/shm") else f"{node} was not named")
    finally:
        job.cluster.in_node(node, "mount", "-o", "remount,size=50%", "/dev/shm")


def no_progress(job: SlurmRun, dice: random.Random) -> str:
    """A run that cannot start is not started for ever; the later jobs of a chain do not try again."""
    (job.watch.run_dir / "checkpoints").mkdir(parents=True)
    (job.watch.run_dir / "metrics.jsonl").mkdir()  # rank 0 cannot write its metrics
    job.sbatch()
    return _expect(job, "FAILED", said="giving up")


def chain(job: SlurmRun, dice: random.Random) -> str:
    """The second job waits for the first (singleton), which ends at its time limit instead of requeueing itself."""
    first = job.sbatch(
        "--signal=B:USR1@120", "--dependency=singleton", environment={"CHAIN_REST": "1", **SLOW_END}
    )
    _reach_the_time_limit(job)
    job.sbatch("--dependency=singleton", environment={"CHAINED": "yes", "CHAIN_REST": "0"})
    problem = _expect(job, said="the next job of the chain goes on")
    return problem or (
        "" if job.cluster.state(first) == "COMPLETED" else f"the first job ended {job.cluster.state(first)}"
    )


def _on_other_nodes(before: int, after: int) -> Callable[[SlurmRun, random.Random], str]:
    def act(job: SlurmRun, dice: random.Random) -> str:
        job.sbatch(nodes=before)
        job.wait_for_step(_a_step(dice))
        job.fault()
        run("scancel", job.job_id)
        job.wait_for_end()
        wait_for("its nodes are free", lambda: len(job.cluster.idle_nodes()) == 4, 60)
        job.sbatch(nodes=after)
        return _expect(job)

    return act


QUICK_WATCHDOG = (("resilience", {"hang_min_s": 8.0, "hang_other_s": 90.0}),)

SCENARIOS = (
    Scenario("time limit", "saved before it, requeued, no step lost", time_limit, short=True),
    Scenario(
        "preempted by a job of higher priority",
        "saved in the grace time, waits, goes on",
        preemption,
        short=True,
    ),
    Scenario("scancel, then submitted again", "saved within KillWait, goes on", scancel),
    Scenario("RUN_DIR/stop, then submitted again", "saved, job ends, goes on", stop_file),
    Scenario(
        "kill -9 of a rank",
        "all ranks end, start again on the same nodes",
        kill_rank,
        short=True,
        intervals=1,
    ),
    Scenario("kill -9 of a torchrun agent", "all ranks end, start again", kill_agent, intervals=1),
    Scenario("kill -9 of slurmd", "the run does not notice", kill_slurmd, starts=1),
    Scenario("a node loses power", "Slurm requeues on other nodes", lose_node, short=True, intervals=1),
    Scenario("the coordinator's node loses power", "Slurm requeues on other nodes", lose_head, intervals=1),
    Scenario(
        "SIGSTOP of a rank",
        "the watchdog names it and ends the run, it starts again",
        stop_rank,
        config=QUICK_WATCHDOG,
        intervals=1,
    ),
    Scenario("network cut for 5 s", "the run waits and goes on", cut_briefly, starts=1),
    Scenario("network cut for ever", "Slurm requeues on other nodes", cut_for_ever, intervals=1),
    Scenario("bad node, with a spare", "named by the pre-flight, left out", bad_node, short=True, starts=1),
    Scenario("time limit of a job in a chain", "saved, the next job goes on", chain),
    Scenario(
        "goes on with one node of two",
        "same samples, losses within 1e-5",
        _on_other_nodes(2, 1),
        tolerance=1e-5,
    ),
    Scenario(
        "goes on with four nodes of two",
        "same samples, losses within 1e-5",
        _on_other_nodes(2, 4),
        tolerance=1e-5,
    ),
    Scenario(
        "bad node, without a spare", "named, excluded, requeued on another", bad_node_without_spare, starts=1
    ),
)
