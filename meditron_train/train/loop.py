"""The training loop."""

from __future__ import annotations

import os
import resource
import time
from contextlib import ExitStack
from dataclasses import asdict

import torch

from meditron_train.config.schema import Config
from meditron_train.data.batch_schedule import BatchSchedule
from meditron_train.data.loader import StepLoader
from meditron_train.data.packed import PackedDataset
from meditron_train.errors import MeditronError
from meditron_train.launcher.environment import LaunchEnvironment, detect_launcher
from meditron_train.log import get_logger, setup_logging
from meditron_train.parallel import Mesh, destroy, initialize
from meditron_train.planner.flops import gpu_type, mfu
from meditron_train.report.metrics import MetricsWriter, format_step_line
from meditron_train.report.provenance import append_provenance, collect_provenance
from meditron_train.train.engine import StepResult, invented_batch
from meditron_train.train.lr_schedule import learning_rate
from meditron_train.train.run_dir import RunDir
from meditron_train.train.saving import Progress, RunCheckpoints
from meditron_train.train.setup import Plan, build_engine, make_plan
from meditron_train.train.stop_signals import StopSignals

_log = get_logger(__name__)

EXIT_DONE = 0
EXIT_REQUEUE = 85


def train(config: Config) -> int:
    """Run one rank of a training run, from its newest checkpoint or from the start.

    Returns:
        The process's exit code: 0 when all steps are done, 85 when it was asked to stop and has saved.

    Raises:
        UserError: the configuration or a file it names is wrong.
        MeditronError: the machine failed (a full disk), or too many steps in a row were not finite.
    """
    launch = detect_launcher()
    run_dir = RunDir(config.logging.run_dir)
    setup_logging(launch.rank)
    if launch.world_size > 1:
        os.environ.update(MASTER_ADDR=launch.master_addr, MASTER_PORT=str(launch.master_port))
    plan = make_plan(config, launch.world_size)
    with ExitStack() as stack:
        signals = stack.enter_context(StopSignals(run_dir.path, checks_files=launch.rank == 0))
        mesh = initialize(
            plan.layout,
            rank=launch.rank,
            local_rank=launch.local_rank,
            device=config.train.device,
            seed=config.train.seed,
        )
        mesh.on_first_rank(lambda: _take(run_dir, config, stack))
        setup_logging(launch.rank, run_dir.path)
        exit_code = Run(plan, mesh, run_dir, launch, signals, stack).loop()
    destroy()  # not after an error: it may wait for what a failed peer never sends
    return exit_code


def _take(run_dir: RunDir, config: Config, stack: ExitStack) -> None:
    """Make the run directory ours until the stack ends."""
    stack.enter_context(run_dir.locked())
    run_dir.check_resumable(config)
    run_dir.write_config(config)


class StepMeter:
    """Time and tokens of the training steps since the last reading; validation and saving do not count."""

    def __init__(self) -> None:
        self._seconds, self._tokens, self._steps = 0.0, 0, 0

    def add(self, seconds: float, tokens: int) -> None:
        self._seconds, self._tokens, self._steps = (
            self._seconds + seconds,
            self._tokens + tokens,
            self._steps + 1,
        )

    def read(self) -> tuple[float, float]:
        """(seconds per step, tokens per second of all ranks together), then start anew."""
        values = self._seconds / self._steps, self._tokens / self._seconds
        self._seconds, self._tokens, self._steps = 0.0, 0, 0
        return values


