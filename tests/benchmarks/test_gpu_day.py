"""The GPU day: its parts, its records and what it computes of a profile and of the sizes, all without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks.gpu import day
from tests.long import mostly_long

ROOT = Path(__file__).parents[2]
MACHINE = {"device": "a device", "torch": "2"}
KEYS = {"part", "status", "problem", "date", "seconds", "machine", "result"}


def part(name: str, code: str, limit_s: int = 60) -> day.Part:
    return day.Part(name, f"Title of {name}", limit_s, ("-c", code, "{result}"))


WRITES = "import sys; open(sys.argv[1], 'w').write('{\"tests\": 1}')"


@pytest.mark.parametrize(
    "code, limit_s, status, problem",
    [
        (WRITES, 60, "passed", ""),
        (f"{WRITES}; sys.exit(3)", 60, "failed", "exit status 3"),
        ("pass", 60, "failed", "left no result"),
        ("import time; time.sleep(60)", 1, "failed", "took longer than 1 s"),
    ],
)
def test_a_part_is_recorded_whatever_becomes_of_it(tmp_path, code, limit_s, status, problem):
    record = day.run_part(part("one", code), tmp_path, MACHINE, limit_s)
    assert record == json.loads((tmp_path / "one.json").read_text())
    assert set(record) == KEYS and record["machine"] == MACHINE
    assert record["status"] == status and record["problem"].startswith(problem)
    assert record["result"] == ({"tests": 1} if WRITES in code else None)
    assert (day.passed_before(part("one", code), tmp_path, MACHINE) is None) == (status == "failed")
    assert day.passed_before(part("one", code), tmp_path, {**MACHINE, "torch": "3"}) is None


def test_a_part_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    chosen = [part("bad", "import sys; sys.exit(1)"), part("good", WRITES)]
    monkeypatch.setattr(day, "parts", lambda *, tiny: chosen)
    monkeypatch.setattr(day, "machine", lambda device: MACHINE)
    monkeypatch.setattr(day, "body", lambda part, result: f"body of {part.name}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert day.main([str(tmp_path), "--tiny"]) == 1
    table = (tmp_path / "table.md").read_text()
    assert "exit status 1; see bad.log" in table and "body of good" in table
    with tarfile.open(tmp_path / "out.tar.gz") as tar:
        assert tar.getnames() == ["bad.json", "bad.log", "good.json", "good.log", "table.md"]
        assert tar.extractfile("table.md").read().decode() == table
    assert day.main([str(tmp_path), "--tiny", "--only", "good"]) == 0
    assert "good: passed (before)" in capsys.readouterr().out


def test_nothing_starts_without_the_device(tmp_path, monkeypatch):
    def no_device(device: str) -> dict[str, str]:
        raise subprocess.CalledProcessError(1, device)

    monkeypatch.setattr(day, "machine", no_device)
    with pytest.raises(SystemExit) as stopped:
        day.main([str(tmp_path)])
    assert stopped.value.code == 2 and list(tmp_path.iterdir()) == []


def test_the_limits_fit_into_nine_minutes():
    for tiny in (False, True):
        assert len({part.name for part in day.parts(tiny=tiny)}) == 5
    assert day.TOTAL_S <= 9 * 60 - 15  # start and table
    assert sum(part.limit_s for part in day.parts(tiny=False)) < 9 * 60 + 5


TESTS = """
import time
import pytest

def test_good(): pass
def test_bad(): assert False
@pytest.mark.skip
def test_skipped(): pass
@pytest.fixture
def broken(): raise RuntimeError
def test_error(broken): pass
def test_hangs(): time.sleep({seconds})
def test_later(): pass
"""


@pytest.mark.parametrize("hangs", mostly_long([False, True], True))
def test_the_tests_part_keeps_what_it_has_found(tmp_path, hangs):
    (tmp_path / "test_some.py").write_text(TESTS.format(seconds=1000 if hangs else 0))
    arguments = [word for word in day.parts(tiny=False)[0].arguments if not word.startswith("tests/gpu")]
    arguments.remove("--ignore")
    arguments += ["-c", "/dev/null", "--rootdir", str(tmp_path), str(tmp_path / "test_some.py")]
    if hangs:  # killed once the test before has ended
        arguments[:2] = ["-c", KILLED_AT_THE_HANGING_TEST]
    part = day.Part("tests", "Tests", 1, tuple(arguments))
    record = day.run_part(part, tmp_path, MACHINE, 200)
    assert record["status"] == "failed"
    result = record["result"]
    assert {name: result[name] for name in ("tests", "passed", "failed", "error", "skipped")} == {
        "tests": 6, "passed": 1 if hangs else 3, "failed": 1, "error": 1, "skipped": 1,
    }  # fmt: skip
    assert result["names_failed"] == ["test_some.py::test_bad", "test_some.py::test_error"]
    assert result["names_unfinished"] == (["test_some.py::test_hangs"] if hangs else [])
    body = day.body(part, result)
    assert "- failed: `test_some.py::test_bad`" in body
    assert ("- did not end: `test_some.py::test_hangs`" in body) == hangs


KILLED_AT_THE_HANGING_TEST = """
import os, signal, sys, threading, time, pathlib
import pytest

def kill():
    path = pathlib.Path(sys.argv[sys.argv.index("--outcomes") + 1])
    while not (path.is_file() and "test_hangs" in path.read_text()):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=kill, daemon=True).start()
