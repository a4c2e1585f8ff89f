"""`meditron-train convert`: its words, exit codes and output."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from meditron_train.cli.convert import app
from meditron_train.errors import UserError
from tests.checkpoint.tiny_llama import read_tensors, rewrite_tensors, write_tiny_llama

runner = CliRunner()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    write_tiny_llama(directory / "hf")
    for command in (["hf-to-megatron", "hf", "checkpoint"], ["megatron-to-hf", "checkpoint", "back"]):
        result = runner.invoke(app, [command[0], *(str(directory / name) for name in command[1:])])
        assert result.exit_code == 0, result.output
        assert "convert verify" in result.stderr
    return directory


def test_verify_equal(models: Path) -> None:
    result = runner.invoke(app, ["verify", str(models / "hf"), str(models / "back")])
    assert result.exit_code == 0
    assert "equal: 21 tensors" in result.stdout


def test_verify_different(models: Path, tmp_path: Path) -> None:
    spoilt = write_tiny_llama(tmp_path / "spoilt")
    tensors = read_tensors(spoilt)
    tensors["model.norm.weight"][11] += 1
    rewrite_tensors(spoilt, tensors)
    result = runner.invoke(app, ["verify", str(models / "checkpoint"), str(spoilt)])
    assert result.exit_code == 1
    assert "tensor model.norm.weight: 1 of 48 elements differ, first at [11]" in result.stdout
    result = runner.invoke(app, ["verify", "--json", str(models / "checkpoint"), str(spoilt)])
    document = json.loads(result.stdout)
    assert result.exit_code == 1
    assert document["equal"] is False
    assert [difference["name"] for difference in document["differences"]] == ["model.norm.weight"]


def test_verify_logits(models: Path) -> None:
    result = runner.invoke(app, ["verify", "--logits", str(models / "hf"), str(models / "checkpoint")])
    assert result.exit_code == 0
    assert "logits: max |Δ| 0.000e+00" in result.stdout


def test_inspect(models: Path, tmp_path: Path) -> None:
    result = runner.invoke(app, ["inspect", str(models / "checkpoint")])
    assert result.exit_code == 0
    for part in ("sharded", "step: 0", "decoder.final_layernorm.weight", "float32", "__0_0.distcp", "intact"):
        assert part in result.stdout
    result = runner.invoke(app, ["inspect", "--json", str(models / "hf")])
    assert json.loads(result.stdout)["format"] == "hugging-face"
    broken = write_tiny_llama(tmp_path / "broken")
    rewrite_tensors(broken, {"model.norm.weight": read_tensors(broken)["model.norm.weight"]})
    result = runner.invoke(app, ["inspect", str(broken)])
    assert result.exit_code == 1
    assert "BROKEN" in result.stdout
    assert "missing tensors: model.embed_tokens.weight" in result.stdout


def test_a_damaged_checkpoint_is_not_converted(models: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(models / "checkpoint", damaged)
    (damaged / "manifest.json").unlink()
    result = runner.invoke(app, ["megatron-to-hf", str(damaged), str(tmp_path / "new")])
    assert isinstance(result.exception, UserError)
    assert "manifest.json is missing" in str(result.exception)
    assert not (tmp_path / "new").exists()


def test_inspect_states_its_exit_codes(tmp_path: Path) -> None:
    said = " ".join(runner.invoke(app, ["inspect", "--help"]).stdout.split())
    assert "0 intact; 1 broken" in said and "2 not a model" in said
    assert main_exit_code("convert", "inspect", str(tmp_path)) == 2


def main_exit_code(*arguments: str) -> int:
    from meditron_train.cli.main import app as main_app

    return runner.invoke(main_app, arguments).exit_code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hf-to-megatron", "hf", "checkpoint"], "is not empty"),
        (["hf-to-megatron", "checkpoint", "new"], "config.json does not exist"),
        (["megatron-to-hf", "hf", "new"], "meta.json does not exist"),
        (["hf-to-megatron", "hf", "new", "--dtype", "int8"], "'int8' is unknown"),
        (["hf-to-megatron", "hf", "new", "--max-ram", "1KB"], "--max-ram is"),
        (["hf-to-megatron", "hf", "new", "--max-ram", "9" * 400 + "GB"], "is not a size"),
        (["megatron-to-hf", "checkpoint", "new", "--max-shard-size", "much"], "'much' is not a size"),
        (
            ["megatron-to-hf", "checkpoint", "new", "--vocab-size", "5"],
            "--vocab-size and --rotary are for those",
        ),
        (["reshard", "checkpoint", "new", "--rotary", "half"], "--vocab-size and --rotary are for those"),
        (["hf-to-megatron", "hf", "hf/new"], "lies inside"),
    ],
)
def test_mistakes(models: Path, arguments: list[str], message: str) -> None:
    paths = [str(models / argument) if i in (1, 2) else argument for i, argument in enumerate(arguments)]
    result = runner.invoke(app, paths)
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)
    assert not (models / "new").exists()


def test_an_output_path_that_cannot_be_is_the_users_mistake(models: Path) -> None:
    for target in (models / "hf" / "config.json" / "new", Path("/proc/new"), models / ("n" * 300)):
        assert main_exit_code("convert", "hf-to-megatron", str(models / "hf"), str(target)) == 2


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; import meditron_train.cli.convert; "
        "print([m for m in ('torch', 'transformers', 'megatron', 'rich') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
