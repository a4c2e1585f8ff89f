"""The numbers of every step, to metrics.jsonl, TensorBoard and W&B, and as one line for the console.

Keys: step, time (seconds since 1970), tokens, loss, lr, grad_norm, param_norm, num_loss_tokens, tokens_per_second,
step_time_s and its parts (data_time_s, forward_backward_time_s, reduce_time_s, update_time_s), mfu, num_skipped_steps,
peak_memory_bytes, energy_j (of all GPUs since the previous line, where it is counted), source_tokens.NAME (read so far,
padding included), and on validation steps validation_loss.NAME and task_accuracy.NAME (a share, 0 to 1). metrics.jsonl
is the record and never has a step twice; TensorBoard and W&B are conveniences: when one fails, training goes on with
one warning, and TensorBoard is tried again later.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from meditron_train.log import get_logger
from meditron_train.report.json_lines import decode_line, encode_line
from meditron_train.report.wandb_run import WandbRun

_log = get_logger(__name__)

METRICS_NAME = "metrics.jsonl"
_TENSORBOARD_PAUSE_STEPS = 100  # after a failure
VALIDATION_PREFIX = "validation_loss."
TASK_PREFIX = "task_accuracy."
SOURCE_PREFIX = "source_tokens."


class MetricsWriter:
    """Writes the metrics of a run. With `enabled=False` (every rank but one) it does nothing."""

    def __init__(
        self,
        run_dir: Path,
        *,
        wandb: str,
        wandb_project: str,
        wandb_name: str | None = None,
        wandb_tags: Sequence[str] = (),
        tensorboard: bool,
        config: Mapping[str, Any],
        enabled: bool,
        resume_step: int = 0,
    ) -> None:
        """`wandb` is auto, online, offline or disabled; `resume_step` is the step of the checkpoint resumed
        from: later lines are removed, as those steps are done again (all lines when it is 0)."""
        self._file = None
        self._tensorboard = None
        self._tensorboard_again = math.inf  # the step from which it is opened again
        self._wandb = None
        if not enabled:
            return
        self._run_dir = run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / METRICS_NAME
        num_removed = remove_steps_after(path, resume_step)
        if num_removed:
            _log.info("%s: removed %d lines after step %d", path, num_removed, resume_step)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close())
        self._torn = False
        if tensorboard:
            self._tensorboard = _open_tensorboard(run_dir, resume_step)
            _write_config(self._tensorboard, config, resume_step)
        if wandb != "disabled":
            self._wandb = WandbRun(
                run_dir,
                mode=wandb,
                project=wandb_project,
                name=wandb_name or run_dir.resolve().name,
                tags=wandb_tags,
                config=config,
            )

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Record one step. `metrics` holds "step" (int) and numbers; one call per step, steps ascending."""
        if self._file is None:
            return
        step = int(metrics["step"])
        line = encode_line(metrics)
        self._append(line)
        if step >= self._tensorboard_again:
            self._tensorboard, self._tensorboard_again = _open_tensorboard(self._run_dir, step - 1), math.inf
        if self._tensorboard is not None:
            try:
                for key, value in metrics.items():
                    if key not in ("step", "time") and value is not None:
                        self._tensorboard.add_scalar(_tensorboard_tag(key), float(value), step)
            except (OSError, ValueError, TypeError) as error:
                _log.warning(
                    "TensorBoard could not be written, training goes on; tried again in %d steps: %s",
                    *(_TENSORBOARD_PAUSE_STEPS, error),
                )
                self._tensorboard, self._tensorboard_again = None, step + _TENSORBOARD_PAUSE_STEPS
        if self._wandb is not None:
            self._wandb.log(line)

    def sync(self) -> None:
        """Make metrics.jsonl durable; to be called before a checkpoint is published, so that a machine that
        dies cannot keep the checkpoint and lose the lines before it."""
        if self._file is None:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            _log.warning("%s may not be durable, training goes on: %s", self._file.name, error)

    def close(self) -> None:
        """Flush and close everything; waits for W&B for half a minute at most. A second call does nothing."""
        if self._file is None:
            return
        self._file.close()
        self._file = None
        if self._tensorboard is not None:
            try:
                self._tensorboard.close()
            except OSError as error:
                _log.warning("TensorBoard could not write its last events: %s", error)
        if self._wandb is not None:
            self._wandb.close()

    def _append(self, line: str) -> None:
        assert self._file is not None
        # One write() call for the whole line: a kill cannot tear it, only a full disk or a dead machine can.
        content = (b"\n" if self._torn else b"") + line.encode() + b"\n"
        try:
            written = self._file.write(content)
            complete, reason = written == len(content), "the disk is full"
        except OSError as error:
            complete, reason = False, str(error)
        if not complete and not self._torn:
            _log.warning("%s could not be written, training goes on: %s", self._file.name, reason)
        self._torn = not complete