class Run:
    """One rank's run: built, tried with a dry step and resumed; then `loop()` takes the steps."""

    def __init__(
        self,
        plan: Plan,
        mesh: Mesh,
        run_dir: RunDir,
        launch: LaunchEnvironment,
        signals: StopSignals,
        stack: ExitStack,
    ) -> None:
        config = plan.config
        self.plan, self.config, self.mesh, self.run_dir, self.signals = plan, config, mesh, run_dir, signals
        self.batches = BatchSchedule(config.train.global_batch_size, config.train.batch_ramp)
        self.checkpoints = RunCheckpoints(plan, mesh, run_dir.checkpoints)
        newest = self.checkpoints.newest()
        self.engine = build_engine(plan, mesh, with_weights=newest is None)
        self.dry_run()
        self.progress = self.checkpoints.load(self.engine, newest) if newest else Progress()
        self.loader = self.load(plan.train_data, self.batches, self.progress.step + 1, config.data.prefetch)
        stack.callback(self.loader.close)
        if mesh.rank == 0:
            append_provenance(run_dir.path, self.provenance(launch))
        self.metrics = MetricsWriter(
            run_dir.path,
            wandb=config.logging.wandb,
            wandb_project=config.logging.wandb_project,
            tensorboard=config.logging.tensorboard,
            config=config.model_dump(mode="json", by_alias=True),
            enabled=mesh.rank == 0,
            resume_step=self.progress.step,
        )
        stack.callback(self.metrics.close)
        self.meter = StepMeter()

    def loop(self) -> int:
        """Take the remaining steps; returns the exit code."""
        config, last_step = self.config, self.config.train.steps
        while self.progress.step < last_step:
            start = time.monotonic()
            step, batches = next(self.loader)
            lr = learning_rate(step, config.schedule, config.optimizer, last_step)
            result = self.engine.train_step(batches, lr)
            self.meter.add(time.monotonic() - start, self.batches.batch_size(step) * config.train.seq_len)
            self.count(step, result)
            is_last = step == last_step
            validation_losses = self.validate() if is_last or step % config.validation.interval == 0 else {}
            if is_last or validation_losses or step % config.logging.interval == 0:
                self.log_step(result, lr, validation_losses)
            self.checkpoints.finish(wait=False)
            stop, save = self.agree_on_requests()
            if stop or save or is_last or step % config.checkpoint.interval == 0 or self.export_is_due(step):
                self.save()
            if stop or save:
                self.checkpoints.finish(wait=True)
                self.signals.acknowledge(stop=bool(stop))
            if stop and not is_last:
                self.checkpoints.close()
                _log.info("stopped after step %d because of %s; the same command continues", step, stop)
                return EXIT_REQUEUE
        self.checkpoints.close()
        if config.checkpoint.export_hf:
            self.checkpoints.export(last_step, self.run_dir.path / "hf")
        _log.info("all %d steps are done: %s", last_step, self.run_dir.path)
        return EXIT_DONE

    # ---- parts of a step ----------------------------------------------------------------------------------------

    def count(self, step: int, result: StepResult) -> None:
        """Advance the counters; stop the run when too many steps in a row were not finite."""
        progress, limit = self.progress, self.config.resilience.max_skipped_steps
        progress.step = step
        progress.samples += self.batches.batch_size(step)
        progress.tokens = progress.samples * self.config.train.seq_len
        if not result.skipped:
            progress.num_consecutive_skips = 0
            return
        progress.num_skipped_steps += 1
        progress.num_consecutive_skips += 1
        _log.warning(
            "step %d is not finite (loss %s, gradient norm %s): no weight was changed, %d in a row",
            *(step, result.loss, result.grad_norm, progress.num_consecutive_skips),
        )
        if progress.num_consecutive_skips >= limit:
            self.checkpoints.close()
            good = self.checkpoints.newest()
            raise MeditronError(
                f"{limit} steps in a row were not finite (resilience.max_skipped_steps), the last one step {step}. "
                f"The last good checkpoint is {good}. Look at the data of these steps (`meditron-train data trace "
                f"{self.run_dir.path} --step {step}`), lower optimizer.lr, or start from an earlier checkpoint"
            )

    def validate(self) -> dict[str, float]:
        """Mean loss over a fixed set of samples of each validation source, in nats per token."""
        losses = {}
        schedule = BatchSchedule(self.config.train.global_batch_size)
        for name, dataset in self.plan.validation_data.items():
            num_steps = min(
                self.config.validation.steps, max(1, dataset.samples_per_epoch // schedule.batch_size(1))
            )
            total, count = 0.0, 0
            with self.load(dataset, schedule, 1, prefetch=min(1, self.config.data.prefetch)) as loader:
                for _ in range(num_steps):
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

    def save(self) -> None:
        self.metrics.sync()
        seconds = self.checkpoints.save(self.engine, self.progress)
        _log.info("training stood still for %.1f s to save step %d", seconds, self.progress.step)
        if self.export_is_due(self.progress.step):
            step = self.progress.step
            self.checkpoints.export(step, self.run_dir.path / f"hf_step_{step:08d}")

    def export_is_due(self, step: int) -> bool:
        interval = self.config.checkpoint.export_interval
        return interval is not None and step % interval == 0

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

    # ---- numbers ------------------------------------------------------------------------------------------------

    def log_step(self, result: StepResult, lr: float, validation_losses: dict[str, float]) -> None:
        """Write the numbers of the step just taken; times are means since the previous line. Collective."""
        step_time_s, tokens_per_second = self.meter.read()
        (peak_memory_bytes,) = self.mesh.max_over_ranks([_peak_memory_bytes(self.mesh)])
        metrics = {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "param_norm": self.engine.param_norm(),
            "num_loss_tokens": result.num_loss_tokens,
            "tokens_per_second": tokens_per_second,
            "step_time_s": step_time_s,
            "mfu": self.mfu(tokens_per_second),
            "num_skipped_steps": self.progress.num_skipped_steps,
            "peak_memory_bytes": int(peak_memory_bytes),
            **validation_losses,
        }
        self.metrics.write(metrics)
        if self.mesh.rank == 0:
            _log.info(format_step_line(metrics, self.config.train.steps))

    def mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilisation by 6·N (the planner states the convention); None where the peak is unknown."""
        gpu: str | None = self.config.train.gpu
        if gpu is None and self.mesh.on_gpu:
            gpu = gpu_type(torch.cuda.get_device_name(self.mesh.device))
        return mfu(
            self.plan.model,
            self.config.train.seq_len,
            tokens_per_second=tokens_per_second,
            num_gpus=self.mesh.layout.world_size,
            gpu=gpu,
            precision=self.config.train.precision,
        )

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


def _peak_memory_bytes(mesh: Mesh) -> float:
    """The most this process has held: on the GPU as torch's allocator counts, on CPU as the kernel does."""
    if mesh.on_gpu:
        return float(torch.cuda.max_memory_allocated(mesh.device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
