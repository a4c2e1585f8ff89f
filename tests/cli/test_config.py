"""`meditron-train config` and `launch-scripts`."""

from __future__ import annotations

import os

import yaml
from typer.testing import CliRunner

from meditron_train.cli.main import app
from meditron_train.config.load import load_config
from meditron_train.files import shipped


def invoke(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_presets_are_listed_shown_and_written(tmp_path, monkeypatch):
    listed = invoke("config", "list").stdout
    assert "meditron-70b" in listed and "corpus/gap-replay " in listed
    shown = invoke("config", "show", "llama2-7b").stdout
    assert shown == (shipped("configs") / "llama2-7b.yaml").read_text()
    assert invoke("config", "show", "schema").stdout.startswith("{")
    assert invoke("config", "init", "llama2-7b", tmp_path / "run.yaml").exit_code == 0
    assert load_config(tmp_path / "run.yaml").train.seq_len == 4096 and (tmp_path / "schema.json").exists()
    again = invoke("config", "init", "llama2-7b", tmp_path / "run.yaml")
    assert again.exit_code == 2 and "is there already" in again.stderr
    unknown = invoke("config", "show", "llama3")
    assert unknown.exit_code == 2 and "llama2-7b" in unknown.stderr


def test_megatrons_arguments_become_yaml_with_comments():
    done = invoke("config", "from-megatron", "--lr", "3e-4", "--swiglu", "--no-such-thing", "7")
    assert done.exit_code == 0
    assert yaml.safe_load(done.stdout)["optimizer"]["lr"] == 3e-4
    assert "#   --swiglu: the model's family says it" in done.stdout
    assert "# Without an equal here:\n#   --no_such_thing 7" in done.stdout


def test_a_name_that_looks_like_a_number_loads_again(tmp_path):
    line = "--save runs/a --wandb-exp-name 3e-4 --load m --tokenizer-model t --data-path d"
    (tmp_path / "run.yaml").write_text(invoke("config", "from-megatron", *line.split()).stdout)
    assert load_config(tmp_path / "run.yaml").logging.wandb_name == "3e-4"


def test_launch_scripts_are_written_and_never_replaced(tmp_path):
    (tmp_path / "train.sbatch").write_text("mine")
    done = invoke("launch-scripts", tmp_path)
    assert done.exit_code == 0 and f"kept     {tmp_path / 'train.sbatch'}" in done.stdout
    assert (tmp_path / "train.sbatch").read_text() == "mine"
    assert os.access(tmp_path / "local.sh", os.X_OK)
    assert not (tmp_path / "cluster.env").exists()
