from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from meditron_train.report.metrics import MetricsWriter, format_step_line
from tests.report.metrics_file import read_metrics


def open_writer(run_dir: Path, **changes) -> MetricsWriter:
    arguments = {
        "wandb": "disabled",
        "wandb_project": "p",
        "tensorboard": False,
        "config": {"a": 1},
        "enabled": True,
    }
    return MetricsWriter(run_dir, **{**arguments, **changes})


def write_steps(run_dir: Path, *steps: int, resume_step: int = 0, loss: float = 1.0) -> None:
    writer = open_writer(run_dir, resume_step=resume_step)
    for step in steps:
        writer.write({"step": step, "loss": loss})
    writer.close()


def steps_and_losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_metrics(run_dir)]


def test_each_step_is_one_line_at_once(tmp_path):
    writer = open_writer(tmp_path)
    writer.write({"step": 1, "loss": 2.5, "validation_loss.pubmed": 3.0, "mfu": None})
    content = (tmp_path / "metrics.jsonl").read_text()  # before close: nothing is held back
    assert content == '{"step": 1, "loss": 2.5, "validation_loss.pubmed": 3.0, "mfu": null}\n'
    writer.write({"step": 2, "loss": math.nan, "grad_norm": math.inf})
    writer.sync()
    writer.close()
    writer.close()
    first, second = read_metrics(tmp_path)
    assert first["validation_loss.pubmed"] == 3.0
    assert math.isnan(second["loss"])
    assert second["grad_norm"] == math.inf
    assert "NaN" not in json.dumps(first)


def test_only_the_enabled_rank_touches_the_directory(tmp_path):
    writer = open_writer(tmp_path / "run", enabled=False, wandb="offline", tensorboard=True)
    writer.write({"step": 1})
    writer.sync()
    writer.close()
    assert not (tmp_path / "run").exists()


def test_a_resume_supersedes_later_steps(tmp_path):
    write_steps(tmp_path, 1, 2, 3, 4, 5)
    write_steps(tmp_path, 4, 5, 6, resume_step=3, loss=2.0)
    assert steps_and_losses(tmp_path) == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]


def test_a_resume_after_the_last_line_keeps_all(tmp_path):
    write_steps(tmp_path, 1, 2)
    write_steps(tmp_path, 3, resume_step=2)
    assert [step for step, _ in steps_and_losses(tmp_path)] == [1, 2, 3]


def test_a_start_from_nothing_starts_the_file_anew(tmp_path):
    write_steps(tmp_path, 0, 1, 2)
    write_steps(tmp_path, 0, 1, loss=2.0)
    assert steps_and_losses(tmp_path) == [(0, 2.0), (1, 2.0)]


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step": 3, "loss": 1.0}', b"\xff\xfe"])
def test_a_torn_last_line_is_ignored_and_goes_on_resume(tmp_path, torn):
    write_steps(tmp_path, 1, 2)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(torn)
    assert [step for step, _ in steps_and_losses(tmp_path)] == [1, 2]
    write_steps(tmp_path, 3, resume_step=2)
    assert [step for step, _ in steps_and_losses(tmp_path)] == [1, 2, 3]
    assert (tmp_path / "metrics.jsonl").read_bytes().count(b"\n") == 3


def test_no_file_is_no_metrics(tmp_path):
    assert read_metrics(tmp_path) == []


def test_a_kill_loses_no_written_step(tmp_path):
    code = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from meditron_train.report.metrics import MetricsWriter\n"
        "w = MetricsWriter(Path(sys.argv[1]), wandb='disabled', wandb_project='p', tensorboard=False,"
        " config={}, enabled=True)\n"
        "for step in range(1, 101): w.write({'step': step, 'loss': 0.5})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path], check=False).returncode == -signal.SIGKILL
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, 101))


class FullDisk:
    """A file on which the `bad_writes` first writes end after three bytes, as on a full disk."""

    def __init__(self, file, bad_writes):
        self.file, self.bad_writes, self.name = file, bad_writes, file.name

    def write(self, content):
        if self.bad_writes == 0:
            return self.file.write(content)
        self.bad_writes -= 1
        if self.bad_writes == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(content[:3])

    def close(self):
        self.file.close()


def test_a_full_disk_costs_lines_but_not_the_run(tmp_path, caplog):
    writer = open_writer(tmp_path)
    writer.write({"step": 1, "loss": 1.0})
    writer._file = FullDisk(writer._file, bad_writes=2)
    with caplog.at_level("WARNING", logger="meditron_train"):
        for step in (2, 3, 4, 5):
            writer.write({"step": step, "loss": 1.0})
    writer.close()
    assert [step for step, _ in steps_and_losses(tmp_path)] == [1, 4, 5]


