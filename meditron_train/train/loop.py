"""The training loop."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch

from meditron_train.config.schema import Config
from meditron_train.data.batch_schedule import BatchSchedule
from meditron_train.data.loader import StepLoader
from meditron_train.data.packed import PackedDataset
from meditron_train.errors import MeditronError, RequeueError, SaveError
from meditron_train.launcher.environment import LaunchEnvironment
from meditron_train.log import get_logger, setup_logging
from meditron_train.parallel import Mesh, destroy, initialize
from meditron_train.report.provenance import append_provenance, collect_provenance
from meditron_train.report.status import RunStatus, forget_failures, read_requeue, record_failure
from meditron_train.train.engine import StepResult, invented_batch
from meditron_train.train.guard import StepGuard
from meditron_train.train.heartbeat import Pulse, forget_heartbeats
from meditron_train.train.injected_faults import InjectedFaults
from meditron_train.train.local_checkpoints import LocalCheckpoints
from meditron_train.train.lr_schedule import learning_rate
from meditron_train.train.run_dir import RunDir
from meditron_train.train.saving import Progress, RunCheckpoints, step_of
from meditron_train.train.setup import Plan, build_engine, make_plan
from meditron_train.train.step_log import StepLog
from meditron_train.train.stop_signals import StopSignals
from meditron_train.train.watchdog import Watchdog

_log = get_logger(__name__)

EXIT_DONE = 0
EXIT_REQUEUE = 85


def train(config: Config, launch: LaunchEnvironment, signals: StopSignals) -> int:
    """Run one rank of a training run, from its newest checkpoint or from the start.

    Args:
        launch: this process's place among the ranks.
        signals: already listening, as a signal may arrive while torch is imported.

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
    plan = make_plan(config, launch.world_size)
    with ExitStack() as stack:
        mesh = initialize(
            plan.layout,
            rank=launch.rank,
            local_rank=launch.local_rank,
            one_gpu_per_task=launch.kind == "slurm",
            device=config.train.device,
            seed=config.train.seed,
            timeout_s=math.ceil(1.5 * config.resilience.hang_other_s),  # after the watchdog, who says more
        )
        hosts = mesh.gather_objects(socket.gethostname())
        status = RunStatus(run_dir.path, enabled=launch.rank == 0)
        mesh.on_first_rank(lambda: _take(run_dir, config, status, _facts(launch, plan, hosts), stack))
        setup_logging(launch.rank, run_dir.path)
        run: Run | None = None
        try:
            run = Run(plan, mesh, run_dir, launch, hosts, signals, status, stack)
            exit_code = run.loop()
        except BaseException as error:
            record_failure(run_dir.path, launch.rank, error, run.progress.step if run else None)
            reason = read_requeue(run_dir.path)
            if reason is not None and isinstance(error, Exception) and not isinstance(error, MeditronError):
                # Another rank named a hang and left: what this one met, a lost connection, is the consequence.
                raise RequeueError(reason) from error
            raise
    destroy()  # not after an error: it may wait for what a failed peer never sends
    return exit_code


def _take(run_dir: RunDir, config: Config, status: RunStatus, facts: dict, stack: ExitStack) -> None:
    """Make the run directory ours until the stack ends."""
    stack.enter_context(run_dir.locked())
    run_dir.check_resumable(config)
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
        "steps": plan.config.train.steps,
    }


