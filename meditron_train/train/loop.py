"""The training loop."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from torch.profiler import record_function

from meditron_train.checkpoint.sharded.read import read_meta
from meditron_train.checkpoint.sharded.store import step_of
from meditron_train.data.loader import StepLoader
from meditron_train.data.packed import PackedDataset
from meditron_train.data.packing.batch_schedule import BatchSchedule
from meditron_train.errors import Cause, ExitCode, MeditronError, SaveError
from meditron_train.launcher.environment import LaunchEnvironment
from meditron_train.log import EVERY_RANK, get_logger
from meditron_train.parallel import Mesh
from meditron_train.report.provenance import append_provenance
from meditron_train.report.status import RunStatus
from meditron_train.train import dry_run
from meditron_train.train.engine import StepResult
from meditron_train.train.guard.injected_faults import InjectedFaults
from meditron_train.train.guard.step import StepGuard
from meditron_train.train.life.heartbeat import Pulse
from meditron_train.train.life.run_dir import RunDir
from meditron_train.train.life.stop_signals import StopRequest, StopSignals
from meditron_train.train.life.watchdog import Watchdog
from meditron_train.train.lr_schedule import changed_rates, learning_rate
from meditron_train.train.origin import run_provenance
from meditron_train.train.profiling import StepProfiler
from meditron_train.train.progress import Progress
from meditron_train.train.saving.local_checkpoints import LocalCheckpoints
from meditron_train.train.saving.pending_exports import PendingExports
from meditron_train.train.saving.run_checkpoints import RunCheckpoints
from meditron_train.train.setup import Plan, build_engine
from meditron_train.train.step_log import StepLog
from meditron_train.train.validation_tasks import task_accuracies

_log = get_logger(__name__)


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
        *,
        from_step: int | None = None,
    ) -> None:
        """Take over what the start has prepared.

        Args:
            from_step: the step that a person asked to go back to, whether this start does so or an earlier one has.
        """
        config, settings = plan.config, plan.config.resilience
        self.plan, self.config, self.mesh, self.run_dir = plan, config, mesh, run_dir
        self.signals, self.status = signals, status
        self.pulse = Pulse()
        stack.enter_context(
            Watchdog(self.pulse, settings, run_dir.path, rank=mesh.rank, world_size=mesh.layout.world_size)
        )
        self.batches = BatchSchedule.of(config.train)
        self.checkpoints = RunCheckpoints(plan, mesh, run_dir.checkpoints, status)
        self.local = LocalCheckpoints(plan, mesh, mesh.from_first_rank(status.run_id))
        if from_step is not None:
            self.local.remove_others(from_step)
        self.pulse.enter("checking the checkpoints")
        newest, local_step = self.checkpoints.newest(), self.local.newest()
        self.pulse.enter("building the model")
        self.engine = build_engine(plan, mesh, with_weights=newest is None and local_step is None)
        self.pulse.enter("the dry step")
        dry_run.try_step(self.engine, self.batches)
        self.pulse.enter("loading the checkpoint")
        if local_step is not None and (newest is None or local_step > step_of(newest)):
            self.progress = self.local.load(self.engine, local_step)
        else:
            self.progress = self.checkpoints.load(self.engine, newest) if newest else Progress()
            self.warn_of_lr_jump(newest)
        if from_step is not None:  # also where an earlier start went back and left no checkpoint that says so
            self.progress.from_step = from_step
        self.pulse.step = self.progress.step
        self.guard = StepGuard(self.engine, settings, hosts, self.progress.history)
        self.faults = InjectedFaults(run_dir.path, mesh.rank)
        self.num_failed_saves = self.num_rollbacks = 0
        self.exports = PendingExports(config, self.checkpoints, run_dir.path, self.progress.step)
        self.loader = self.make_loader(
            plan.train_data, self.batches, self.progress.step + 1, config.data.prefetch
        )
        stack.callback(self.loader.close)
        if mesh.rank == 0:
            append_provenance(run_dir.path, run_provenance(plan, mesh, launch, hosts, self.progress.step))
        self.profiler = StepProfiler(config.train.profile, mesh, run_dir.path, self.pulse)
        stack.callback(self.profiler.close)
        self.log = StepLog(plan, mesh, self.engine, run_dir.path, self.progress.step)
        stack.callback(self.log.close)

    def loop(self) -> int:
        """Take the remaining steps; returns the exit code."""
        config, last_step = self.config, self.config.train.steps
        self.status.update(state="running", step=self.progress.step)
        stop, _ = self.agree_on_requests()
        if stop and self.progress.step < last_step:  # asked while it was starting: nothing to save
            return self.stop(stop)
        self.export_pending()  # what an earlier start left, before the next checkpoint makes one of them go
        if self.progress.step == 0 and config.validation.at_start:
            self.log.write_start(self.validate())
        while self.progress.step < last_step:
            with self.profiler.step(self.progress.step + 1):
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
        self.export_pending()
        if config.checkpoint.export_hf:
            self.checkpoints.export(last_step, self.run_dir.path / config.export_name)
        self.local.remove()
        _log.info("all %d steps are done: %s", last_step, self.run_dir.path)
        if self.mesh.rank == 0:
            words = ["meditron-train", "generate", str(self.run_dir.path), "--prompt", "..."]
            _log.info("try it: %s", shlex.join(words))
        self.status.update(state="done", step=last_step, reason=None, exit_code=ExitCode.DONE)
        return ExitCode.DONE

    def stop(self, request: StopRequest) -> int:
        """End before the last step, after a checkpoint, asking to be started again."""
        self.checkpoints.close()

        def tell() -> None:
            self.status.stopped(request.reason, request.cause)
            self.signals.acknowledge(stop=True)

        # The others wait: the end of one is the end of all, and the batch script must find both done.
        self.mesh.on_first_rank(tell)
        _log.info(
            "stopped after step %d because of %s; the same command continues",
            self.progress.step,
            request.reason,
        )
        return ExitCode.REQUEUE

    # ---- parts of a step ----------------------------------------------------------------------------------------

    def take_step(self) -> tuple[StepResult, float]:
        """Take the next step and count it; returns its result and learning rate."""
        start = time.monotonic()
        self.pulse.enter("waiting for data")
        with record_function("data"):
            step, batches = next(self.loader)
        seconds_waited = time.monotonic() - start
        self.pulse.enter("training step")
        self.faults.before_step(step, self.engine)
        lr = learning_rate(step, self.config.schedule, self.config.optimizer, self.config.train.steps)
        taken = self.guard.take_step(
            step, batches, lr, seconds_waited_for_data=seconds_waited, is_saved=self.save_is_due(step)
        )
        seconds = time.monotonic() - start
        tokens = self.batches.batch_size(step) * self.config.train.seq_len
        self.log.meter.add(seconds, tokens, data_s=seconds_waited, result=taken.result)
        self.pulse.finished_step(step, seconds)
        if taken.problem:
            skipped = "no weight was changed" if taken.result.skipped else "it is reported only"
            _log.warning("step %d %s: %s", step, taken.problem, skipped, extra=EVERY_RANK)
        if taken.slow_ranks is not None:
            self.status.update(slow_ranks=[str(rank) for rank in taken.slow_ranks])
            for rank in taken.slow_ranks:
                _log.warning("%s", rank, extra=EVERY_RANK)
        self.count(step, taken.result)
        if taken.roll_back:
            self.roll_back()
        return taken.result, lr

    def count(self, step: int, result: StepResult) -> None:
        """Advance the counters; stop the run when too many steps in a row were skipped.

        Raises:
            MeditronError: too many steps in a row were skipped (resilience.max_skipped_steps), or all of them.
        """
        progress, limit = self.progress, self.config.resilience.max_skipped_steps
        progress.step = step
        progress.samples += self.batches.batch_size(step)
        progress.tokens = progress.samples * self.config.train.seq_len
        if not result.skipped:
            progress.num_consecutive_skips = 0
            return
        progress.num_skipped_steps += 1
        progress.num_consecutive_skips += 1
        if progress.num_skipped_steps == step == self.config.train.steps:
            raise MeditronError(
                f"each of the {step} steps was skipped: not one changed a weight. Look at the data "
                f"(`meditron-train data trace {self.run_dir.path} --step {step}`) and at the warnings of the log",
                cause=Cause.BAD_STEPS,
            )
        if progress.num_consecutive_skips >= limit:
            self.checkpoints.close()
            raise MeditronError(
                f"{limit} steps in a row were skipped, not finite or anomalous (resilience.max_skipped_steps); "
                f"the last one was step {step}. The last good checkpoint is {self.checkpoints.newest()}. Look at "
                f"the data of these steps (`meditron-train data trace {self.run_dir.path} --step {step}`), lower "
                "optimizer.lr, or start from an earlier checkpoint",
                cause=Cause.BAD_STEPS,
            )

    def roll_back(self) -> None:
        """Load the last checkpoint's weights. The steps since then count as skipped; their batches do not return.

        Raises:
            MeditronError: resilience.max_rollbacks rollbacks to this checkpoint are done already.
        """
        self.pulse.enter("rolling back")
        self.finish_saving(wait=True)
        newest, limit = self.checkpoints.newest(), self.config.resilience.max_rollbacks
        if newest is None:
            _log.warning(
                "there is no checkpoint to roll back to yet: only this step is skipped", extra=EVERY_RANK
            )
            return
        if self.num_rollbacks >= limit:
            raise MeditronError(
                f"step {self.progress.step} would be rollback {limit + 1} to {newest} (resilience.max_rollbacks). Look "
                "at the data since then, lower optimizer.lr, or start from an earlier checkpoint",
                cause=Cause.BAD_STEPS,
            )
        self.num_rollbacks += 1
        restored = self.checkpoints.load(self.engine, newest)
        num_undone = self.progress.step - restored.step
        self.progress.num_skipped_steps = restored.num_skipped_steps + num_undone
        _log.warning(
            "rolled back to the weights of %s; the %d steps since then count as skipped",
            newest,
            num_undone,
            extra=EVERY_RANK,
        )

    def validate(self) -> dict[str, float]:
        """Mean loss over a fixed set of samples of each validation source, in nats per token; accuracy in tasks.

        A request to stop cuts it short: what is left of the time is for the checkpoint.
        """
        losses: dict[str, float] = {}
        start = time.monotonic()
        schedule = BatchSchedule(self.config.train.global_batch_size)
        for name, dataset in self.plan.validation_data.items():
            num_steps = min(
                self.config.validation.steps, max(1, dataset.samples_per_epoch // schedule.batch_size(1))
            )
            total, weight = 0.0, 0.0
            with self.make_loader(dataset, schedule, 1, prefetch=min(1, self.config.data.prefetch)) as loader:
                for _ in range(num_steps):
                    self.pulse.enter("validation")
                    if self.agree_on_requests()[0]:
                        _log.warning(
                            "the validation after step %d is cut short", self.progress.step, extra=EVERY_RANK
                        )
                        return losses
                    loss, of_batch = self.engine.evaluate(next(loader)[1])
                    total, weight = total + loss * of_batch, weight + of_batch
            if weight:
                losses[f"validation_loss.{name}"] = total / weight
            else:
                _log.warning("validation source %s has no label that counts", name, extra=EVERY_RANK)
        if self.plan.validation_tasks:
            self.pulse.enter("validation")
            losses |= task_accuracies(self.engine, self.plan.validation_tasks)
        self.status.add(validation_s=time.monotonic() - start)
        return losses

    def agree_on_requests(self) -> tuple[StopRequest | None, bool]:
        """(why to stop, or None; whether to save now), the same on every rank: any rank's signal counts."""
        request = self.signals.requested
        wishes = [float(request is not None), float(self.signals.save_requested)]
        stop, save = self.mesh.max_over_ranks(wishes)
        if not stop:
            return None, bool(save)
        requests = self.mesh.gather_objects(request)
        return next(filter(None, requests)), bool(save)

    def save_is_due(self, step: int) -> bool:
        is_regular = step == self.config.train.steps or step % self.config.checkpoint.interval == 0
        return is_regular or self.exports.is_due(step)

    def save(self, *, must: bool, wait: bool) -> None:
        """Save a checkpoint.

        Args:
            must: a failure ends the run, and old checkpoints make room.
            wait: do not go on before the checkpoint is published.
        """
        self.pulse.enter("saving")
        step = self.progress.step
        self.check_weights()
        start = time.monotonic()
        self.finish_saving(wait=True)

        def write() -> None:
            self.log.sync()
            self.checkpoints.save(self.engine, self.progress, must=must)
            seconds = time.monotonic() - start
            _log.info("training stood still for %.1f s to save step %d", seconds, step)
            if wait:
                self.checkpoints.finish(wait=True)

        self.try_to_save(write, must=must)
        self.status.add(saving_s=time.monotonic() - start)
        self.exports.add(step)
        self.export_pending()

    def export_pending(self) -> None:
        """Export the steps of checkpoint.export_interval that are not exported yet."""
        if self.exports:
            self.pulse.enter("exporting")
            self.finish_saving(wait=True)
            self.exports.export()

    def save_locally(self) -> None:
        """Save on this node where that is due and no checkpoint is."""
        interval, step = self.config.checkpoint.local_interval, self.progress.step
        if interval is None or step % interval or self.save_is_due(step):
            return
        self.pulse.enter("saving")
        self.check_weights()
        self.local.save(self.engine, self.progress)

    def check_weights(self) -> None:
        """Before a save: no checkpoint is made of weights that differ between ranks."""
        self.engine.gather_params()  # with overlap_param_gather only a rank's own part is new after the update
        self.guard.check_replicas(self.progress.step)
        self.progress.history = self.guard.monitor.history

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

    # ---- parts of the start -------------------------------------------------------------------------------------

    def warn_of_lr_jump(self, checkpoint: Path | None) -> None:
        """Warn when the next step has another learning rate than the settings of the checkpoint would give it."""
        if checkpoint is None or self.mesh.rank != 0:
            return
        rates = changed_rates(self.progress.step + 1, read_meta(checkpoint).get("config"), self.config)
        if rates is not None:
            _log.warning(
                "the learning rate of step %d is %.3g; with the settings of %s it would be %.3g: optimizer, schedule "
                "or train.steps have changed",
                *(self.progress.step + 1, rates[1], checkpoint, rates[0]),
            )

    def make_loader(
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
