"""`meditron-train plan` as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from meditron_train.cli.main import app

CONFIGS = Path(__file__).parents[2] / "configs"


def plan(*arguments: object):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


@pytest.mark.parametrize("name", ["llama2-7b", "llama2-13b", "llama2-70b", "meditron-7b", "meditron-70b"])
def test_every_preset_can_be_planned_without_its_model_or_data(name):
    result = plan(CONFIGS / f"{name}.yaml", "--json")
    assert result.exit_code == 0, result.output
    described = json.loads(result.stdout)
    assert described["fits"] and described["tokens_per_second"] > 0
    assert described["memory_bytes"][0]["total"] <= described["memory_available_bytes"]
    assert described["run"]["gpu_hours"] == pytest.approx(
        described["run"]["seconds"] * described["num_gpus"] / 3600
    )


def test_the_meditron_run():
    described = json.loads(
        plan(CONFIGS / "meditron-70b.yaml", "--gpus", 128, "--gpu", "a100-80gb", "--json").stdout
    )
    assert described["layout"] == {"tensor": 8, "pipeline": 8, "context": 1, "data": 2}
    assert 30_000 < described["run"]["gpu_hours"] < 50_000  # published: 42,496
    assert described["num_parameters"] == 68_976_648_192 + 2 * 12 * 8192  # the special tokens' rows


def test_the_length_is_that_of_the_run():
    """From tokens alone; an epoch is not known without the data."""
    preset = yaml.safe_load((CONFIGS / "llama2-7b.yaml").read_text())["train"]
    per_step = preset["seq_len"] * preset["global_batch_size"]
    words = (CONFIGS / "llama2-7b.yaml", "train.steps=null", "--gpus", 8)
    assert "run       12,300 steps in" in plan(*words, f"train.tokens={12299 * per_step + 1}").output
    unknown = plan(*words, "train.epochs=2")
    assert unknown.exit_code == 0
    assert "run       the number of steps is not known here" in unknown.output
    assert json.loads(plan(*words, "train.epochs=2", "--json").stdout)["run"] is None


def test_an_impossible_layout_says_what_to_change():
    result = plan(CONFIGS / "meditron-70b.yaml", "--gpus", 100)
    assert result.exit_code == 2
    assert "start a multiple of 64" in result.output


def test_what_does_not_fit_is_said():
    result = plan(CONFIGS / "meditron-70b.yaml", "parallel.pipeline=1", "--gpus", 8, "--gpu", "a100-80gb")
    assert result.exit_code == 0
    assert "DOES NOT FIT" in result.output


def test_search_gives_overrides_that_plan_takes():
    found = json.loads(
        plan(CONFIGS / "meditron-70b.yaml", "--gpus", 64, "--gpu", "h100-80gb", "--search", "--json").stdout
    )
    best = found["candidates"][0]
    again = json.loads(
        plan(
            CONFIGS / "meditron-70b.yaml", *best["overrides"], "--gpus", 64, "--gpu", "h100-80gb", "--json"
        ).stdout
    )
    assert again["fits"]
    assert again["tokens_per_second"] == pytest.approx(best["tokens_per_second"])


def test_a_run_calibrates(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shape = yaml.safe_load((CONFIGS / "llama2-7b.yaml").read_text())
    shape["model"]["from"] = "models/Llama-2-7b-hf"
    shape["data"] = {"tokenizer": "none", "train": [{"name": "none", "path": "none"}]}
    (run / "config.yaml").write_text(yaml.safe_dump(shape))
    (run / "provenance.jsonl").write_text('{"launch": {"world_size": 8}}\n')
    first = json.loads(plan(run / "config.yaml", "--gpus", 8, "--gpu", "h100-80gb", "--json").stdout)
    measured = 1.25 * first["step_time_s"]
    lines = [json.dumps({"step": n, "step_time_s": 99.0 if n < 5 else measured}) for n in range(20)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    arguments = (run / "config.yaml", "--gpus", 8, "--gpu", "h100-80gb", "--calibrate", run, "--json")
    calibrated = json.loads(plan(*arguments).stdout)
    assert calibrated["step_time_s"] == pytest.approx(measured, rel=0.05)


def test_bad_input_is_one_message(tmp_path):
    for arguments, message in (
        ((CONFIGS / "meditron-70b.yaml", "--gpu", "h1000"), "Did you mean h100-80gb"),
        ((CONFIGS / "meditron-70b.yaml", "--search"), "--gpus"),
        ((CONFIGS / "meditron-70b.yaml", "model.from=nowhere"), "not named after a published model"),
        ((CONFIGS / "meditron-70b.yaml", "--calibrate", tmp_path), "cannot calibrate"),
        ((CONFIGS / "meditron-70b.yaml", "train.micro_batch_size=-1"), "micro_batch_size"),
    ):
        result = plan(*arguments)
        assert result.exit_code == 2, result.output
        assert message in result.output
        assert "Traceback" not in result.output


def test_torch_is_not_imported_for_a_preset():
    code = (
        "import sys; from meditron_train.cli.main import app; from typer.testing import CliRunner; "
        f"assert CliRunner().invoke(app, ['plan', {str(CONFIGS / 'meditron-70b.yaml')!r}]).exit_code == 0; "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