class Run:
    """One rank's run: built, tried with a dry step and resumed; then `loop()` takes the steps."""

    def __init__(
        self,
        plan: Plan,
        mesh: Mesh,
        run_dir: RunDir,
        launch: LaunchEnvironment,
        hosts: Sequence[str],
        signals: StopSignals,
        status: RunStatus,
        stack: ExitStack,
    ) -> None:
        config, settings = plan.config, plan.config.resilience
        self.plan, self.config, self.mesh, self.run_dir = plan, config, mesh, run_dir
        self.signals, self.status = signals, status
        self.pulse = Pulse()
        stack.enter_context(
            Watchdog(self.pulse, settings, run_dir.path, rank=mesh.rank, world_size=mesh.layout.world_size)
        )
        self.batches = BatchSchedule(config.train.global_batch_size, config.train.batch_ramp)
        self.checkpoints = RunCheckpoints(plan, mesh, run_dir.checkpoints, status)
        self.local = LocalCheckpoints(plan, mesh, mesh.from_first_rank(status.run_id))
        self.pulse.enter("checking the checkpoints")
        newest, local_step = self.checkpoints.newest(), self.local.newest()
        self.pulse.enter("building the model")
        self.engine = build_engine(plan, mesh, with_weights=newest is None and local_step is None)
        self.pulse.enter("the dry step")
        self.dry_run()
        self.pulse.enter("loading the checkpoint")
        if local_step is not None and (newest is None or local_step > step_of(newest)):
            self.progress = self.local.load(self.engine, local_step)
        else:
            self.progress = self.checkpoints.load(self.engine, newest) if newest else Progress()
        self.pulse.step = self.progress.step
        self.guard = StepGuard(self.engine, settings, hosts, self.progress.history)
        self.faults = InjectedFaults(run_dir.path, mesh.rank)
        self.num_failed_saves = self.num_rollbacks = 0
        self.loader = self.load(plan.train_data, self.batches, self.progress.step + 1, config.data.prefetch)
        stack.callback(self.loader.close)
        if mesh.rank == 0:
            append_provenance(run_dir.path, self.provenance(launch))
        self.log = StepLog(plan, mesh, self.engine, run_dir.path, self.progress.step)
        stack.callback(self.log.close)

    def loop(self) -> int:
        """Take the remaining steps; returns the exit code."""
        config, last_step = self.config, self.config.train.steps
        self.status.update(state="running", step=self.progress.step)
        stop, _ = self.agree_on_requests()
        if stop and self.progress.step < last_step:  # asked while it was starting: nothing to save
            return self.stop(stop)
        while self.progress.step < last_step:
            result, lr = self.take_step()
            step = self.progress.step
            is_last = step == last_step
            validation_losses = self.validate() if is_last or step % config.validation.interval == 0 else {}
            if is_last or validation_losses or step % config.logging.interval == 0:
                self.log.write(self.progress, result, lr, validation_losses)
            self.status.update(step=step)
            self.finish_saving(wait=False)
            self.save_locally()
            stop, save = self.agree_on_requests()
            if stop or save or self.save_is_due(step):
                self.save(must=bool(stop) or is_last, wait=bool(stop) or save)
            if stop and not is_last:
                return self.stop(stop)
            if stop or save:
                self.signals.acknowledge(stop=bool(stop))
        self.pulse.enter("exporting")
        self.checkpoints.close()
        if config.checkpoint.export_hf:
            self.checkpoints.export(last_step, self.run_dir.path / "hf")
        self.local.remove()
        _log.info("all %d steps are done: %s", last_step, self.run_dir.path)
        self.status.update(state="done", step=last_step, reason=None, exit_code=EXIT_DONE)
        return EXIT_DONE

    def stop(self, reason: str) -> int:
        """End before the last step, after a checkpoint, asking to be started again."""
        self.checkpoints.close()

        def tell() -> None:
            self.status.stopped(reason, EXIT_REQUEUE)
            self.signals.acknowledge(stop=True)

        # The others wait: the end of one is the end of all, and the batch script must find both done.
        self.mesh.on_first_rank(tell)
        _log.info(
            "stopped after step %d because of %s; the same command continues", self.progress.step, reason
        )
        return EXIT_REQUEUE

    # ---- parts of a step ----------------------------------------------------------------------------------------

    def take_step(self) -> tuple[StepResult, float]:
        """Take the next step and count it; returns its result and learning rate."""
        start = time.monotonic()
        self.pulse.enter("waiting for data")
        step, batches = next(self.loader)
        seconds_waited = time.monotonic() - start
        self.pulse.enter("training step")
        self.faults.before_step(step, self.engine)
        lr = learning_rate(step, self.config.schedule, self.config.optimizer, self.config.train.steps)
        taken = self.guard.take_step(
            step, batches, lr, seconds_waited_for_data=seconds_waited, is_saved=self.save_is_due(step)
        )
        seconds = time.monotonic() - start
        self.log.meter.add(seconds, self.batches.batch_size(step) * self.config.train.seq_len)
        self.pulse.finished_step(step, seconds)
        if taken.problem:
            skipped = "no weight was changed" if taken.result.skipped else "it is reported only"
            _log.warning("step %d %s: %s", step, taken.problem, skipped)
        if taken.slow_ranks is not None:
            self.status.update(slow_ranks=[str(rank) for rank in taken.slow_ranks])
            for rank in taken.slow_ranks:
                _log.warning("%s", rank)
        self.count(step, taken.result)
        if taken.roll_back:
            self.roll_back()
        return taken.result, lr

    def count(self, step: int, result: StepResult) -> None:
        """Advance the counters; stop the run when too many steps in a row were skipped."""
        progress, limit = self.progress, self.config.resilience.max_skipped_steps
        progress.step = step
        progress.samples += self.batches.batch_size(step)
        progress.tokens = progress.samples * self.config.train.seq_len
        if not result.skipped:
            progress.num_consecutive_skips = 0
            return
        progress.num_skipped_steps += 1
        progress.num_consecutive_skips += 1
        if progress.num_consecutive_skips >= limit:
            self.checkpoints.close()
            raise MeditronError(
                f"{limit} steps in a row were skipped, not finite or anomalous (resilience.max_skipped_steps); "
                f"the last one was step {step}. The last good checkpoint is {self.checkpoints.newest()}. Look at "
                f"the data of these steps (`meditron-train data trace {self.run_dir.path} --step {step}`), lower "
                "optimizer.lr, or start from an earlier checkpoint"
            )

    def roll_back(self) -> None:
        """Load the last checkpoint's weights. The steps since then count as skipped; their batches do not return."""
        self.pulse.enter("rolling back")
        self.finish_saving(wait=True)
        newest, limit = self.checkpoints.newest(), self.config.resilience.max_rollbacks
        if newest is None:
            _log.warning("there is no checkpoint to roll back to yet: only this step is skipped")
            return
        if self.num_rollbacks >= limit:
            raise MeditronError(
                f"step {self.progress.step} would be rollback {limit + 1} to {newest} (resilience.max_rollbacks). Look "
                "at the data since then, lower optimizer.lr, or start from an earlier checkpoint"
            )
        self.num_rollbacks += 1
        restored = self.checkpoints.load(self.engine, newest)
        num_undone = self.progress.step - restored.step
        self.progress.num_skipped_steps = restored.num_skipped_steps + num_undone
        _log.warning(
            "rolled back to the weights of %s; the %d steps since then count as skipped", newest, num_undone
        )

    def validate(self) -> dict[str, float]:
        """Mean loss over a fixed set of samples of each validation source, in nats per token.

        A request to stop cuts it short: what is left of the time is for the checkpoint.
        """
        losses: dict[str, float] = {}
        schedule = BatchSchedule(self.config.train.global_batch_size)
        for name, dataset in self.plan.validation_data.items():
            num_steps = min(
                self.config.validation.steps, max(1, dataset.samples_per_epoch // schedule.batch_size(1))
            )
            total, count = 0.0, 0
            with self.load(dataset, schedule, 1, prefetch=min(1, self.config.data.prefetch)) as loader:
                for _ in range(num_steps):
                    self.pulse.enter("validation")
                    if self.agree_on_requests()[0]:
                        _log.warning("the validation after step %d is cut short", self.progress.step)
                        return losses
                    loss, num_tokens = self.engine.evaluate(next(loader)[1])
                    total, count = total + loss * num_tokens, count + num_tokens
            losses[f"validation_loss.{name}"] = total / count if count else float("nan")
        return losses

    def agree_on_requests(self) -> tuple[str | None, bool]:
        """(why to stop, or None; whether to save now), the same on every rank: any rank's signal counts."""
        wishes = [float(self.signals.requested is not None), float(self.signals.save_requested)]
        stop, save = self.mesh.max_over_ranks(wishes)
        if not stop:
            return None, bool(save)
        reasons = self.mesh.gather_objects(self.signals.requested)
        return next((reason for reason in reasons if reason), "a request"), bool(save)

    def save_is_due(self, step: int) -> bool:
        is_regular = step == self.config.train.steps or step % self.config.checkpoint.interval == 0
        return is_regular or self.export_is_due(step)

    def export_is_due(self, step: int) -> bool:
        interval = self.config.checkpoint.export_interval
        return interval is not None and step % interval == 0

    def save(self, *, must: bool, wait: bool) -> None:
        """Save, and with `wait` do not go on before it is published; `must`: a failure ends the run."""
        self.pulse.enter("saving")
        step = self.progress.step
        self.guard.check_replicas(step)
        self.progress.history = self.guard.monitor.history
        start = time.monotonic()
        self.finish_saving(wait=True)

        def write() -> None:
            self.log.sync()
            self.checkpoints.save(self.engine, self.progress)
            seconds = time.monotonic() - start
            _log.info("training stood still for %.1f s to save step %d", seconds, step)
            if wait:
                self.checkpoints.finish(wait=True)
            if self.export_is_due(step):
                self.pulse.enter("exporting")
                self.checkpoints.export(step, self.run_dir.path / f"hf_step_{step:08d}")

        self.try_to_save(write, must=must)

    def save_locally(self) -> None:
        """Save on this node where that is due and no checkpoint is."""
        interval, step = self.config.checkpoint.local_interval, self.progress.step
        if interval is None or step % interval or self.save_is_due(step):
            return
        self.pulse.enter("saving")
        self.guard.check_replicas(step)
        self.progress.history = self.guard.monitor.history
        self.local.save(self.engine, self.progress)

    def finish_saving(self, *, wait: bool) -> None:
        """Bring a checkpoint that is being written as far as it goes; with `wait`, to its end."""
        self.try_to_save(lambda: self.checkpoints.finish(wait=wait), must=False)

    def try_to_save(self, action: Callable[[], object], *, must: bool) -> None:
        """A checkpoint that cannot be written ends the run if it `must` be, or if it is one too many in a row."""
        num_published = self.checkpoints.num_published
        try:
            action()
            if self.checkpoints.num_published > num_published:
                self.num_failed_saves = self.num_rollbacks = 0
        except SaveError as error:
            self.num_failed_saves += 1
            limit = self.config.resilience.max_failed_saves
            if must or self.num_failed_saves >= limit:
                raise
            _log.error("%s Training goes on: failure %d of %d in a row", error, self.num_failed_saves, limit)
            self.status.update(last_save_error=str(error))

    def dry_run(self) -> None:
        """One step on invented data at full size, so that too little memory shows before the first real step."""
        train, layout = self.config.train, self.mesh.layout
        smallest_batch = min(self.batches.batch_sizes) // (train.micro_batch_size * layout.data)
        # As many micro-batches as the schedule holds at once; interleaving holds about twice the stages.
        num_held = layout.pipeline * (2 if layout.virtual_pipeline > 1 else 1)
        batch = invented_batch(train.seq_len, train.micro_batch_size, self.plan.model.vocab_size)
        try:
            self.engine.dry_run([batch] * min(num_held, smallest_batch))
        except torch.OutOfMemoryError as error:
            raise MeditronError(
                f"a training step does not fit into the memory of {self.mesh.device}: {str(error).splitlines()[0]} "
                "Lower train.micro_batch_size or train.seq_len, choose train.recompute=full, or raise parallel.tensor "
                "or parallel.pipeline"
            ) from error

    # ---- parts of the start -------------------------------------------------------------------------------------

    def load(
        self, dataset: PackedDataset, schedule: BatchSchedule, start_step: int, prefetch: int
    ) -> StepLoader:
        """This rank's micro-batches of `dataset`."""
        return StepLoader(
            dataset,
            schedule,
            self.config.train.micro_batch_size,
            dp_rank=self.mesh.at.data,
            dp_size=self.mesh.layout.data,
            start_step=start_step,
            prefetch=prefetch,
            pin_memory=self.mesh.on_gpu,
        )

    def provenance(self, launch: LaunchEnvironment) -> dict:
        fingerprints = {"train": self.plan.train_data.fingerprint}
        fingerprints |= {
            f"validation.{name}": data.fingerprint for name, data in self.plan.validation_data.items()
        }
        return collect_provenance(
            self.config.model_dump(mode="json", by_alias=True),
            fingerprints,
            {**asdict(launch), "layout": asdict(self.plan.layout), "resumed_after_step": self.progress.step},
        )
