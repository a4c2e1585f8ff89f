"""Reports of runs in every state, from directories as runs leave them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from meditron_train.checkpoint.manifest import write_manifest
from meditron_train.errors import UserError
from meditron_train.flows.report.run_page import make_page
from meditron_train.flows.report.write import write_page
from meditron_train.report.page.blocks import Facts, LayoutDrawing, Page, Table
from meditron_train.report.page.html import render_html
from meditron_train.report.page.markdown import render_markdown
from tests.report.synthetic_run import SOURCES, iso, write_run

NUM_SPOILED = int(os.environ.get("REPORT_NUM_SPOILED", "12"))


def text_of(page: Page) -> str:
    return render_markdown(page).replace("\\", "")


def rows_of(page: Page, name: str, caption: str | None = None) -> list[list[str]]:
    found = next(section for section in page.sections if section.name == name)
    tables = [block for block in found.blocks if isinstance(block, Table)]
    chosen = next(block for block in tables if caption is None or block.caption == caption)
    return [[cell.text for cell in row] for row in chosen.rows]


def test_a_finished_run(tmp_path):
    page = make_page([write_run(tmp_path / "run", num_steps=400, restarts_at=(100, 250))])
    assert page.state.text == "finished" and page.state.tone == "good"
    assert {chart.name for chart in page.charts} >= {
        "training-loss", "validation-loss", "learning-rate", "gradient-norm", "tokens-per-second", "mfu", "memory",
        "step-time", "timeline", "source-tokens",
    }  # fmt: skip
    tiles = {label: value.text for label, value, _ in page.tiles.rows}
    assert tiles["steps"] == "400 of 400" and tiles["starts"] == "3" and tiles["MFU"].startswith("43")
    validation = next(chart for chart in page.charts if chart.name == "validation-loss")
    assert {trace["name"] for trace in validation.traces} == set(SOURCES)
    assert page.sections[0].name == "loss"
    assert len(render_html(page)) > 1_000_000  # plotly is in it


def test_the_time_of_a_step_and_of_the_run(tmp_path):
    page = make_page([write_run(tmp_path / "run", num_steps=100, restarts_at=(50,))])
    parts = {row[0]: row[1:] for row in rows_of(page, "speed", "Time of a step")}
    assert parts["forward and backward"] == ["3.4 s", "85.0 %"]
    assert parts["other: checks, the loop itself"] == ["0.08 s", "2.0 %"]
    spent = {row[0]: row[1] for row in rows_of(page, "speed", "Time of the run")}
    # The first start: 50 steps, 300 s until its last sign; the second: 50 steps.
    assert spent["all starts together"] == "11 min 40 s" and spent["steps"] == "6 min 40 s"
    assert spent["validation"] == "30 s" and spent["standing still to save"] == "12.5 s"


def test_starts_and_what_they_lost(tmp_path):
    page = make_page([write_run(tmp_path / "run", num_steps=100, restarts_at=(50,))])
    first, second = rows_of(page, "stability", "Starts")
    assert first[2:6] == ["first start", "0", "55", "8 min 20 s"]
    assert second[2:6] == ["the time limit of the job", "50", "100", "3 min 20 s"]
    line, marks = next(chart for chart in page.charts if chart.name == "timeline").traces
    assert 55 in line["y"] and None in line["y"] and marks["y"] == [0, 50]


def test_the_layout_says_who_holds_what(tmp_path):
    page = make_page([write_run(tmp_path / "run", tensor=8, pipeline=4, world_size=64)])
    drawing = next(b for section in page.sections for b in section.blocks if isinstance(b, LayoutDrawing))
    assert [host for host, _ in drawing.nodes] == [f"node{number:02d}" for number in range(8)]
    boxes = {box.rank: box for _, ranks in drawing.nodes for box in ranks}
    assert len(boxes) == 64
    assert boxes[0].lines == ("layers 0–19", "heads 0–7", "KV heads 0", "+ embedding", "data 0 of 2")
    assert boxes[63].lines == ("layers 60–79", "heads 56–63", "KV heads 7", "+ output", "data 1 of 2")


@pytest.mark.parametrize(
    ("world_size", "pipeline", "said"),
    [
        (1024, 1, "drawn; the others repeat their pattern"),
        (1024, 8, "drawn: pipeline stages 0–3 of 8, counted from 0. The other"),
        (1008, 3, "drawn: pipeline stages 0–1 of 3, counted from 0, the last in part. The other"),
        (1024, 2, "drawn: pipeline stage 0 of 2, counted from 0. The other"),
        (2048, 2, "drawn: pipeline stage 0 of 2, counted from 0, a part of it. The other"),
    ],
)
def test_many_ranks_are_drawn_in_part(tmp_path, world_size, pipeline, said):
    run = write_run(tmp_path / "run", tensor=4, pipeline=pipeline, world_size=world_size)
    text = text_of(make_page([run]))
    assert f"The first 512 ranks are {said}" in text
    drawing = next(b for s in make_page([run]).sections for b in s.blocks if isinstance(b, LayoutDrawing))
    stages = {box.stage for _, boxes in drawing.nodes for box in boxes}
    per_stage = world_size // pipeline  # megatron-core's order: the pipeline is the outermost
    assert stages == {rank // per_stage for rank in range(512)}


def test_the_mixture_counts_the_phases_that_have_begun(tmp_path):
    page = make_page(
        [write_run(tmp_path / "run", num_steps=60, total_steps=80)]
    )  # the phase begins with step 40
    planned = {row[0]: row[1] for row in rows_of(page, "data", "Mixture")}
    assert planned["pubmed"] == f"{100 * (39 * 0.6 + 21 * 0.2) / 60:.1f} %"
    assert planned["abstracts"] == f"{100 * 39 * 0.3 / 60:.1f} %"
    assert rows_of(page, "data", "Phases of the mixture")[1] == ["40", "20.0 %", "0.0 %", "80.0 %"]
    assert rows_of(page, "data", "Mixture")[0][4] == f"{60 * 512 * 4096 * 0.6 / 4e10:.3f}"


def test_what_it_cost(tmp_path):
    page = make_page([write_run(tmp_path / "run", num_steps=900)])  # an hour on 8 GPUs of 400 W
    found = next(section for section in page.sections if section.name == "cost")
    values = {label: value.text for b in found.blocks if isinstance(b, Facts) for label, value, _ in b.rows}
    assert values == {"GPU-hours": "8", "energy, estimated": "3.84 kWh", "CO2, estimated": "1.536 kg"}


def test_measured_energy_counts_what_restarts_lost(tmp_path):
    run = write_run(tmp_path / "run", num_steps=900, restarts_at=(450,), power_w=500.0)
    found = next(section for section in make_page([run]).sections if section.name == "cost")
    values = {label: value.text for b in found.blocks if isinstance(b, Facts) for label, value, _ in b.rows}
    hours = 8 * (3600 + 300) / 3600  # until the last sign of the first start
    assert values["GPU-hours"] == f"{hours:.4g}"
    assert values["energy, measured"] == f"{hours * 0.5 * 1.2:.4g} kWh"


def test_the_plan_beside_what_was_measured(tmp_path):
    page = make_page([write_run(tmp_path / "run", num_steps=30, tensor=8, pipeline=8, world_size=128)])
    rows = {row[0]: row[1:] for row in rows_of(page, "plan")}
    assert rows["time of a step"][1] == "4 s"
    assert 0.3 < float(rows["MFU by 6N"][2]) < 3
    assert "memory of the fullest rank, traced" not in rows


def test_mfu_of_adapters_has_one_convention(tmp_path):
    """The run counted 4N: of the plan's two thirds are left, not of the run's."""
    run = write_run(tmp_path / "run", num_steps=30, tensor=8, pipeline=8, world_size=128)
    whole = {row[0]: row[1:] for row in rows_of(make_page([run]), "plan")}["MFU by 6N"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"lora": {"rank": 16}}))
    rows = {row[0]: row[1:] for row in rows_of(make_page([run]), "plan")}
    adapted = rows["MFU by 4N and the adapters' 6"]
    assert float(adapted[0].split()[0]) == pytest.approx(float(whole[0].split()[0]) * 2 / 3, rel=0.02)
    assert adapted[1] == whole[1]


def test_what_mfu_counts_is_said(tmp_path):
    """As `planner.flops.model_flops_per_token` counts it."""
    whole, adapted = (write_run(tmp_path / name) for name in ("whole", "adapted"))
    config = yaml.safe_load((adapted / "config.yaml").read_text())
    (whole / "config.yaml").write_text(yaml.safe_dump(config | {"lora": None}))
    (adapted / "config.yaml").write_text(yaml.safe_dump(config | {"lora": {"rank": 16}}))
    said = "6 FLOPs a parameter and token", "4 FLOPs a parameter and token, 6 of the adapters"
    for run, words in zip((whole, adapted), said, strict=True):
        page = make_page([run])
        assert {label: note for label, _, note in page.tiles.rows}["MFU"] == f"by {words}"
        assert next(chart for chart in page.charts if chart.name == "mfu").note.startswith(
            f"By {words}, over"
        )
    note = next(chart for chart in make_page([whole, adapted]).charts if chart.name == "mfu").note
    assert note.startswith(f"By {said[0]} (with adapters: {said[1]}), over")


def test_what_was_measured_is_of_one_batch_size_and_the_last_start(tmp_path):
    """In the ramp and before the restart steps took other times."""
    sizes = {"tensor": 8, "pipeline": 8, "world_size": 128}
    run = write_run(tmp_path / "run", num_steps=60, restarts_at=(20,), **sizes)
    plain = {row[0]: row[1:] for row in rows_of(make_page([run]), "plan")}
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["train"]["batch_ramp"] = {"start": 128, "increment": 128, "samples": 15 * (128 + 256 + 384)}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines[:55]:
        line |= {"step_time_s": 1.0, "tokens_per_second": 1.0, "mfu": 0.01}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = make_page([run])
    rows = {row[0]: row[1:] for row in rows_of(page, "plan")}
    assert rows["time of a step"] == plain["time of a step"] and rows["time of a step"][1] == "4 s"
    assert float(rows["tokens per second"][1].replace(",", "")) > 40_000
    assert "steps of 512 samples" in text_of(page)


def test_a_trace_beside_what_was_measured(tmp_path):
    run = write_run(tmp_path / "run", num_steps=30)
    ranks = [
        {"peaks": [{"phase": "update", "num_bytes": 34 << 30}]},
        {"peaks": [{"num_bytes": 17 << 30}, "x"]},
        3,
    ]
    (run / "plan.json").write_text(json.dumps({"trace": {"ranks": ranks}}))
    rows = {row[0]: row[1:] for row in rows_of(make_page([run]), "plan")}
    assert rows["memory of the fullest rank, traced"] == ["34.00 GiB", "68.00 GiB", "2.00"]
    (run / "plan.json").write_text("[")
    assert "memory of the fullest rank" in {row[0] for row in rows_of(make_page([run]), "plan")}


def test_a_run_that_goes_on(tmp_path):
    run = write_run(
        tmp_path / "run", num_steps=50, total_steps=100, state="running", updated=iso(time.time())
    )
    page = make_page([run], refresh_s=30)
    assert page.state.text == "running" and page.refresh_s == 30
    assert "50 of 100" in text_of(page) and "left" in text_of(page)
    assert 'data-refresh-s="30"' in render_html(page)
    finished = write_run(tmp_path / "finished", num_steps=50)
    assert make_page([run, finished], refresh_s=30).refresh_s == 30
    assert make_page([finished, finished], refresh_s=30).refresh_s is None
    silent = write_run(tmp_path / "silent", num_steps=50, state="running", updated=iso(time.time() - 3600))
    assert make_page([silent]).state.text == "no sign of life"


def test_a_run_that_failed_at_its_first_step(tmp_path):
    run = write_run(
        tmp_path / "run",
        num_steps=0,
        total_steps=9,
        state="failed",
        cause="out_of_memory",
        reason="no memory",
    )
    (run / "metrics.jsonl").unlink()
    (run / "logs").mkdir()
    (run / "logs/rank_00003.failure.json").write_text(json.dumps({
        "time": 1.0, "rank": 3, "host": "node00", "step": 0, "kind": "OutOfMemoryError", "exit_code": 1,
        "cause": "out_of_memory", "message": "tried to allocate 3 GiB", "traceback": "Traceback: here",
    }))  # fmt: skip
    (run / "logs/rank_00000.log").write_text("starting\nthe last words of rank 0\n")
    page = make_page([run])
    said = text_of(page)
    assert page.state.text == "failed" and "Memory ran out" in said and "train.micro_batch_size" in said
    assert (
        "Rank 3 on host node00" in said and "Traceback: here" in said and "the last words of rank 0" in said
    )
    assert "No step has been recorded" in said
    assert page.sections[0].name == "stability", "what went wrong comes first"
    render_html(page)


def test_a_torn_metrics_file(tmp_path):
    run = write_run(tmp_path / "run", num_steps=30)
    content = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(content[:-100])
    page = make_page([run])
    assert "is torn and left out" in text_of(page)
    loss = next(chart for chart in page.charts if chart.name == "training-loss")
    assert loss.traces[0]["x"][-1] == 29


def make_checkpoint(run: Path, step: int) -> Path:
    directory = run / "checkpoints" / f"step_{step:08d}"
    directory.mkdir(parents=True)
    (directory / "weights.bin").write_bytes(b"w" * 1000)
    (directory / "meta.json").write_text(json.dumps({"step": step, "tokens": 1000 * step}))
    write_manifest(directory)
    return directory


def test_checkpoints_and_their_hashes(tmp_path):
    run = write_run(tmp_path / "run", last_checkpoint="step_00000060")
    for step in (10, 20, 30):
        make_checkpoint(run, step)
    (run / "checkpoints/step_00000040.tmp").mkdir()
    (run / "checkpoints/step_00000020/weights.bin").write_bytes(b"w" * 999)
    (run / "checkpoints/step_00000030/weights.bin").write_bytes(b"x" * 1000)
    states = {row[0]: row[-1] for row in rows_of(make_page([run]), "checkpoints")}
    assert states["step_00000010"] == "complete: sizes match"
    assert states["step_00000020"] == "damaged: weights.bin has 999 bytes instead of 1000"
    assert states["step_00000030"] == "complete: sizes match"
    assert "being written" in states["step_00000040.tmp"]
    assert "missing" in states["step_00000060"]
    states = {row[0]: row[-1] for row in rows_of(make_page([run], check_hashes=True), "checkpoints")}
    assert states["step_00000010"] == "intact: hashes match"
    assert states["step_00000030"].startswith("damaged: weights.bin has changed")


def test_exports_and_what_others_add_to_them(tmp_path):
    run = write_run(tmp_path / "run", last_checkpoint="step_00000010")
    make_checkpoint(run, 10)
    names = (
        "hf",
        "hf_step_00000010",
        "adapter",
        "adapter_step_00000010_2",
        "hf_step_00000020",
        "adapter_step_00000030",
    )
    for name in names:
        (run / name).mkdir()
        (run / name / "model.safetensors").write_bytes(b"w" * 1000)
        write_manifest(run / name)
    (run / "hf/README.md").write_text("a card")
    (run / "adapter/README.md").write_text("a card")
    (run / "adapter/eval.json").write_text("{}")
    (run / "hf_step_00000020/README.md").write_text("a card")
    (run / "hf_step_00000020/model.safetensors").write_bytes(b"w")
    (run / "adapter_step_00000030/manifest.json").unlink()
    left = ("hf.tmp", ".hf.new.tmp", ".hf.replaced.tmp", ".adapter_step_00000010.tmp")
    for name in (*left, "hf.old", "hf_of_someone", ".cache"):
        (run / name).mkdir()
    found = next(section for section in make_page([run]).sections if section.name == "checkpoints")
    (table,) = (block for block in found.blocks if isinstance(block, Table))
    states = {row[0].text: (row[-1].text, row[-1].tone) for row in table.rows}
    del states["step_00000010"]
    unfinished = ("being written, or left by a kill", "warn")
    assert states == {
        "hf": ("changed since: README.md was added", "warn"),
        "hf_step_00000010": ("complete: sizes match", "good"),
        "adapter": ("changed since: README.md and 1 more was added", "warn"),
        "adapter_step_00000010_2": ("complete: sizes match", "good"),
        "hf_step_00000020": ("damaged: README.md is not in the manifest and 1 more", "bad"),
        "adapter_step_00000030": ("damaged: manifest.json is missing", "bad"),
        "hf.tmp": unfinished,
        ".hf.new.tmp": unfinished,
        ".hf.replaced.tmp": unfinished,
        ".adapter_step_00000010.tmp": unfinished,
    }


OTHER_CONTENTS = [
    *("{}", "[]", "null", "{", '{"state": "done", "starts": [1, {}], "steps": "x"}'),
    '{"state": ["x"], "starts": {"a": 1}, "hosts": 3, "layout": {"tensor": "a"}}',
]


@pytest.mark.parametrize("content", OTHER_CONTENTS)
@pytest.mark.parametrize("name", ["status.json", "provenance.jsonl", "config.yaml", "metrics.jsonl"])
def test_files_of_any_other_content(tmp_path, name, content):
    run = write_run(tmp_path / "run", num_steps=10)
    (run / name).write_text(content + "\n")
    render_html(make_page([run]))
    render_markdown(make_page([run]))


JUNK = [
    *(None, True, -1, 0, 3, 2**70, 1e308, -0.5, "NaN", "Infinity", "", "x", "2026-01-01"),
    *([], ["x"], [3], {}, {"name": 3}),
]


def spoiled(value: Any, choose: random.Random) -> Any:
    """A copy with some values, at any depth, replaced by others."""
    if choose.random() < 0.08:
        return choose.choice(JUNK)
    if isinstance(value, dict):
        return {key: spoiled(item, choose) for key, item in value.items() if choose.random() > 0.03}
    if isinstance(value, list):
        return [spoiled(item, choose) for item in value]
    return value


@pytest.mark.parametrize("seed", range(NUM_SPOILED))
def test_any_value_may_be_another(tmp_path, seed):
    choose = random.Random(seed)
    run = write_run(tmp_path / "run", num_steps=12, restarts_at=(5,), last_checkpoint="step_00000012")
    make_checkpoint(run, 12)
    (run / "status.json").write_text(
        json.dumps(spoiled(json.loads((run / "status.json").read_text()), choose))
    )
    config = spoiled(yaml.safe_load((run / "config.yaml").read_text()), choose)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for name in ("provenance.jsonl", "metrics.jsonl"):
        records = [json.loads(line) for line in (run / name).read_text().splitlines()]
        (run / name).write_text("".join(json.dumps(spoiled(record, choose)) + "\n" for record in records))
    page = make_page([run])
    render_html(page, plotly_address="/plotly.js")
    render_markdown(page)
    render_markdown(make_page([run, run]))


@pytest.mark.parametrize("name", ["status.json", "provenance.jsonl", "config.yaml", "metrics.jsonl"])
def test_each_file_may_be_missing(tmp_path, name):
    run = write_run(tmp_path / "run", num_steps=10)
    (run / name).unlink()
    assert "10" in text_of(make_page([run]))


def test_text_of_every_file_is_escaped(tmp_path):
    evil = "</script><script>window.hit = 1</script><img src=http://198.51.100.1/x onerror='window.hit = 1'>"
    run = write_run(
        tmp_path / "run", num_steps=10, state="failed", reason=evil, slow_ranks=[evil], last_checkpoint=evil
    )
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["train"][0]["name"] = config["model"]["from"] = evil
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    line = {"step": 11, "loss": 1.0, f"validation_loss.{evil}": 1, f"source_tokens.{evil}": 5, f"{evil}.x": 2}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    for name in ("status.json", "provenance.jsonl"):
        (run / name).write_text((run / name).read_text().replace("node00", json.dumps(evil)[1:-1]))
    (run / "evaluation").mkdir()
    (run / "evaluation/a.json").write_text(
        json.dumps({"model": evil, "scores": [{"benchmark": evil, "accuracy": 0.5}]})
    )
    page = make_page([run])
    html = render_html(page, plotly_address="/plotly.js")
    assert html.count("<script") == 3 and "<img" not in html
    assert html.count("window.hit") > 8, "the texts are there, as texts"
    assert "<script" not in render_markdown(page).replace("```", "").split("config.yaml:")[0]


def test_several_runs_and_what_sets_them_apart(tmp_path):
    one, other = (
        write_run(tmp_path / "one", num_steps=50),
        write_run(tmp_path / "other", num_steps=50, tensor=4),
    )
    page = make_page([one, other])
    loss = next(chart for chart in page.charts if chart.name == "training-loss")
    assert [trace["name"] for trace in loss.traces] == ["one", "other"]
    assert rows_of(page, "differences") == [["parallel.tensor", "2", "4"]]
    assert [row[0] for row in rows_of(page, "runs")] == ["one", "other"]
    same = make_page([one, write_run(tmp_path / "deeper" / "one", num_steps=50)])
    assert str(one) in text_of(same) and "Nothing differs" in text_of(same)


def test_an_evaluation_is_shown(tmp_path):
    run = write_run(tmp_path / "run", num_steps=10)
    score = {
        "benchmark": "medqa",
        "accuracy": 0.613,
        "interval": [0.58, 0.64],
        "chance": 0.25,
        "num_items": 1273,
    }
    result = {"model": "hf", "protocol": {}, "scores": [score], "answers": {}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    page = make_page([run], evaluation_files=[tmp_path / "result.json"])
    assert rows_of(page, "scores")[0][:5] == ["medqa", "61.3 %", "58.0 % to 64.0 %", "25.0 %", "1,273"]
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(UserError, match="is not a result of"):
        make_page([run], evaluation_files=[tmp_path / "result.json"])


def test_metrics_without_a_place_of_their_own_are_shown(tmp_path):
    run = write_run(tmp_path / "run", num_steps=10)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "task_accuracy.medqa": 0.5, "task_accuracy.pubmedqa": 0.6}\n')
    chart = next(chart for chart in make_page([run]).charts if chart.title == "task accuracy")
    assert [trace["name"] for trace in chart.traces] == ["medqa", "pubmedqa"]


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no directory"):
        make_page([tmp_path / "absent"])
    with pytest.raises(UserError, match="is not the directory of a run"):
        make_page([tmp_path])
    page = make_page([write_run(tmp_path / "run")])
    with pytest.raises(UserError, match=r"ends in \.html or \.md"):
        write_page(page, tmp_path / "report.pdf")


BUILD = """
import sys
from pathlib import Path
from meditron_train.flows.report.run_page import make_page
from meditron_train.flows.report.write import write_page
write_page(make_page([Path(sys.argv[1])]), Path(sys.argv[1]) / "report.html")
# The peak of this program; ru_maxrss would also count the process that started it.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.long
def test_a_run_of_100_000_steps_on_128_ranks_takes_little_memory(tmp_path):
    run = write_run(
        tmp_path / "run", num_steps=100_000, tensor=8, pipeline=8, world_size=128, restarts_at=(60_000,)
    )
    done = subprocess.run([sys.executable, "-c", BUILD, str(run)], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 500e6
    html = (run / "report.html").read_text()
    charts = {
        chart["name"]: chart for chart in json.loads(html.split('id="charts">')[1].split("</script>")[0])
    }
    loss = charts["training-loss"]["traces"][0]
    assert max(loss["y"]) > 9 and len(loss["x"]) < 2100, "the spike of one step is there"
    assert sum(len(trace["x"]) for chart in charts.values() for trace in chart["traces"]) < 40_000
    assert html.count("<b>rank ") == 128
    assert len(html) < 8e6