def test_tensorboard_holds_the_same_numbers_and_hides_superseded_ones(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = open_writer(tmp_path, tensorboard=True)
    for step in (1, 2, 3):
        writer.write({"step": step, "loss": float(step), "mfu": None, "validation_loss.pubmed": 5.0})
    writer.close()
    writer = open_writer(tmp_path, tensorboard=True, resume_step=2)
    writer.write({"step": 3, "loss": 30.0})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]
    assert events.Scalars("validation_loss/pubmed")[0].value == 5.0
    (text,) = events.Tensors("config/text_summary")[0].tensor_proto.string_val
    assert text == b"```yaml\na: 1\n```"
    assert set(events.Tags()["scalars"]) == {"train/loss", "validation_loss/pubmed"}


def test_a_failing_tensorboard_is_tried_again_later(tmp_path):
    pytest.importorskip("tensorboard")

    class Failing:
        def add_scalar(self, *arguments):
            raise OSError(errno.ENOSPC, "No space left on device")

    writer = open_writer(tmp_path)
    writer._tensorboard = Failing()
    for step in (1, 2, 100):
        writer.write({"step": step, "loss": 1.0})
        assert writer._tensorboard is None
    writer.write({"step": 101, "loss": 1.0})
    assert writer._tensorboard is not None
    writer.close()
    assert len(read_metrics(tmp_path)) == 4


def test_a_metrics_file_that_cannot_be_synced_ends_nothing(tmp_path, monkeypatch, caplog):
    writer = open_writer(tmp_path)

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    writer.sync()
    assert "may not be durable, training goes on" in caplog.text
    writer.close()


def test_step_line():
    metrics = {
        "step": 12,
        "tokens": 1000,
        "loss": 2.34567,
        "lr": 3e-4,
        "grad_norm": 1.234,
        "param_norm": 9.0,
        "tokens_per_second": 12_345.6,
        "step_time_s": 100.0,
        "mfu": 0.4123,
        "num_skipped_steps": 0,
        "peak_memory_bytes": 3 * 2**30,
    }
    line = format_step_line(metrics, 1000, mean_step_s=50.0)
    assert line == ("step   12/1000  loss 2.3457  lr 3.00e-04  grad 1.23  12.3k tokens/s  left 13:43:20"), (
        "memory and MFU would make it too wide"
    )
    assert format_step_line({**metrics, "lr": None, "mfu": None}, 1000, mean_step_s=1.0) == (
        "step   12/1000  loss 2.3457  grad 1.23  12.3k tokens/s  3.0 GiB  left 0:16:28"
    )
    skipped = {
        **metrics,
        "step": 1000,
        "num_skipped_steps": 2,
        "validation_loss.pubmed": 2.0,
        "task_accuracy.medqa4": 0.255,
        "loss": math.nan,
    }
    assert format_step_line(skipped, 1000).endswith(
        "skipped 2\n  validation loss pubmed 2.0000\n  medqa4: 25.5 % answered correctly"
    )
    assert "loss nan" in format_step_line(skipped, 1000)


@pytest.mark.parametrize(
    "metrics", [{"step": 1}, {"step": 1, "mfu": None, "peak_memory_bytes": None, "loss": None}]
)
def test_step_line_of_missing_values(metrics):
    assert format_step_line(metrics, 5) == "step 1/5"


@pytest.mark.parametrize(
    ("value", "text"), [(999.4, "999"), (1000, "1.0k"), (999_949, "999.9k"), (2.5e6, "2.5M"), (7e9, "7.0G")]
)
def test_step_line_counts(value, text):
    assert format_step_line({"step": 1, "tokens_per_second": value}, 5) == f"step 1/5  {text} tokens/s"


def test_every_step_line_fits_100_columns_of_the_console():
    widest = {
        "step": 1_234_567,
        "loss": -12345.6789,
        "lr": 1e-10,
        "grad_norm": 12345.678,
        "tokens_per_second": 999_949_999.0,
        "mfu": 0.999,
        "peak_memory_bytes": 1000 * 2**30,
        "num_skipped_steps": 99,
        "validation_loss.a": 1.0,
        "validation_loss.b": 2.0,
    }
    console = "06:20:33 INFO "
    lines = (console + format_step_line(widest, 9_999_999, mean_step_s=10.0)).splitlines()
    assert max(map(len, lines)) <= 100, lines
    assert len(lines) == 3
