"""The fault campaign: every fault, many times, each on a run of its own.

    python -m tests.faults.campaign RESULTS.jsonl [--ranks-only | --slurm-only] [--rounds N] [--seed N] [--only WORD]

One line is appended to RESULTS.jsonl after each fault, so that a campaign that was interrupted can be read, and goes on
where it was. `python -m tests.faults.table RESULTS.jsonl` makes the table of docs/explanation/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

from tests.faults import ranks
from tests.faults.outcome import Outcome, read_outcomes
from tests.faults.workload import Workload
from tests.slurm import scenarios
from tests.slurm.cluster import SlurmCluster, cannot_run
from tests.slurm.run import SlurmRun, prepare

_SLURM_STEPS, _SLURM_INTERVAL = 150, 10


def run_on_ranks(results: Path, work: Path, workload: Workload, options: argparse.Namespace) -> None:
    done = _counts(results, "ranks")
    undisturbed = ranks.run_undisturbed(workload, work / "undisturbed")
    for fault in ranks.FAULTS:
        if options.only not in fault.name:
            continue
        for number in range(done.get(fault.name, 0), fault.times * options.rounds):
            seed = f"{options.seed}/{fault.name}/{number}"
            directory = work / "run"
            outcome = ranks.try_fault(fault, seed, workload, directory, undisturbed)
            _record(outcome, results, directory / "ranks.log", work, number)


def run_on_slurm(results: Path, work: Path, workload: Workload, options: argparse.Namespace) -> None:
    reason = cannot_run()
    if reason:
        print(f"no Slurm here: {reason}", file=sys.stderr)
        return
    done = _counts(results, "Slurm")
    sections = {"train": {"steps": _SLURM_STEPS}, "checkpoint": {"interval": _SLURM_INTERVAL}}
    with SlurmCluster(Path("/tmp/meditron-slurm")) as cluster:

        def new_run(name: str, **more: dict) -> SlurmRun:
            directory = prepare(work / "slurm" / name)
            run_dir = directory / "runs" / "tiny"
            config = workload.config(run_dir, **{**sections, **more})
            return SlurmRun(cluster, directory, config, run_dir, _SLURM_INTERVAL)

        known = work / "undisturbed-on-slurm.json"  # the same bits every time: kept for the next call
        if not known.exists():
            job = new_run(f"undisturbed-{time.time_ns()}")
            problem = scenarios.undisturbed(job, random.Random(0))
            if problem:
                sys.exit(f"the undisturbed run did not get through: {problem}\n{job.output()}")
            known.write_text(json.dumps(job.watch.losses()))
        undisturbed = json.loads(known.read_text())
        for scenario in scenarios.SCENARIOS:
            if options.only not in scenario.name:
                continue
            for number in range(done.get(scenario.name, 0), options.rounds):
                dice = random.Random(f"{options.seed}/{scenario.name}/{number}")
                job = new_run(
                    f"{scenario.name.replace(' ', '-').replace('/', '-')}-{time.time_ns()}",
                    **dict(scenario.config),
                )
                try:
                    cluster.repair()
                    problem = scenario.act(job, dice)
                except AssertionError as error:
                    problem = str(error)
                outcome = job.outcome(scenario, undisturbed, problem, " ".join(job.job_ids))
                (job.directory / "all.out").write_text(job.output())
                _record(outcome, results, job.directory / "all.out", work, number)


def _counts(results: Path, where: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for outcome in read_outcomes(results) if results.exists() else []:
        if outcome.where == where:
            counts[outcome.fault] = counts.get(outcome.fault, 0) + 1
    return counts


def _record(outcome: Outcome, results: Path, log: Path, work: Path, number: int) -> None:
    outcome.append_to(results)
    verdict = "kept" if outcome.kept else f"BROKEN ({outcome.problem or f'{outcome.steps_lost} steps lost'})"
    print(
        f"{time.strftime('%T')} {outcome.where}: {outcome.fault} #{number}: {verdict}, {outcome.recovery_s} s, "
        f"{outcome.steps_lost} steps lost, {outcome.starts} starts",
        flush=True,
    )
    if not outcome.kept and log.exists():
        shutil.copy(
            log,
            work / f"broken-{outcome.where}-{outcome.fault.replace(' ', '-').replace('/', '-')}-{number}.log",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--ranks-only", action="store_true")
    parser.add_argument("--slurm-only", action="store_true")
    parser.add_argument("--rounds", type=int, default=1, help="multiplies the number of faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="faults whose name has this in it")
    parser.add_argument("--work", type=Path, help="keep logs and runs here")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="faults-"))
    work.mkdir(parents=True, exist_ok=True)
    workload = Workload.make(work / "workload")
    if not options.slurm_only:
        run_on_ranks(options.results, work, workload, options)
    if not options.ranks_only:
        run_on_slurm(options.results, work, workload, options)
    outcomes = read_outcomes(options.results)
    broken = [outcome for outcome in outcomes if not outcome.kept]
    print(f"{len(outcomes)} faults, {len(broken)} promises broken; logs of those in {work}")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