pytest.main(sys.argv[1:])
"""


def test_no_tests_are_no_result(tmp_path):
    (tmp_path / "raw").write_text('{"test": "cut o')
    with pytest.raises(ValueError, match="no test was collected"):
        day.read_result(day.Part("tests", "Tests", 1, ()), tmp_path / "raw")


def test_the_day_measures_nothing_twice_and_ours_first():
    from benchmarks.gpu import attention, tools

    tests, *others = day.parts(tiny=False)
    ignored = tests.arguments[tests.arguments.index("--ignore") + 1]
    assert (ROOT / ignored).is_file() and ignored == "tests/gpu/test_benchmark.py"
    profile = next(part for part in others if part.name == "profile")
    assert profile.arguments[profile.arguments.index("--warm-up") + 1] == "2"
    assert list(tools.TOOLS)[:2] == [tools.OURS, tools.SHORT_DOCUMENTS]
    assert next(iter(attention.TOOLS)) == attention.OURS


def test_idle_share_of_a_profile():
    from benchmarks.gpu.profile import summarize, table

    def event(cat: str, name: str, start: float, length: float) -> dict:
        return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": length}

    events = [
        event("kernel", "gemm", 0, 400),
        event("kernel", "norm", 300, 200),  # beside gemm for 100 µs
        event("gpu_memcpy", "copy", 900, 100),
        event("cuda_runtime", "cudaStreamSynchronize", 0, 10),
        event("cuda_runtime", "cudaLaunchKernel", 0, 10),
        event("gpu_user_annotation", "a range", 0, 5000),
        event("cpu_op", "aten::mm", 0, 5000),
        {"ph": "i", "name": "an instant", "ts": 7},
    ]
    found = summarize({"traceEvents": events}, "cuda", num_steps=2, top=2)
    assert found["step_ms"] == pytest.approx(0.5) and found["idle_share"] == pytest.approx(0.4)
    assert found["launches_per_step"] == 1.5 and found["host_synchronizations_per_step"] == 0.5
    assert [kernel["name"] for kernel in found["kernels"]] == ["gemm", "norm"]
    assert found["kernels"][0]["share_of_busy"] == pytest.approx(400 / 600)
    assert "idle 40.0 %" in table(found)
    with pytest.raises(RuntimeError, match="no work"):
        summarize({"traceEvents": events[-2:]}, "cuda", num_steps=1)


def test_as_many_layers_as_the_plan_lets_fit():
    from benchmarks.gpu import train_step

    memory = 80 * 2**30
    work = train_step.as_many_layers_as_fit(train_step.LLAMA2_7B, memory, batch=2, seq_len=4096)
    layers = work.llama.num_hidden_layers
    assert 5 < layers < 16  # 18 bytes of 202 M parameters a layer alone are 3.4 GiB
    one_more = {**train_step.LLAMA2_7B, "num_hidden_layers": layers + 1}
    limit = train_step.SHARE_OF_MEMORY * memory
    assert train_step.planned_memory(work, "cuda").total <= limit
    more = train_step.workload(one_more, batch=2, seq_len=4096)
    assert train_step.planned_memory(more, "cuda").total > limit
    whole = train_step.as_many_layers_as_fit(train_step.LLAMA2_7B, 2**40, batch=2, seq_len=4096)
    assert whole.llama.num_hidden_layers == 32


def test_speed_and_mfu_of_a_step():
    from benchmarks.gpu import train_step
    from benchmarks.gpu.tools import BASELINE, OURS

    work = train_step.workload(train_step.LLAMA2_7B, batch=1, seq_len=4096, num_batches=1)
    results = {
        BASELINE: train_step.Result(failure="OutOfMemoryError: full"),
        OURS: train_step.Result([0.5, 0.4, 0.6], [1.0, 1.0, 1.0], 2**30),
    }
    found = train_step.summary(work, results, "cuda", "h100-80gb")
    assert found["tools"][OURS]["tokens_per_s"] == 4096 / 0.5
    shares = found["tools"][OURS]["mfu"]
    assert shares["parameters"] == pytest.approx(8192 * 6 * 6_738_415_616 / 989e12, rel=1e-3)
    causal = 6 * (6_738_415_616 - 32000 * 4096 - 65 * 4096) + 6 * 32 * 4096 * 4096
    assert shares["causal_attention"] == pytest.approx(8192 * causal / 989e12, rel=1e-3)
    table = train_step.table(found)
    assert f"| {BASELINE} | failed: OutOfMemoryError: full |" in table
    assert f"| {OURS} | 8192 | 10240 |" in table and "of the plan" in table


def test_short_documents_are_the_same_tokens():
    import torch

    from benchmarks.gpu.tools import short_documents

    tokens = torch.arange(2 * 2048).view(2, 2048)
    batch = short_documents(tokens)
    lengths = batch.cu_seqlens.diff()
    assert int(lengths.sum()) == 4096 and len(lengths) > 5
    assert torch.equal(batch.tokens_T, tokens.flatten())
    first = batch.cu_seqlens[1]
    assert batch.loss_mask_T[first - 1] == 0 and int((batch.loss_mask_T == 0).sum()) == len(lengths)
    assert batch.positions_T[first] == 0 and batch.labels_T[0] == 1


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_every_part_runs_with_toy_sizes(tmp_path):
    command = ["bash", "benchmarks/gpu/run.sh", str(tmp_path / "out"), "--tiny"]
    environment = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "out/table.md").read_text()
    for each in day.parts(tiny=True):
        record = json.loads((tmp_path / f"out/{each.name}.json").read_text())
        assert set(record) == KEYS and record["status"] == "passed"
        assert "toy sizes" in record["machine"]["device"] and record["machine"]["torch"]
        assert f"## {each.title}" in table
        assert f"{record['machine']['device']}, {record['date']}" in table
    assert "| meditron-train, short documents | " in table and "idle" in table and "failed: " not in table
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and again.stdout.count("passed (before)") == 5
