"""`meditron-train preflight` on one node, and on several that are processes of this machine."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from meditron_train.checkpoint.manifest import write_manifest
from meditron_train.flows.preflight import load_and_check
from tests.commands import Command
from tests.distributed import free_port
from tests.refusal import refused


@pytest.fixture
def config(tmp_path) -> Path:
    for name in ("corpus.bin", "corpus.idx"):
        (tmp_path / name).touch()
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").touch()
    shape = {"hidden_size": 64}
    values = {
        "model": {"init": "random", "hf_config": shape},
        "data": {
            "tokenizer": str(tmp_path / "tok"),
            "train": [{"name": "c", "path": str(tmp_path / "corpus")}],
        },
        "logging": {"run_dir": str(tmp_path / "runs" / "tiny")},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def start(config: Path, *words: str, **environment: str) -> Command:
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RANK", "MASTER_"))}
    return Command("preflight", config, *words, environment={**variables, **environment})


def as_node(number: int, count: int, port: int, **environment: str) -> dict[str, str]:
    """What srun gives to the task of a node."""
    return {
        "SLURM_JOB_ID": "1",
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": str(number),
        "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_STEP_TASKS_PER_NODE": f"1(x{count})",
        "SLURM_STEP_NODELIST": f"n[0-{count - 1}]",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        **environment,
    }


def test_without_a_number_of_ranks_there_is_one_for_each_gpu(config, tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(
        '#!/bin/sh\nfor i in 0 1 2 3; do echo "$i, NVIDIA H100, 580"; done\n'
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("NPROC_PER_NODE", raising=False)
    settings, _ = load_and_check(config, ["parallel.tensor=4"])
    assert settings.parallel.tensor == 4
    with refused("world size 4 is not divisible"):
        load_and_check(config, ["parallel.tensor=8"])
    monkeypatch.setenv("NPROC_PER_NODE", "8")
    load_and_check(config, ["parallel.tensor=8"])


def test_one_node(config, tmp_path):
    process = start(config, "--report-dir", str(tmp_path / "report"))
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "TFLOP/s" in output
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    (facts,) = report["nodes"].values()
    assert facts["problems"] == [] and facts["matmul_tflops"] > 0
    assert (tmp_path / "report" / "run_dir").read_text() == f"{tmp_path}/runs/tiny\n"
    assert len((tmp_path / "report" / "nodes").read_text().split()) == 1
    assert (tmp_path / "report" / "bad").read_text() == ""


@pytest.mark.long
def test_three_nodes_of_which_one_is_unfit_and_one_is_silent(config, tmp_path):
    """Node 2 has too few GPUs by its nvidia-smi; node 3 was never started: the other two measure their link."""
    port, report = free_port(), tmp_path / "report"
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "nvidia-smi").write_text("#!/bin/sh\necho broken driver\nexit 9\n")
    (programs / "nvidia-smi").chmod(0o755)
    words = ("--report-dir", str(report), "--timeout", "30")
    sick = {"PATH": f"{programs}:{os.environ['PATH']}"}
    processes = [
        start(config, *words, **as_node(number, 4, port, **(sick if number == 2 else {})))
        for number in range(3)
    ]
    output, errors = processes[0].communicate(timeout=200)
    for process in processes[1:]:
        process.communicate(timeout=100)
    assert processes[0].returncode == 1, errors
    assert (report / "nodes").read_text().split() == ["n0", "n1"]
    bad = dict(line.split(" ", 1) for line in (report / "bad").read_text().splitlines())
    assert set(bad) == {"n2", "n3"}
    assert "nvidia-smi failed: broken driver" in bad["n2"] and bad["n3"] == "no answer"
    found = json.loads((report / "report.json").read_text())
    assert found["bandwidth_gb_s"] > 0 and set(found["clock_skew_s"]) == {"n0", "n1"}
    assert "BAD: no answer" in output


def test_two_nodes_that_lack_the_same_file_are_not_called_bad(config, tmp_path):
    """The mistake is the user's: exit code 2 from the node that speaks, and the file's name."""
    (tmp_path / "corpus.bin").unlink()
    port, report = free_port(), tmp_path / "report"
    words = ("--report-dir", str(report), "--timeout", "150")
    processes = [start(config, *words, **as_node(number, 2, port)) for number in range(2)]
    outputs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [2, 0], outputs
    assert "corpus.bin" in (report / "problems").read_text()
    assert f"on all nodes: data.train 'c': missing {tmp_path}/corpus.bin" in outputs[0][0]


def test_a_network_check_that_fails_is_a_problem_of_the_run(config, tmp_path):
    """Both nodes are well, and cannot talk over the interface that gloo is told to take."""
    port, report = free_port(), tmp_path / "report"
    words = ("--report-dir", str(report), "--timeout", "150")
    processes = [
        start(config, *words, **as_node(number, 2, port, GLOO_SOCKET_IFNAME="none0")) for number in range(2)
    ]
    outputs = [process.communicate(timeout=200) for process in processes]
    assert processes[0].returncode == 1, outputs
    assert "the network check failed: " in (report / "problems").read_text()


@pytest.mark.long
def test_a_node_without_a_first_node_says_so(config, tmp_path):
    process = start(config, "--timeout", "5", **as_node(1, 2, free_port()))
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 4 and "no answer from the first node" in errors


def test_a_missing_file_on_one_node_alone(config, tmp_path):
    (tmp_path / "corpus.bin").unlink()
    process = start(config, "--report-dir", str(tmp_path / "report"))
    process.communicate(timeout=120)
    assert process.returncode == 2 and "corpus.bin" in (tmp_path / "report" / "problems").read_text()


LENGTH = f"train.tokens={1000 * 16 * 2048 - 1}"  # 1000 steps


@pytest.fixture
def finished_run(tmp_path) -> Path:
    """The directory of a run that has done its 1000 steps, without an export."""
    run_dir = tmp_path / "runs" / "tiny"
    for step in (500, 1000):
        checkpoint = run_dir / "checkpoints" / f"step_{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "__0_0.distcp").write_text(f"weights of step {step}")
        write_manifest(checkpoint)
    (run_dir / "status.json").write_text('{"state": "done"}')
    return run_dir


def export_of(checkpoint: Path, directory: Path) -> None:
    """An export in so far as it says what it was made of."""
    directory.mkdir(exist_ok=True)
    digest = hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest()
    write_manifest(directory, extra={"source": {"format": "sharded", "manifest_sha256": digest}})


def is_finished(config: Path, report: Path, *words: str) -> bool:
    shutil.rmtree(report, ignore_errors=True)
    process = start(config, "--report-dir", str(report), LENGTH, *words)
    assert process.wait(timeout=120) == 0, process.stderr
    return (report / "finished").exists()


def test_a_finished_run_is_recognized(config, tmp_path, finished_run):
    report, without_export = tmp_path / "report", "checkpoint.export_hf=false"
    assert is_finished(config, report, without_export)
    assert not is_finished(config, report)  # it is still to be exported
    export_of(finished_run / "checkpoints" / "step_00001000", finished_run / "hf")
    assert is_finished(config, report)
    assert not is_finished(config, report, "--from-step", "500")
    shutil.rmtree(finished_run / "checkpoints" / "step_00001000")
    assert not is_finished(config, report, without_export)


def test_a_run_with_checkpoints_does_without_its_base_model(config, tmp_path, finished_run):
    (finished_run / "checkpoints" / "step_00001000" / "meta.json").write_text("{}")
    write_manifest(finished_run / "checkpoints" / "step_00001000")
    gone = ("model.init=pretrained", "model.hf_config=null", f"model.from={tmp_path / 'gone'}")
    assert not is_finished(config, tmp_path / "report", *gone)
    process = start(config, *gone, f"logging.run_dir={tmp_path / 'new'}")
    assert process.wait(timeout=120) == 2 and "model.from: there is no directory" in process.stdout


def test_a_longer_run_whose_last_export_failed_is_not_finished(config, tmp_path, finished_run):
    """The last step is published before the export; hf/ is that of the steps before train.steps was raised."""
    (finished_run / "checkpoints" / "latest").write_text("step_00001000\n")
    export_of(finished_run / "checkpoints" / "step_00000500", finished_run / "hf")
    assert not is_finished(config, tmp_path / "report")
    (finished_run / "status.json").write_text('{"state": "failed"}')
    assert not is_finished(config, tmp_path / "report", "checkpoint.export_hf=false")


def test_a_wrong_configuration(config):
    process = start(config, "parallel.tensor=3")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "world size 1 is not divisible" in errors and "Traceback" not in errors


def test_more_than_one_task_per_node(config):
    environment = as_node(0, 2, 1) | {"SLURM_STEP_NODELIST": "n0", "SLURM_STEP_TASKS_PER_NODE": "2"}
    process = start(config, **environment)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "one task per node" in errors
