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


@pytest.fixture
def run(tmp_path):
    """A run on 8 GPUs without lines in metrics.jsonl."""
    directory = tmp_path / "run"
    directory.mkdir()
    shape = yaml.safe_load((CONFIGS / "llama2-7b.yaml").read_text())
    shape["model"]["from"] = "models/Llama-2-7b-hf"
    shape["data"] = {"tokenizer": "none", "train": [{"name": "none", "path": "none"}]}
    (directory / "config.yaml").write_text(yaml.safe_dump(shape))
    (directory / "provenance.jsonl").write_text('{"launch": {"world_size": 8}}\n')
    return directory


def write_times(run, times, first_step=1):
    lines = [
        json.dumps({"step": step, "step_time_s": seconds}) for step, seconds in enumerate(times, first_step)
    ]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def planned(run, *arguments):
    result = plan(run / "config.yaml", "--gpus", 8, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


ON_H100 = ("--gpu", "h100-80gb")


def test_a_run_calibrates(run):
    measured = 1.25 * planned(run, *ON_H100)["step_time_s"]
    write_times(run, [99.0] * 5 + [measured] * 15)
    calibrated = planned(run, *ON_H100, "--calibrate", run)
    assert calibrated["step_time_s"] == pytest.approx(measured, rel=0.05)


def test_a_run_calibrates_by_its_last_start(run):
    """Sixty steps on eight GPUs, then ten on sixteen."""
    launches = [{"world_size": 8, "resumed_after_step": 0}, {"world_size": 16, "resumed_after_step": 60}]
    (run / "provenance.jsonl").write_text(
        "".join(json.dumps({"launch": launch}) + "\n" for launch in launches)
    )
    on_sixteen = json.loads(plan(run / "config.yaml", "--gpus", 16, *ON_H100, "--json").stdout)
    measured = 1.25 * on_sixteen["step_time_s"]
    write_times(run, [99.0] * 65 + [measured] * 5)
    calibrated = json.loads(
        plan(run / "config.yaml", "--gpus", 16, *ON_H100, "--calibrate", run, "--json").stdout
    )
    assert calibrated["step_time_s"] == pytest.approx(measured, rel=0.05)


def test_a_run_calibrates_by_the_batch_that_it_reached(run):
    """100 steps of 128 samples before the first of the full 256."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["train"] |= {
        "global_batch_size": 256,
        "batch_ramp": {"start": 128, "increment": 128, "samples": 12800},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    half, full = (
        planned(run, *ON_H100, f"train.global_batch_size={size}", "train.batch_ramp=null")["step_time_s"]
        for size in (128, 256)
    )
    write_times(run, [1.25 * half] * 100)  # of the ramp alone
    calibrated = planned(run, *ON_H100, "--calibrate", run)
    assert calibrated["step_time_s"] == pytest.approx(1.25 * full, rel=0.05)
    write_times(run, [1.25 * half] * 100 + [1.25 * full] * 20)
    assert planned(run, *ON_H100, "--calibrate", run) == calibrated


def test_documents_of_the_run_are_short_too(run):
    """A run of documents of 256 tokens calibrates a plan of the same documents."""
    documents = ("--document-tokens", 256)
    measured = 1.25 * planned(run, *ON_H100, *documents)["step_time_s"]
    write_times(run, [measured] * 20)
    calibrated = planned(run, *ON_H100, *documents, "--calibrate", run)
    # What overlaps is not proportional to the speed.
    assert calibrated["step_time_s"] == pytest.approx(measured, rel=0.01)


def test_a_run_that_says_too_little_does_not_calibrate(run):
    write_times(run, [1.0] * 5)
    assert "more than 5 lines" in plan(run / "config.yaml", "--gpus", 8, "--calibrate", run).output
    write_times(run, [1.0] * 20)
    (run / "provenance.jsonl").unlink()
    result = plan(run / "config.yaml", "--gpus", 8, "--calibrate", run)
    assert result.exit_code == 2 and "with the number of ranks" in " ".join(result.output.split())


def test_a_run_calibrates_its_own_gpu(run):
    launch = {"world_size": 8, "device": "NVIDIA A100-SXM4-80GB"}
    (run / "provenance.jsonl").write_text(json.dumps({"launch": launch}) + "\n")
    write_times(run, [1.0] * 20)
    described = planned(run, "--calibrate", run)
    assert described["gpu"] == "a100-80gb" and not any("is assumed" in note for note in described["notes"])
    refused = plan(run / "config.yaml", "--gpus", 8, *ON_H100, "--calibrate", run)
    assert refused.exit_code == 2 and "ran on a100-80gb" in refused.output


def test_a_ramp_takes_the_sum_of_its_steps():
    """40 steps: 10 of 64 samples, 5 of 128, 4 of 192, then 256."""
    length = ("train.steps=40", "schedule.warmup_steps=0")
    words = (CONFIGS / "llama2-7b.yaml", "--gpus", 8, *ON_H100, *length, "--json")
    ramp = "train.batch_ramp={start: 64, increment: 64, samples: 1920}"
    step_s = {
        size: json.loads(plan(*words, f"train.global_batch_size={size}").stdout)["step_time_s"]
        for size in (64, 128, 192, 256)
    }
    described = json.loads(plan(*words, "train.global_batch_size=256", ramp).stdout)
    by_hand = 10 * step_s[64] + 5 * step_s[128] + 4 * step_s[192] + 21 * step_s[256]
    assert described["run"]["seconds"] == pytest.approx(by_hand)
    assert described["step_time_s"] == pytest.approx(step_s[256])


def searched(*words):
    return json.loads(plan(*words, "--search", "--json").stdout)


def test_adapters_are_counted_as_a_run_counts_them():
    words = (CONFIGS / "llama2-7b.yaml", "--gpus", 8, *ON_H100)
    whole, adapted = (json.loads(plan(*words, *more, "--json").stdout) for more in ((), ("lora.rank=16",)))
    assert adapted["mfu"]["parameters"] / whole["mfu"]["parameters"] == pytest.approx(2 / 3, rel=0.02)
    assert any("training the whole model" in note for note in adapted["notes"])
    assert any("training the whole model" in note for note in searched(*words, "lora.rank=16")["notes"])
    assert "% by 4N and the adapters' 6" in plan(*words, "lora.rank=16").output


def test_search_takes_what_plan_takes(run):
    words = ("--search", "--json", *ON_H100)
    plain = planned(run, *words)
    short = planned(run, *words, "--document-tokens", 128)
    assert short["candidates"][0]["tokens_per_second"] > plain["candidates"][0]["tokens_per_second"]
    assert any("documents that fill the sequence" in note for note in plain["notes"])
    write_times(run, [2 * planned(run, *ON_H100)["step_time_s"]] * 20)
    slow = planned(run, *words, "--calibrate", run)
    ratio = plain["candidates"][0]["tokens_per_second"] / slow["candidates"][0]["tokens_per_second"]
    assert ratio == pytest.approx(2, rel=0.05)
    printed = plan(run / "config.yaml", "--gpus", 8, "--search", *ON_H100, "--calibrate", run).output
    assert "note      calibrated by" in printed
    for more in (["--trace"], ["--stage", 0]):
        refused = plan(run / "config.yaml", "--gpus", 8, "--search", *more)
        assert refused.exit_code == 2 and "--search does not trace" in refused.output


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (("parallel.pipeline=4", "parallel.virtual_pipeline=3"), "32 layers are not divisible by"),
        (("parallel.pipeline=64",), "32 layers are fewer than parallel.pipeline = 64"),
        (("parallel.tensor=3",), "32 attention heads are not divisible"),
    ],
)
def test_a_model_that_cannot_be_split_is_said_without_a_number_of_gpus(override, said):
    result = plan(CONFIGS / "llama2-7b.yaml", *ON_H100, *override)
    assert result.exit_code == 2 and said in " ".join(result.output.split()), result.output


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
