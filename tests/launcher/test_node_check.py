"""A node's own examination, with an nvidia-smi of our own."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from meditron_train.launcher import node_check
from meditron_train.launcher.node_check import (
    NodeFacts,
    Problem,
    ProblemKind,
    code_hash,
    examine_node,
    gpu_health,
)

FIELDS = ["index", "name", "driver_version", *node_check._HEALTH]
HEALTHY = ["0", "NVIDIA H100", "560.1", "0", "No", "0", "0", "Not Active", "Not Active"]


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """nvidia_smi(rows, known=fields, code=0): puts a fake of that name on PATH."""

    def install(
        rows: list[list[str]], known=tuple(node_check._HEALTH), code: int = 0, says: str = ""
    ) -> None:
        lines = "\n".join(", ".join(row) for row in rows)
        help_text = "\n".join(f'"{name}"' for name in known)
        program = tmp_path / "nvidia-smi"
        program.write_text(
            f"#!/bin/sh\ncase $1 in --help-query-gpu) cat <<'E'\n{help_text}\nE\nexit 0;; esac\n"
            f"cat <<'E'\n{lines}{says}\nE\nexit {code}\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return install


def changed(field: str, value: str) -> list[str]:
    row = list(HEALTHY)
    row[FIELDS.index(field)] = value
    return row


def test_healthy_gpus(nvidia_smi):
    nvidia_smi([HEALTHY, ["1", *HEALTHY[1:]]])
    problems: list[Problem] = []
    assert gpu_health(problems) == (["NVIDIA H100"] * 2, "560.1")
    assert problems == []


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("ecc.errors.uncorrected.volatile.total", "3", "uncorrected memory errors"),
        ("retired_pages.pending", "Yes", "needs a reset"),
        ("remapped_rows.failure", "1", "cannot be remapped"),
        ("clocks_throttle_reasons.hw_thermal_slowdown", "Active", "too hot"),
    ],
)
def test_a_sick_gpu_is_named(nvidia_smi, field, value, said):
    nvidia_smi([HEALTHY, ["1", *changed(field, value)[1:]]])
    problems: list[Problem] = []
    gpu_health(problems)
    (problem,) = problems
    assert (problem.kind, problem.subject) == (ProblemKind.GPU, f"1 {field}")
    assert (
        problem.text.startswith("GPU 1: ") and said in problem.text and f"{field} = {value}" in problem.text
    )


@pytest.mark.parametrize("value", ["[N/A]", "[Not Supported]"])
def test_what_a_gpu_does_not_have_is_no_problem(nvidia_smi, value):
    nvidia_smi([changed("ecc.errors.uncorrected.volatile.total", value)])
    problems: list[Problem] = []
    gpu_health(problems)
    assert problems == []


def test_fields_that_a_driver_does_not_know_are_not_asked_for(nvidia_smi):
    nvidia_smi([HEALTHY[:4]], known=("ecc.errors.uncorrected.volatile.total",))
    problems: list[Problem] = []
    assert gpu_health(problems)[0] == ["NVIDIA H100"]
    assert problems == []


def test_a_driver_that_fails(nvidia_smi):
    nvidia_smi(
        [], code=9, says="NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
    )
    problems: list[Problem] = []
    assert gpu_health(problems) == ([], None)
    assert "couldn't communicate" in problems[0].text


def test_a_node_without_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    facts = examine_node("n1", tmp_path / "runs" / "new", num_ranks=2)
    assert facts.problems == () and facts.num_gpus == 0 and facts.matmul_tflops > 0
    assert facts.versions["torch"] and facts.versions["our code"] == code_hash()
    assert not list(tmp_path.iterdir())  # the test file is gone
    assert NodeFacts.from_json(facts.to_json()) == facts


def test_fewer_gpus_than_ranks(nvidia_smi, tmp_path, monkeypatch):
    nvidia_smi([HEALTHY])
    monkeypatch.setattr(node_check, "measure_speed", lambda num_gpus: (500.0, None))
    text = "8 ranks are to run here, but there are 1 GPUs"
    assert Problem(ProblemKind.GPU_COUNT, text) in examine_node("n1", tmp_path, num_ranks=8).problems


def test_a_gpu_that_cannot_multiply(nvidia_smi, tmp_path, monkeypatch):
    def broken(num_gpus):
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    nvidia_smi([HEALTHY])
    monkeypatch.setattr(node_check, "measure_speed", broken)
    text = "a matrix product failed: CUDA error: an illegal memory access"
    assert Problem(ProblemKind.COMPUTE, text) in examine_node("n1", tmp_path, num_ranks=1).problems


def test_no_space_and_no_permission(tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(node_check.shutil, "disk_usage", lambda path: usage(1, 1, 2**20))
    blocked = tmp_path / "file"
    blocked.write_text("")
    facts = examine_node("n1", blocked / "run", num_ranks=1, missing_files=["missing corpus.bin"])
    assert facts.file_problems == (
        Problem(ProblemKind.MISSING_FILE, "missing corpus.bin"),
        Problem(ProblemKind.DISK_SPACE, f"less than 5 GiB of disk are free at {blocked / 'run'}"),
        Problem(ProblemKind.NOT_WRITABLE, f"cannot write to {blocked}: Not a directory"),
    )
    assert NodeFacts.from_json(json.loads(json.dumps(facts.to_json()))) == facts
    assert any(
        problem.kind is ProblemKind.SHARED_MEMORY and "/dev/shm" in problem.text for problem in facts.problems
    )


def test_a_directory_that_cannot_be_looked_at_is_a_problem(tmp_path, monkeypatch):
    def stale(path):
        raise OSError(116, "Stale file handle", str(path))

    problems: list[Problem] = []
    monkeypatch.setattr(node_check.shutil, "disk_usage", stale)
    assert node_check._free_gib(tmp_path / "run", problems) == 0
    assert problems == [Problem(ProblemKind.NOT_WRITABLE, f"cannot write to {tmp_path}: Stale file handle")]


def test_two_jobs_on_one_node_do_not_take_each_other_s_probe(tmp_path):
    problems: list[Problem] = []
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: node_check._free_gib(tmp_path / "run", problems), range(400)))
    assert problems == [] and list(tmp_path.iterdir()) == []
