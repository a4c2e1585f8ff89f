"""Steps under torch's profiler, and what is left of a GPU's memory that does not suffice."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from meditron_train.errors import Cause, MeditronError, cause_of
from meditron_train.train import memory_snapshot
from meditron_train.train.profiling import PHASES, summarize
from tests.train.test_loop import losses, run

SHORT = {"train": {"steps": 4, "global_batch_size": 4}, "validation": {"interval": 100, "steps": 1}}


def test_chosen_steps_of_chosen_ranks_are_recorded_and_change_no_number(write_config, tmp_path):
    profiled = {"profile": {"from_step": 2, "num_steps": 2, "ranks": [1]}}
    train = {**SHORT["train"], **profiled}
    plain = run(write_config(**SHORT, logging={"run_dir": str(tmp_path / "plain")}), world_size=2)
    recorded = run(write_config(**{**SHORT, "train": train}), world_size=2)
    assert losses(recorded) == losses(plain)
    assert [line["grad_norm"] for line in recorded] == [line["grad_norm"] for line in plain]

    assert not (tmp_path / "plain" / "profile").exists()
    text_file, trace_file = sorted((tmp_path / "run" / "profile").iterdir(), key=lambda path: path.suffix)[
        ::-1
    ]
    assert trace_file.name == "steps_00000002-00000003_rank_00001.pt.trace.json.gz"
    events = json.loads(gzip.decompress(trace_file.read_bytes()))["traceEvents"]
    names = [event.get("name") for event in events]
    assert {name for name in names if str(name).startswith("step ")} == {"step 2", "step 3"}
    assert all(phase in names for phase in PHASES)

    text = text_file.read_text()
    assert text.startswith("Steps 2 to 3 of rank 1")
    table = {line.split()[0]: float(line.split()[1]) for line in text.splitlines()[6:12]}
    assert list(table) == [*PHASES, "rest", "step"]
    assert table["step"] == pytest.approx(sum(table.values()) - table["step"], abs=0.01)
    assert all(milliseconds > 0 for milliseconds in table.values())
    assert any(section.startswith("forward-backward ") for section in text.split("\n\n"))


def event(name: str, start: float, end: float, own: float = 0.0) -> SimpleNamespace:
    """As torch's FunctionEvent of the host, times in microseconds."""
    return SimpleNamespace(
        name=name,
        device_type=SimpleNamespace(name="CPU"),
        time_range=SimpleNamespace(start=start, end=end),
        self_cpu_time_total=own,
        self_device_time_total=0.0,
    )


def test_the_backward_runs_in_another_thread_and_counts():
    marks = [event(phase, 1000.0 * number, 1000.0 * number + 900) for number, phase in enumerate(PHASES)]
    start = next(mark.time_range.start for mark in marks if mark.name == "forward-backward")
    step = event("step 2", 0.0, 1000.0 * len(PHASES))
    inside = event("autograd::engine::evaluate_function: MulBackward0", start + 100, start + 300, own=200.0)
    between = event("aten::empty", start + 950, start + 960, own=10.0)
    sections = summarize([step, *marks, inside, between]).split("\n\n")
    (work,) = [section for section in sections if section.startswith("forward-backward ")]
    assert "autograd::engine" in work and "aten::empty" not in work
    assert "0.200" in work


@pytest.mark.long
def test_a_run_that_ends_among_the_steps_writes_what_it_has(write_config, tmp_path):
    train = {**SHORT["train"], "profile": {"from_step": 4, "num_steps": 10}}
    run(write_config(**{**SHORT, "train": train}))
    names = sorted(path.name for path in (tmp_path / "run" / "profile").iterdir())
    assert names == [
        "steps_00000004-00000004_rank_00000.pt.trace.json.gz",
        "steps_00000004-00000004_rank_00000.txt",
    ]


def out_of_memory() -> MeditronError:
    error = MeditronError("a training step does not fit", cause=Cause.OUT_OF_MEMORY)
    error.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    return error


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), out_of_memory()])
def test_the_memory_is_written_where_it_does_not_suffice(tmp_path, monkeypatch, error):
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_text("blocks"))
    memory_snapshot.write_if_out_of_memory(error, tmp_path, 3)
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["rank_00003.memory.pickle"]
    assert cause_of(error) is Cause.OUT_OF_MEMORY


def test_other_errors_and_a_failing_snapshot_leave_nothing(tmp_path, monkeypatch, caplog):
    (tmp_path / "logs").mkdir()

    def fail(path: str) -> None:
        raise RuntimeError("no CUDA here")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", fail)
    memory_snapshot.write_if_out_of_memory(RuntimeError("out of memory"), tmp_path, 0)
    assert caplog.text == ""
    memory_snapshot.write_if_out_of_memory(torch.OutOfMemoryError("full"), tmp_path, 0)
    assert "no CUDA here" in caplog.text
    assert list((tmp_path / "logs").iterdir()) == []
