"""The corpus pipeline through datatrove's Slurm executor: the same bytes as on one machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("datatrove")

from meditron_train.corpus.json_files import read_json
from tests.corpus.pipeline.corpora import article, nearly, source, write_jsonl
from tests.slurm.cluster import SlurmCluster, cannot_run
from tests.slurm.run import prepare

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster():
    reason = cannot_run()
    if reason:
        pytest.skip(reason)
    with SlurmCluster(Path("/tmp/meditron-slurm"), num_nodes=2) as cluster:
        yield cluster


def declare(root: Path, output: str) -> Path:
    records = [{"id": f"p{i}", "text": article(i)} for i in range(40)]
    records += [{"id": f"n{i}", "text": nearly(article(i, 12), i)} for i in range(5)]
    for part in range(3):
        write_jsonl(root / "papers" / f"{part}.jsonl", records[part::3])
    write_jsonl(root / "quiz.jsonl", [{"question": " ".join(article(7).split()[:30])}])
    declared = {
        "name": "slurm",
        "output": str(root / output),
        "sources": [source("papers", root / "papers", validation=0.1)],
        "decontamination": {"benchmarks": [{"name": "quiz", "path": str(root / "quiz.jsonl")}]},
        "slurm": {
            "partition": "normal",
            "time": "00:10:00",
            "mem_per_cpu_gb": 1,
            "poll_interval_s": 1.0,
            "sbatch_args": {"export": "ALL"},
        },
    }
    path = root / f"{output}.yaml"
    path.write_text(yaml.safe_dump(declared))
    return path


def build(config: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "meditron_train", "corpus", "build", str(config), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def files(root: Path, output: str) -> dict[str, str]:
    found = read_json(root / output / "manifest.json")["files"]
    return {name: value for name, value in found.items() if name != "corpus.yaml"}


def test_the_same_bytes_as_on_one_machine(cluster: SlurmCluster, tmp_path: Path) -> None:
    local = build(declare(tmp_path, "local"), "--workers", "1")
    assert local.returncode == 0, local.stderr
    slurm = build(declare(tmp_path, "slurm"), "--executor", "slurm", "--tasks", "2")
    logs = "\n".join(path.read_text() for path in (tmp_path / "slurm").rglob("slurm_logs/*.out"))
    assert slurm.returncode == 0, slurm.stderr + logs
    assert files(tmp_path, "slurm") == files(tmp_path, "local")


def test_a_failed_task_ends_the_build_and_a_new_start_continues(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    config = declare(tmp_path, "slurm")
    broken = tmp_path / "papers" / "9.jsonl"
    broken.write_text("{not json\n")
    failed = build(config, "--executor", "slurm", "--tasks", "2", "--strict")
    assert failed.returncode == 1, failed.stderr
    assert "tasks failed in Slurm job" in failed.stderr and "slurm_logs" in failed.stderr
    finished = build(config, "--executor", "slurm", "--tasks", "2")
    assert finished.returncode == 0, finished.stderr
    assert read_json(tmp_path / "slurm" / "manifest.json")["sources"][0]["problems"] == {"broken_json": 1}


def test_the_batch_script_drives_the_build(cluster: SlurmCluster, tmp_path: Path) -> None:
    """The job submits the arrays beside itself, and ends when the corpus is there."""
    assert build(declare(tmp_path, "local"), "--workers", "1").returncode == 0
    directory = prepare(tmp_path / "submitted")
    small = ["--cpus-per-task=1", "--mem=500M", "--time=10:00", f"--output={directory}/job.out"]
    command = [
        "sbatch",
        "--wait",
        *small,
        "launch/corpus.sbatch",
        str(declare(tmp_path, "slurm")),
        "--tasks",
        "2",
    ]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}
    done = subprocess.run(command, capture_output=True, text=True, cwd=directory, env=environment)
    said = "\n".join(path.read_text() for path in directory.rglob("*.out"))
    assert done.returncode == 0, done.stderr + said
    assert files(tmp_path, "slurm") == files(tmp_path, "local")
