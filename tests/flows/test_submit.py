"""`meditron-train submit`: what it checks, what it prints, and the example in docs/guides/slurm.md."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from meditron_train.cli.main import app
from meditron_train.flows.submit import job_name

REPOSITORY = Path(__file__).parents[2]
SHAPE_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
PRESET = "configs/meditron-70b.yaml"


@pytest.fixture
def submit(tmp_path, monkeypatch):
    """submit(*words) → the finished command, in a directory with launch/ and configs/ of the repository."""
    model = tmp_path / "Llama-2-70b-hf"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SHAPE_70B))
    monkeypatch.setenv("LLAMA2_70B", str(model))
    monkeypatch.delenv("CLUSTER_ENV", raising=False)
    for name in ("launch", "configs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    monkeypatch.chdir(tmp_path)

    def run(*words: str):
        return CliRunner().invoke(app, ["submit", *words])

    return run


def test_the_example_of_the_documentation(submit, tmp_path):
    text = (REPOSITORY / "docs" / "guides" / "slurm.md").read_text()
    match = re.search(
        r"submit-example: begin -->\n```console\n\$ meditron-train (.*)\n((?:.|\n)*?)```\n<!-- submit", text
    )
    command, shown = match[1], match[2]
    done = submit(*shlex.split(command)[1:])
    assert done.exit_code == 0, done.output
    printed = (done.stderr.partition("\n\n")[0] + "\n" + done.stdout).replace(
        str(tmp_path), "/home/you/meditron-train"
    )
    assert printed.splitlines() == shown.splitlines()


def test_the_dry_run_submits_and_writes_nothing(submit, tmp_path):
    before = set(tmp_path.iterdir())
    done = submit(PRESET, "--nodes", "16", "--dry-run")
    assert done.exit_code == 0 and set(tmp_path.iterdir()) == before
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True).returncode == 0
    assert "not submitted" in done.stderr and "#SBATCH" not in done.stderr


def test_as_few_nodes_as_layout_and_memory_allow(submit):
    assert (
        "#SBATCH --nodes=8\n" in submit(PRESET, "--gpu", "a100-80gb", "--dry-run").stdout
    )  # 8 x 8 x 8 ranks
    assert "#SBATCH --nodes=16\n" in submit(PRESET, "--gpus-per-node", "4", "--dry-run").stdout


def test_a_length_that_is_not_known_here_is_said(submit):
    assert "number of steps" not in submit(PRESET, "--dry-run").stderr
    done = submit(PRESET, "train.steps=null", "train.epochs=1", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "the number of steps is not known here" in done.stderr


def test_what_does_not_fit_takes_no_node(submit):
    done = submit(PRESET, "--nodes", "1", "--gpu", "h100-80gb", "parallel.pipeline=1")
    assert (
        done.exit_code == 2 and "this does not fit" in done.stderr and "Raise parallel.tensor" in done.stderr
    )


def test_a_wrong_layout_takes_no_node(submit):
    done = submit(PRESET, "--nodes", "3", "--dry-run")
    assert done.exit_code == 2 and "world size 24 is not divisible" in done.stderr


@pytest.mark.parametrize("override", ["parallel.pipeline=128", "parallel.virtual_pipeline=3"])
def test_a_model_that_cannot_be_split_takes_no_node(submit, override):
    done = submit(PRESET, override, "--gpu", "a100-80gb", "--dry-run")
    assert done.exit_code == 2 and "80 layers are" in done.output


def test_missing_files_are_told_when_it_is_meant(submit):
    done = submit(PRESET, "--nodes", "16")
    assert done.exit_code == 2 and "neither tokenizer.model nor tokenizer.json" in done.stderr


def test_a_model_that_is_not_here_is_not_checked_and_that_is_said(submit, monkeypatch):
    monkeypatch.setenv("LLAMA2_70B", "/not/here")
    done = submit(PRESET, "--nodes", "16", "--gpu", "a100-80gb", "--dry-run")
    assert done.exit_code == 0 and "memory: not checked, as /not/here is not on this machine" in done.stderr


def test_the_files_that_the_clusters_settings_name_are_known(submit, tmp_path, monkeypatch):
    """The presets read LLAMA2_70B and GAP_REPLAY, which launch/cluster.env sets."""
    model = tmp_path / "Llama-2-70b-hf"
    monkeypatch.setenv("GAP_REPLAY", "")  # put back afterwards
    for name in ("LLAMA2_70B", "GAP_REPLAY"):
        monkeypatch.delenv(name)
    (tmp_path / "our.env").write_text(f"export LLAMA2_70B={model}\nexport GAP_REPLAY=/data/gap\n")
    monkeypatch.setenv("CLUSTER_ENV", str(tmp_path / "our.env"))
    done = submit(PRESET, "--nodes", "16", "--gpu", "a100-80gb", "--dry-run")
    assert done.exit_code == 0 and "memory: about" in done.stderr, done.output


def test_a_job_can_go_back(submit):
    done = submit(PRESET, "--from-step", "100", "--dry-run")
    assert done.exit_code == 0 and f"train.sbatch {PRESET} --from-step 100\n" in done.stdout


def test_more_ranks_than_gpus(submit):
    done = submit(PRESET, "--gpus-per-node", "4", "--ranks-per-node", "8", "--dry-run")
    assert done.exit_code == 2 and "at most one process per GPU" in done.stderr


@pytest.fixture
def tiny(submit, tmp_path, monkeypatch):
    """tiny(model) → tiny.yaml of a run of that model, whose other files are there; and an sbatch that says 4711."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text("#!/bin/sh\necho 4711\n")
    (programs / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    for name in ("corpus.bin", "corpus.idx"):
        (tmp_path / name).touch()
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").touch()

    def write(model: dict) -> str:
        data = "data: {tokenizer: tok, train: [{name: c, path: corpus}]}\n"
        (tmp_path / "tiny.yaml").write_text(f"model: {json.dumps(model)}\n{data}")
        return "tiny.yaml"

    return write


def test_a_run_whose_base_model_is_gone_goes_on_from_its_checkpoint(submit, tiny, tmp_path):
    from meditron_train.checkpoint.convert.from_hf import hf_to_sharded
    from tests.checkpoint.tiny_llama import write_tiny_llama

    words = (tiny({"from": "gone"}), "--nodes", "1", "--gpus-per-node", "0", "train.seq_len=64")
    done = submit(*words)
    assert done.exit_code == 2 and "model.from: there is no directory gone" in done.stderr
    checkpoint = tmp_path / "runs" / "tiny" / "checkpoints" / "step_00000010"
    checkpoint.parent.mkdir(parents=True)
    hf_to_sharded(write_tiny_llama(tmp_path / "base"), checkpoint)
    done = submit(*words)
    assert done.exit_code == 0 and "memory: about" in done.stderr, done.output
    done = submit(*words, "lora.rank=2")  # adapters need it
    assert done.exit_code == 2 and "model.from: there is no directory gone" in done.stderr


def test_a_submitted_run_says_how_to_follow_it(submit, tiny, tmp_path):
    shape = {**SHAPE_70B, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    done = submit(
        tiny({"init": "random", "hf_config": shape}), "--nodes", "2", "--gpus-per-node", "0", "--chain", "2"
    )
    assert done.exit_code == 0, done.output
    for words in (
        "Submitted job 4711, then 4711",
        "squeue --name tiny",
        "touch runs/tiny/stop",
        "scancel --name tiny",
    ):
        assert words in done.stdout
    assert "--nodes=2" in (tmp_path / "logs" / "tiny.sbatch").read_text()


@pytest.mark.parametrize(("run_dir", "name"), [(".", None), ("runs/my run", "my_run"), ("/", "train")])
def test_every_run_directory_gives_the_job_a_name(run_dir, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert job_name(Path(run_dir)) == (name or re.sub(r"[^A-Za-z0-9_.-]", "_", tmp_path.name))
