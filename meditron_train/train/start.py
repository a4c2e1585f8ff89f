"""How a run begins: whether it is a first start, a resume or already finished, and what is written before the loop."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]

from meditron_train.checkpoint.manifest import verify_manifest
from meditron_train.checkpoint.sharded.store import newest_checkpoint
from meditron_train.config.schema import Config
from meditron_train.errors import Cause, ExitCode, MeditronError, RequeueError, UserError
from meditron_train.files import is_disk_fault
from meditron_train.launcher.environment import LaunchEnvironment
from meditron_train.launcher.waiting import join, tell_failure
from meditron_train.log import get_logger, setup_logging
from meditron_train.parallel import destroy, initialize
from meditron_train.report.status import (
    LOG_DIR_KEY,
    RunStatus,
    forget_failures,
    read_requeue,
    record_failure,
    request_requeue,
)
from meditron_train.train.life.heartbeat import forget_heartbeats
from meditron_train.train.life.run_dir import RunDir
from meditron_train.train.life.stacks import stacks_file, stacks_written_to
from meditron_train.train.life.stop_signals import StopSignals
from meditron_train.train.loop import Run
from meditron_train.train.memory_snapshot import remember_allocations, write_if_out_of_memory
from meditron_train.train.saving.changed_settings import check_settings
from meditron_train.train.saving.finished import is_done
from meditron_train.train.saving.resume import check_continues, chosen_checkpoint, set_aside_later
from meditron_train.train.setup import Plan, make_plan
from meditron_train.train.summary import summarize

_log = get_logger(__name__)


def train(
    config: Config, launch: LaunchEnvironment, signals: StopSignals, from_step: int | None = None
) -> int:
    """Run one rank of a training run, from its newest checkpoint or from the start.

    Args:
        launch: this process's place among the ranks.
        signals: already listening, as a signal may arrive while torch is imported.
        from_step: go back to the checkpoint of this step; see `chosen_checkpoint`.

    Returns:
        The process's exit code: 0 when all steps are done, 85 when it was asked to stop and has saved.

    Raises:
        UserError: the configuration or a file it names is wrong.
        MeditronError: the machine failed (a full disk), or too many steps in a row were not finite.
    """
    run_dir = RunDir(config.logging.run_dir)
    setup_logging(launch.rank)
    if launch.world_size > 1:
        os.environ.update(MASTER_ADDR=launch.master_addr, MASTER_PORT=str(launch.master_port))
    timeout_s = math.ceil(1.5 * config.resilience.hang_other_s)  # after the watchdog, who says more
    try:
        plan = make_plan(config, launch.world_size, launch.rank)
    except MeditronError as error:
        if launch.rank > 0 and launch.local_rank == 0:  # maybe this node's fault alone
            tell_failure(launch, error)
        raise
    config = plan.config
    store = _meet(run_dir, launch, signals, timeout_s) if launch.world_size > 1 else None
    with ExitStack() as stack:
        mesh = initialize(
            plan.layout,
            rank=launch.rank,
            local_rank=launch.local_rank,
            one_gpu_per_task=launch.kind == "slurm",
            device=config.train.device,
            seed=config.train.seed,
            timeout_s=timeout_s,
            store=store,
        )
        hosts = mesh.gather_objects(socket.gethostname())
        status = RunStatus(run_dir.path, enabled=launch.rank == 0)
        stack.enter_context(_disk_faults_named(run_dir.path))
        chosen = mesh.on_first_rank(lambda: _choose(run_dir, plan, from_step, stack))
        if mesh.on_first_rank(lambda: _is_finished(run_dir, plan, chosen)):
            _log.info(
                "all %d steps were done before, nothing was changed: %s. Raise train.steps to go on",
                *(config.train.steps, run_dir.path),
            )
            stack.close()
            destroy()
            return ExitCode.DONE
        goes_back = mesh.on_first_rank(lambda: _goes_back(chosen))
        mesh.on_first_rank(lambda: _take(run_dir, config, status, _facts(launch, plan, hosts), stack))
        if goes_back:
            mesh.on_first_rank(lambda: _go_back(chosen, status))
        setup_logging(launch.rank, run_dir.path)
        if launch.rank == 0:
            _log.info("starting\n%s", summarize(plan, is_resume=run_dir.has_checkpoints()))
        run: Run | None = None
        stack.enter_context(stacks_written_to(stacks_file(run_dir.path, launch.rank)))
        if mesh.on_gpu and config.train.profile.memory_history:
            remember_allocations()
        try:
            run = Run(plan, mesh, run_dir, launch, hosts, signals, status, stack, from_step=from_step)
            exit_code = run.loop()
        except BaseException as error:
            write_if_out_of_memory(error, run_dir.path, launch.rank)
            record_failure(run_dir.path, launch.rank, error, run.progress.step if run else None)
            requeue = read_requeue(run_dir.path)
            if requeue is not None and isinstance(error, Exception) and not isinstance(error, MeditronError):
                # Another rank named a hang and left: what this one met, a lost connection, is the consequence.
                raise RequeueError(requeue.reason, cause=requeue.cause) from error
            raise
    destroy()  # not after an error: it may wait for what a failed peer never sends
    return exit_code


def _meet(run_dir: RunDir, launch: LaunchEnvironment, signals: StopSignals, timeout_s: float) -> Store:
    """As `join`. A request to stop that ends the wait is passed on to the batch script, and is thereby obeyed.

    But not SIGTERM: torchrun sends it, too, when another rank has failed, and that is to be counted.
    """
    try:
        return join(launch, signals, timeout_s)
    except RequeueError as error:
        if launch.rank == 0 and error.cause is not Cause.TERMINATED and run_dir.path.is_dir():
            with (
                suppress(UserError),
                run_dir.locked(),
            ):  # not in the name of another start, which has the directory
                request_requeue(run_dir.path, str(error), error.cause)
                signals.acknowledge(stop=True)
        raise


@contextmanager
def _disk_faults_named(run_dir: Path) -> Iterator[None]:
    """A full or failing disk ends a run with one message, wherever it is met."""
    try:
        yield
    except OSError as error:
        if not is_disk_fault(error):
            raise
        raise MeditronError(f"{run_dir} cannot be written: {error}", cause=Cause.DISK) from error


def _choose(run_dir: RunDir, plan: Plan, from_step: int | None, stack: ExitStack) -> Path | None:
    """Take the run directory until the stack ends, and refuse what cannot be continued, before any file is changed.

    Returns:
        The checkpoint to continue from, as far as is known without a look at its hashes.
    """
    if not run_dir.has_checkpoints():
        chosen_checkpoint(run_dir.checkpoints, from_step)  # a first start that is refused creates nothing
    stack.enter_context(run_dir.locked())
    check_settings(run_dir, plan.config)
    chosen = chosen_checkpoint(run_dir.checkpoints, from_step)
    if chosen is not None:
        check_continues(plan, chosen)
    return chosen


def _is_finished(run_dir: RunDir, plan: Plan, newest: Path | None) -> bool:
    """Whether nothing is left to do; a last checkpoint that has rotted is made again."""
    return newest is not None and is_done(run_dir.path, plan.config, newest) and not verify_manifest(newest)


def _goes_back(chosen: Path | None) -> bool:
    """Whether there are later checkpoints than the chosen one."""
    return chosen is not None and chosen != newest_checkpoint(chosen.parent)


def _go_back(chosen: Path, status: RunStatus) -> None:
    set_aside_later(chosen)
    status.update(last_checkpoint=chosen.name)


def _take(run_dir: RunDir, config: Config, status: RunStatus, facts: dict, stack: ExitStack) -> None:
    """Enter a start of the run into its directory, which is locked."""
    run_dir.write_config(config)
    forget_failures(run_dir.path)
    forget_heartbeats(run_dir.path)
    stack.enter_context(status)
    status.start(facts)


def _facts(launch: LaunchEnvironment, plan: Plan, hosts: list[str]) -> dict[str, Any]:
    """What status.json says of a start."""
    return {
        "hosts": list(dict.fromkeys(hosts)),
        "world_size": launch.world_size,
        "layout": asdict(plan.layout),
        "launcher": launch.kind,
        "job_id": launch.job_id,
        LOG_DIR_KEY: os.environ.get("LOG_DIR") if launch.job_id else None,  # of launch/common.sh
        "steps": plan.config.train.steps,
    }
