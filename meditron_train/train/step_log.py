"""The numbers of a run: measured step by step, reduced over the ranks, written by rank 0."""

from __future__ import annotations

import resource
import statistics
import time
from collections import deque
from pathlib import Path

import torch

from meditron_train.log import get_logger
from meditron_train.parallel import Mesh
from meditron_train.planner.flops import gpu_type, mfu
from meditron_train.report.metrics import SOURCE_PREFIX, MetricsWriter, format_step_line
from meditron_train.train.energy import EnergyCounter
from meditron_train.train.engine import Engine, StepResult
from meditron_train.train.progress import Progress
from meditron_train.train.setup import Plan

_log = get_logger(__name__)


_NUM_RECENT_STEPS = 100


class StepMeter:
    """Time and tokens of the training steps since the last reading; validation and saving do not count."""

    def __init__(self) -> None:
        self._seconds, self._tokens, self._steps = 0.0, 0, 0
        self._data_s = self._own_s = self._reduce_s = 0.0
        self._recent_s: deque[float] = deque(maxlen=_NUM_RECENT_STEPS)
        self._has_begun = False

    def add(self, seconds: float, tokens: int, *, data_s: float, result: StepResult) -> None:
        """Count a step.

        Args:
            data_s: how long it waited for its data, a part of `seconds`.
        """
        if self._has_begun:  # the first step compiles, warms up and fills caches
            self._recent_s.append(seconds)
        self._has_begun = True
        self._seconds, self._tokens, self._steps = (
            self._seconds + seconds,
            self._tokens + tokens,
            self._steps + 1,
        )
        self._data_s += data_s
        self._own_s += result.own_seconds
        self._reduce_s += result.reduce_seconds

    @property
    def mean_step_s(self) -> float | None:
        """Mean time of the recent steps, None before the second one."""
        return statistics.fmean(self._recent_s) if self._recent_s else None

    def read(self) -> tuple[float, float, dict[str, float]]:
        """(seconds per step, tokens/s of all ranks together, seconds of this rank by part of a step), then reset."""
        parts = {
            "data_time_s": self._data_s / self._steps,
            "forward_backward_time_s": self._own_s / self._steps,
            "reduce_time_s": self._reduce_s / self._steps,
        }
        values = self._seconds / self._steps, self._tokens / self._seconds, parts
        self._seconds, self._tokens, self._steps = 0.0, 0, 0
        self._data_s = self._own_s = self._reduce_s = 0.0
        return values


class StepLog:
    """metrics.jsonl, TensorBoard, W&B and the console line of a run, seen from one rank."""

    def __init__(self, plan: Plan, mesh: Mesh, engine: Engine, run_dir: Path, resume_step: int) -> None:
        self._plan, self._mesh, self._engine = plan, mesh, engine
        logging = plan.config.logging
        self.meter = StepMeter()
        self._energy = EnergyCounter(mesh.device)
        self._writer = MetricsWriter(
            run_dir,
            wandb=logging.wandb,
            wandb_project=logging.wandb_project,
            wandb_name=logging.wandb_name,
            wandb_tags=logging.wandb_tags,
            tensorboard=logging.tensorboard,
            config=plan.config.model_dump(mode="json", by_alias=True),
            enabled=mesh.rank == 0,
            resume_step=resume_step,
        )

    def write(
        self, progress: Progress, result: StepResult, lr: float, validation_losses: dict[str, float]
    ) -> None:
        """Write the numbers of the step just taken; times are means since the previous line, the parts of a step also
        over the ranks. Collective."""
        step_time_s, tokens_per_second, parts = self.meter.read()
        param_norm = self._engine.param_norm()  # waits for the update, so that its time is known
        parts["update_time_s"] = 0.0 if result.skipped else self._engine.update_seconds()
        energy_j = self._energy.read()
        *sums, all_j, num_counted = self._mesh.sum_over_ranks(
            [*parts.values(), energy_j or 0.0, float(energy_j is not None)]
        )
        parts = {
            name: seconds / self._mesh.layout.world_size for name, seconds in zip(parts, sums, strict=True)
        }
        (peak_memory_bytes,) = self._mesh.max_over_ranks([_peak_memory_bytes(self._mesh)])
        metrics = {
            "step": progress.step,
            "time": time.time(),
            "tokens": progress.tokens,
            "loss": result.loss if result.num_loss_tokens else None,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "param_norm": param_norm,
            "num_loss_tokens": result.num_loss_tokens,
            "tokens_per_second": tokens_per_second,
            "step_time_s": step_time_s,
            **parts,
            "mfu": self._mfu(tokens_per_second),
            "num_skipped_steps": progress.num_skipped_steps,
            "peak_memory_bytes": int(peak_memory_bytes),
            # A sum with a GPU missing would look like a measurement of all.
            **({"energy_j": all_j} if num_counted == self._mesh.layout.world_size else {}),
            **self._tokens_of_sources(progress.samples),
            **validation_losses,
        }
        self._writer.write(metrics)
        if self._mesh.rank == 0:
            steps = self._plan.config.train.steps
            _log.info(format_step_line(metrics, steps, mean_step_s=self.meter.mean_step_s))

    def write_start(self, validation_losses: dict[str, float]) -> None:
        """Write what was measured before the first step, as step 0."""
        self._writer.write({"step": 0, "time": time.time(), "tokens": 0, **validation_losses})
        if self._mesh.rank == 0:
            losses = ", ".join(f"{name} {loss:.4f}" for name, loss in validation_losses.items())
            _log.info("before the first step: %s", losses)

    def sync(self) -> None:
        """Make metrics.jsonl durable."""
        self._writer.sync()

    def close(self) -> None:
        self._writer.close()

    def _tokens_of_sources(self, num_samples: int) -> dict[str, int]:
        seq_len = self._plan.config.train.seq_len
        taken = self._plan.train_data.samples_taken(num_samples)
        return {f"{SOURCE_PREFIX}{name}": samples * seq_len for name, samples in taken.items()}

    def _mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilization by 6·N (the planner states the convention); None where the peak is unknown."""
        train = self._plan.config.train
        gpu: str | None = train.gpu
        if gpu is None and self._mesh.on_gpu:
            gpu = gpu_type(self._mesh.device_name)
        return mfu(
            self._plan.model,
            train.seq_len,
            tokens_per_second=tokens_per_second,
            num_gpus=self._mesh.layout.world_size,
            gpu=gpu,
            precision=train.precision,
            lora=self._plan.config.lora,
        )


def _peak_memory_bytes(mesh: Mesh) -> float:
    """The most this process has held: on the GPU as torch's allocator counts, on CPU as the kernel does."""
    if mesh.on_gpu:
        return float(torch.cuda.max_memory_allocated(mesh.device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
