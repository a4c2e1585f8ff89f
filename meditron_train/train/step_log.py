"""The numbers of a run: measured step by step, reduced over the ranks, written by rank 0."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

from meditron_train.log import get_logger
from meditron_train.parallel import Mesh
from meditron_train.planner.flops import gpu_type, mfu
from meditron_train.report.metrics import MetricsWriter, format_step_line
from meditron_train.train.engine import Engine, StepResult
from meditron_train.train.saving import Progress
from meditron_train.train.setup import Plan

_log = get_logger(__name__)


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


class StepLog:
    """metrics.jsonl, TensorBoard, W&B and the console line of a run, seen from one rank."""

    def __init__(self, plan: Plan, mesh: Mesh, engine: Engine, run_dir: Path, resume_step: int) -> None:
        self._plan, self._mesh, self._engine = plan, mesh, engine
        logging = plan.config.logging
        self.meter = StepMeter()
        self._writer = MetricsWriter(
            run_dir,
            wandb=logging.wandb,
            wandb_project=logging.wandb_project,
            tensorboard=logging.tensorboard,
            config=plan.config.model_dump(mode="json", by_alias=True),
            enabled=mesh.rank == 0,
            resume_step=resume_step,
        )

    def write(
        self, progress: Progress, result: StepResult, lr: float, validation_losses: dict[str, float]
    ) -> None:
        """Write the numbers of the step just taken; times are means since the previous line. Collective."""
        step_time_s, tokens_per_second = self.meter.read()
        (peak_memory_bytes,) = self._mesh.max_over_ranks([_peak_memory_bytes(self._mesh)])
        metrics = {
            "step": progress.step,
            "tokens": progress.tokens,
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "param_norm": self._engine.param_norm(),
            "num_loss_tokens": result.num_loss_tokens,
            "tokens_per_second": tokens_per_second,
            "step_time_s": step_time_s,
            "mfu": self._mfu(tokens_per_second),
            "num_skipped_steps": progress.num_skipped_steps,
            "peak_memory_bytes": int(peak_memory_bytes),
            **validation_losses,
        }
        self._writer.write(metrics)
        if self._mesh.rank == 0:
            _log.info(format_step_line(metrics, self._plan.config.train.steps))

    def sync(self) -> None:
        """Make metrics.jsonl durable."""
        self._writer.sync()

    def close(self) -> None:
        self._writer.close()

    def _mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilisation by 6·N (the planner states the convention); None where the peak is unknown."""
        train = self._plan.config.train
        gpu: str | None = train.gpu
        if gpu is None and self._mesh.on_gpu:
            gpu = gpu_type(torch.cuda.get_device_name(self._mesh.device))
        return mfu(
            self._plan.model,
            train.seq_len,
            tokens_per_second=tokens_per_second,
            num_gpus=self._mesh.layout.world_size,
            gpu=gpu,
            precision=train.precision,
        )


def _peak_memory_bytes(mesh: Mesh) -> float:
    """The most this process has held: on the GPU as torch's allocator counts, on CPU as the kernel does."""
    if mesh.on_gpu:
        return float(torch.cuda.max_memory_allocated(mesh.device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
