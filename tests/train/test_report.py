"""The report of a real run, and its page in a real browser."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from meditron_train.train.guard.injected_faults import VARIABLE
from tests import browser
from tests.distributed import run_ranks
from tests.report.synthetic_run import write_run
from tests.train.test_loop import run as train
from tests.train.test_own_faults import going_back_rank

_WHY_NOT = browser.why_not()
needs_browser = pytest.mark.skipif(_WHY_NOT is not None, reason=str(_WHY_NOT))

HAS_DATA = """
name => {
  const plot = document.getElementById("plot-" + name);
  const drawn = [...plot.querySelectorAll(".scatterlayer .trace path")].filter((path) => path.getAttribute("d"));
  return plot.data.every((trace) => trace.y.some((value) => value !== null)) && drawn.length > 0;
}
"""
CHARTS = {
    *(
        "training-loss",
        "validation-loss",
        "learning-rate",
        "gradient-norm",
        "parameter-norm",
        "tokens-per-second",
    ),
    *("memory", "step-time", "timeline", "source-tokens"),
}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, hf_dir, corpus):
    directory = tmp_path_factory.mktemp("reported")
    values = {
        "model": {"from": str(hf_dir)},
        "data": {
            "tokenizer": str(hf_dir),
            "train": [{"name": "one", "path": str(corpus / "one"), "weight": 2.0},
                      {"name": "two", "path": str(corpus / "two"), "weight": 1.0}],
            "validation": [{"name": "held-out", "path": str(corpus / "validation")}],
        },
        "train": {"steps": 20, "seq_len": 64, "global_batch_size": 4, "precision": "fp32", "device": "cpu"},
        "checkpoint": {"interval": 10, "export_hf": True},
        "validation": {"interval": 5, "steps": 2},
        "logging": {"run_dir": str(directory / "run"), "tensorboard": False},
    }  # fmt: skip
    (directory / "config.yaml").write_text(yaml.safe_dump(values))
    train(directory / "config.yaml", "parallel.tensor=2", world_size=2)
    return directory / "run"


def test_a_real_run_recorded_all_that_its_report_shows(finished_run):
    from meditron_train.flows.report.run_page import make_page
    from meditron_train.report.page.markdown import render_markdown

    page = make_page([finished_run], check_hashes=True)
    assert {chart.name for chart in page.charts} == CHARTS
    said = render_markdown(page).replace("\\", "")
    assert page.state.text == "finished" and "| steps | 20 of 20 |" in said
    assert "| step_00000020 |" in said and "intact: hashes match" in said and "damaged" not in said
    assert "heads 0" in said and "KV heads" in said and "SHA-256" in said and "config.yaml:" in said
    last = json.loads((finished_run / "metrics.jsonl").read_text().splitlines()[-1])
    parts = [last[f"{name}_time_s"] for name in ("data", "forward_backward", "reduce", "update")]
    assert (
        all(part >= 0 for part in parts)
        and 0.2 * last["step_time_s"] < sum(parts) < 1.1 * last["step_time_s"]
    )
    read = {name: last[f"source_tokens.{name}"] for name in ("one", "two")}
    assert sum(read.values()) == last["tokens"] and 1.5 < read["one"] / read["two"] < 2.5  # weights 2 and 1
    status = json.loads((finished_run / "status.json").read_text())
    assert status["saving_s"] > 0 and status["validation_s"] > 0


@needs_browser
def test_its_page_in_a_browser(finished_run):
    from meditron_train.flows.report.run_page import make_page
    from meditron_train.flows.report.write import write_page

    path = finished_run / "report.html"
    write_page(make_page([finished_run]), path)
    with browser.browser() as running:
        for options in ({}, {"dark": True, "width": 390, "height": 844}):
            with browser.opened(running, path.as_uri(), **options) as found:
                found.wait_for_charts()
                assert found.errors == []
                assert found.requests == [path.as_uri()], "the page asks for nothing but itself"
                for name in CHARTS:
                    assert found.page.evaluate(HAS_DATA, name), name
                assert found.contrast_problems() == []
                width = found.page.evaluate("document.documentElement.scrollWidth")
                assert width <= options.get("width", 1280), "nothing sticks out at the side"


@needs_browser
def test_text_of_files_does_nothing_in_a_browser(tmp_path):
    from meditron_train.flows.report.run_page import make_page
    from meditron_train.flows.report.write import write_page

    evil = "</script><script>window.hit = 1</script><img src=http://198.51.100.1/x onerror='window.hit = 1'>"
    link = "<a href='javascript:window.hit=1'>x</a>"
    run = write_run(tmp_path / "run", num_steps=10, state="failed", reason=evil, last_checkpoint=evil)
    line = {
        "step": 11,
        "loss": 1.0,
        f"validation_loss.{evil}": 1,
        f"validation_loss.{link}": 1,
        f"{evil}.x": 2,
    }
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    path = tmp_path / "report.html"
    write_page(make_page([run]), path)
    with browser.browser() as running, browser.opened(running, path.as_uri()) as found:
        found.wait_for_charts()
        assert found.page.evaluate("window.hit") is None
        assert found.page.query_selector_all("img, svg a") == []
        assert found.requests == [path.as_uri()] and found.errors == []


def killed_after_going_back(rank: int, world_size: int, config_file: Path) -> int:
    os.environ[VARIABLE] = "crash@3"
    return going_back_rank(rank, world_size, config_file, 4)


@pytest.mark.long
def test_the_status_names_the_checkpoint_that_was_gone_back_to(write_config, tmp_path):
    """The one that it named before was set aside."""
    values = {"steps": 4, "seq_len": 64, "global_batch_size": 4, "precision": "fp32", "device": "cpu"}
    logging = {"run_dir": str(tmp_path / "run"), "tensorboard": False}
    config = write_config(
        "back.yaml", train=values, checkpoint={"interval": 2, "export_hf": False}, logging=logging
    )
    train(config)
    status = tmp_path / "run" / "status.json"
    assert json.loads(status.read_text())["last_checkpoint"] == "step_00000004"
    with pytest.raises(AssertionError, match="an injected crash"):
        run_ranks(killed_after_going_back, 1, config)
    assert json.loads(status.read_text())["last_checkpoint"] == "step_00000002"