def remove_steps_after(path: Path, resume_step: int) -> int:
    """Cut metrics.jsonl after `resume_step` (to nothing for 0), and a torn last line; returns the lines
    removed.

    Steps ascend in the file, so the superseded ones are its end, and one truncate() removes them: atomic, and
    possible on a full disk.
    """
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        lines = file.readlines()
    num_bytes_kept, num_lines_kept = 0, 0
    for line in lines:
        if resume_step == 0 or not line.endswith(b"\n"):
            break
        try:
            if decode_line(line)["step"] > resume_step:
                break
        except (ValueError, KeyError, TypeError):
            _log.warning("%s has a line that is not a step's: %r", path, line[:80])
        num_bytes_kept += len(line)
        num_lines_kept += 1
    os.truncate(path, num_bytes_kept)
    return len(lines) - num_lines_kept


# 100, less the time and level that stand before it on the console.
STEP_LINE_COLUMNS = 86


def format_step_line(
    metrics: Mapping[str, Any], total_steps: int, *, mean_step_s: float | None = None
) -> str:
    """One line for the console; what `metrics` does not hold is left out.

    Example: `step   12/1000  loss 2.3456  lr 3.00e-04  grad 1.23  12.3k tokens/s  MFU 41.2%  8.1 GiB  left 1:02:03`.
    A line that would be wider than STEP_LINE_COLUMNS leaves out memory, MFU, learning rate and gradient norm, in
    this order; metrics.jsonl has them all the same. Validation losses and accuracies follow, a line for each.

    Args:
        mean_step_s: seconds that a step takes on average; the time left takes it for all that remain. None: not known.
    """
    step = int(metrics["step"])
    parts = {"step": f"step {step:>{len(str(total_steps))}}/{total_steps}"}
    for key, text in (
        ("loss", "loss {:.4f}"),
        ("lr", "lr {:.2e}"),
        ("grad_norm", "grad {:.2f}"),
    ):
        if metrics.get(key) is not None:
            parts[key] = text.format(metrics[key])
    if metrics.get("tokens_per_second") is not None:
        parts["speed"] = f"{_short_count(metrics['tokens_per_second'])} tokens/s"
    if metrics.get("mfu") is not None:
        parts["mfu"] = f"MFU {100 * metrics['mfu']:.1f}%"
    if metrics.get("peak_memory_bytes") is not None:
        parts["memory"] = f"{metrics['peak_memory_bytes'] / 2**30:.1f} GiB"
    if metrics.get("num_skipped_steps"):
        parts["skipped"] = f"skipped {metrics['num_skipped_steps']}"
    if mean_step_s is not None and math.isfinite(mean_step_s) and step < total_steps:
        parts["left"] = f"left {_clock((total_steps - step) * mean_step_s)}"
    for key in ("memory", "mfu", "lr", "grad_norm"):
        if len("  ".join(parts.values())) > STEP_LINE_COLUMNS:
            parts.pop(key, None)
    lines = ["  ".join(parts.values())]
    for key, value in metrics.items():
        if key.startswith(VALIDATION_PREFIX):
            lines.append(f"validation loss {key.removeprefix(VALIDATION_PREFIX)} {value:.4f}")
        elif key.startswith(TASK_PREFIX):
            lines.append(f"{key.removeprefix(TASK_PREFIX)}: {100 * value:.1f} % answered correctly")
    return "\n  ".join(lines)


def _short_count(value: float) -> str:
    for limit, divisor, unit in ((1e3, 1.0, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M")):
        if value < limit:
            return f"{value / divisor:.{0 if not unit else 1}f}{unit}"
    return f"{value / 1e9:.1f}G"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d {hours}h" if days else f"{hours}:{minutes:02d}:{seconds:02d}"


def _tensorboard_tag(key: str) -> str:
    for prefix in (VALIDATION_PREFIX, TASK_PREFIX):
        if key.startswith(prefix):
            return f"{prefix.removesuffix('.')}/{key.removeprefix(prefix)}"
    return f"train/{key}"


def _write_config(writer: Any, config: Mapping[str, Any], step: int) -> None:
    """The configuration as YAML in a block of Markdown, which is what TensorBoard shows of a text."""
    if writer is None:
        return
    try:
        writer.add_text("config", f"```yaml\n{yaml.safe_dump(dict(config), sort_keys=False)}```", step)
    except OSError as error:
        _log.warning("TensorBoard has no configuration: %s", error)


def _open_tensorboard(run_dir: Path, resume_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what was logged for steps that are done again
        return SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1, flush_secs=30)
    except (ImportError, OSError) as error:
        _log.warning("TensorBoard is off: %s", error)
        return None
