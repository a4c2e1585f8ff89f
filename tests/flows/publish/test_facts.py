"""Energy and CO2 of a run, against products by hand; what a run does not tell is not guessed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from meditron_train.config.schema import Config
from meditron_train.errors import UserError
from meditron_train.files import sha256_file
from meditron_train.flows.publish.card import _data
from meditron_train.flows.publish.facts import DataSource, Work, _source, collect_facts
from meditron_train.flows.publish.origin import find_origin
from meditron_train.report.run_record import seconds_of

WORK = Work(3600.0 * 128 * 332, 128, 1e5, 0.42, "NVIDIA A100-SXM4-80GB", "a100-80gb", None)


def test_energy_and_co2_follow_the_formula() -> None:
    """The GPU-hours of Meditron-70B (arXiv 2311.16079), at the A100 board's 400 W."""
    cost = WORK.cost(pue=1.1, carbon_kg_per_kwh=0.016)
    assert cost is not None and cost.gpu_hours == 42_496
    assert cost.energy_kwh == pytest.approx(42_496 * 0.4 * 1.1)
    assert cost.co2_kg == pytest.approx(42_496 * 0.4 * 1.1 * 0.016)
    measured = replace(WORK, measured_power_w=300.0).cost(1.1, 0.016)
    assert measured is not None and measured.energy_kwh == pytest.approx(42_496 * 0.3 * 1.1)


def test_what_is_not_known_is_not_guessed() -> None:
    assert replace(WORK, gpu=None).cost(1.2, 0.4) is None
    assert replace(WORK, rank_seconds=0.0).cost(1.2, 0.4) is None


def test_the_record_of_a_run(run_dir: Path) -> None:
    facts = collect_facts(find_origin(run_dir), None)
    assert facts is not None and facts.work is not None and facts.layout is not None
    assert (facts.step, facts.tokens, facts.layout.tensor, facts.layout.data) == (6, 6 * 4 * 64, 2, 1)
    status = json.loads((run_dir / "status.json").read_text())
    began, ended = seconds_of(status["starts"][0]["time"]), seconds_of(status["updated"])
    assert began is not None and ended is not None
    assert (facts.work.device, facts.work.gpu, facts.work.world_size) == ("cpu", "cpu", 2)
    assert facts.work.rank_seconds == pytest.approx(2 * (ended - began))
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert facts.losses["training"] == metrics[-1]["loss"]
    assert facts.losses["validation, held-out"] == metrics[-1]["validation_loss.held-out"]
    assert facts.hashes["training samples seen, in their order"]
    earlier = collect_facts(find_origin(run_dir / "checkpoints" / "step_00000003"), None)
    assert earlier is not None and earlier.losses["training"] == metrics[2]["loss"]
    with pytest.raises(UserError, match="the GPU 'a1000' is unknown"):
        collect_facts(find_origin(run_dir), "a1000")


def test_an_export_whose_checkpoint_is_gone(run_dir: Path, tmp_path: Path) -> None:
    """Deleted: the run tells the rest. Another one in its place: nothing is known of the training."""
    run = shutil.copytree(run_dir, tmp_path / "run")
    checkpoint = run / "checkpoints" / "step_00000006"
    (checkpoint / "manifest.json").write_text("{}")
    origin = find_origin(run / "hf")
    assert (origin.training, origin.run_dir) == (None, None) and collect_facts(origin, None) is None
    shutil.rmtree(checkpoint)
    facts = collect_facts(find_origin(run / "hf"), None)
    assert facts is not None and (facts.step, facts.tokens) == (6, 6 * 4 * 64)
    assert "1,536 tokens were trained on, padding included." in _data(facts)
    (run / "metrics.jsonl").unlink()
    facts = collect_facts(find_origin(run / "hf"), None)
    assert facts is not None and facts.tokens is None
    assert "How many tokens were trained on is not recorded." in _data(facts)


def test_a_source_that_comes_from_a_corpus(tmp_path: Path) -> None:
    """Under a short name of its own, as the demo links it."""
    root = tmp_path / "corpus"
    for folder in ("tokenized", "manifest"):
        (root / folder).mkdir(parents=True)
    (root / "tokenized/guidelines.train.bin").touch()
    (root / "manifest/guidelines.train.parquet").touch()
    splits = {"train": {"documents": 41, "tokens": 1200}, "validation": {"documents": 2, "tokens": 60}}
    other = {"name": "papers", "splits": {}, "licenses": {"CC0": {}}}
    source = {"name": "guidelines", "splits": splits, "licenses": {"CC-BY-4.0": {}, "CC-BY-NC-4.0": {}}}
    manifest = {"format": "meditron-train-corpus/1", "name": "gap", "sources": [other, source]}
    (root / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "text.bin").symlink_to(root / "tokenized/guidelines.train.bin")
    config = Config.model_validate(
        {
            "model": {"from": "base"},
            "data": {
                "tokenizer": "base",
                "train": [
                    {"name": "text", "path": "text", "weight": 1},
                    {"name": "gone", "path": "gone", "weight": 3},
                ],
            },
        }
    )
    found, gone = (_source(config, number, {"working_directory": str(tmp_path)}) for number in (0, 1))
    assert (found.share, found.documents, found.tokens) == ("25.0%", 41, 1200)
    assert found.licenses == ("CC-BY-4.0", "CC-BY-NC-4.0")
    assert found.corpus == f"gap, SHA-256 of its manifest {sha256_file(root / 'manifest.json')[:16]}…"
    assert gone == DataSource("gone", "75.0%")
