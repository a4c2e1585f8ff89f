"""What goes to Slurm and what is made of its answers, with stand-ins for its commands that run the tasks here.

tests/slurm/test_corpus.py does the same on a real Slurm.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("datatrove")

from meditron_train.corpus.json_files import read_json
from tests.commands import Command
from tests.corpus.pipeline.corpora import article, nearly, source, write_jsonl

# The job is done when sbatch returns, so that squeue knows of none.
COMMANDS = {
    "sbatch": """
script="${@: -1}"
env | grep -q '^SLURM_MEM_PER_NODE=' && { echo "sbatch: fatal: memory given twice" >&2; exit 1; }
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
grep '^#SBATCH' "$script" >> "$STAND_IN_LOG"
for task in $(seq 0 "$last"); do
    SLURM_ARRAY_TASK_ID=$task RUN_OFFSET=0 SLURM_NODELIST=here SLURM_JOB_ID=7 bash "$script" >> "$STAND_IN_LOG" 2>&1
done
echo "Submitted batch job 7"
""",
    "srun": """
while [ "${1:0:1}" != / ]; do shift; done
exec "$@"
""",
    "scontrol": 'echo "$3"',
    "squeue": "exit 0",
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment with the stand-ins, and with what a batch job would pass on."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in COMMANDS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text.strip()}\n")
        (folder / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "STAND_IN_LOG": str(tmp_path / "log"),
        "SLURM_MEM_PER_NODE": "32768",
    }


def declare(root: Path, output: str) -> Path:
    records = [{"id": f"p{i}", "text": article(i)} for i in range(12)]
    records.append({"id": "near", "text": nearly(article(3), 1)})
    for part in range(2):
        write_jsonl(root / "papers" / f"{part}.jsonl", records[part::2])
    declared = {
        "name": "slurm",
        "output": str(root / output),
        "sources": [source("papers", root / "papers", validation=0.2)],
        "slurm": {
            "partition": "cpus",
            "account": "us",
            "poll_interval_s": 0.1,
            "sbatch_args": {"constraint": "fast"},
        },
    }
    path = root / f"{output}.yaml"
    path.write_text(yaml.safe_dump(declared))
    return path


def build(config: Path, environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "meditron_train", "corpus", "build", str(config), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def files(root: Path, output: str) -> dict[str, str]:
    found = read_json(root / output / "manifest.json")["files"]
    return {name: value for name, value in found.items() if name != "corpus.yaml"}


@pytest.mark.long
def test_the_same_bytes_through_slurms_commands(tmp_path: Path, slurm: dict[str, str]) -> None:
    broken = tmp_path / "papers" / "9.jsonl"
    config = declare(tmp_path, "slurm")
    broken.write_text("{not json\n")
    failed = build(config, slurm, "--executor", "slurm", "--tasks", "2", "--strict")
    assert failed.returncode == 1, failed.stderr
    assert "stage 'read'" in failed.stderr and "tasks failed in Slurm job 7" in failed.stderr
    finished = build(config, slurm, "--executor", "slurm", "--tasks", "2")
    assert finished.returncode == 0, finished.stderr + (tmp_path / "log").read_text()
    assert build(declare(tmp_path, "local"), dict(os.environ), "--workers", "1").returncode == 0
    assert files(tmp_path, "slurm") == files(tmp_path, "local")
    asked = (tmp_path / "log").read_text()
    for option in ("partition=cpus", "account=us", "constraint=fast", "array=0-1", "mem-per-cpu=2G"):
        assert f"#SBATCH --{option}\n" in asked
    assert "qos" not in asked


def test_a_missing_sbatch_is_one_message(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(Path(sys.executable).parent)}
    words = ["corpus", "build", declare(tmp_path, "slurm"), "--executor", "slurm"]
    failed = Command(*words, environment=environment)
    assert failed.wait(timeout=120) == 1
    assert "stage 'scan': sbatch failed" in failed.stderr and "Traceback" not in failed.stderr
