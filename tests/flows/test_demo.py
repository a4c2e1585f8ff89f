"""The demo: what it may empty, and a very small one from end to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from meditron_train.cli.demo import print_report
from meditron_train.config.load import load_config
from meditron_train.data.packed import PackedBatch
from meditron_train.data.tokenizing.tokenizer import load_tokenizer
from meditron_train.errors import MeditronError
from meditron_train.flows.demo.demo import MARKER, prepare_directory, run_experiment
from meditron_train.flows.demo.stages import (
    CONFIG,
    DemoFiles,
    DemoSizes,
    packed_documents,
    train_tokenizer,
    write_world,
)
from tests.refusal import refused

TINY = DemoSizes(
    num_drugs=12,
    num_diseases=8,
    num_general_texts=150,
    num_medical_texts=100,
    num_validation_texts=20,
    vocab_size=600,
    hidden_size=32,
    base_steps=2,
    overrides=("schedule.warmup_steps=1", "validation.interval=2"),
)


def test_an_earlier_demo_is_replaced(tmp_path):
    out = tmp_path / "deep" / "demo"
    prepare_directory(out)
    (out / "old").mkdir()
    (out / "old" / "file").write_text("x")
    prepare_directory(out)
    assert [path.name for path in out.iterdir()] == [MARKER]


def test_anything_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with refused(str(tmp_path), "not empty", "--out"):
        prepare_directory(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    with refused("is a file", "--out"):
        prepare_directory(tmp_path / "thesis.txt")


def test_an_empty_directory_is_taken(tmp_path):
    prepare_directory(tmp_path)
    assert (tmp_path / MARKER).is_file()


def test_the_configuration_follows_the_directory(monkeypatch):
    monkeypatch.delenv("DEMO_DIR", raising=False)
    assert str(load_config(CONFIG).model.from_) == "runs/demo/base"
    monkeypatch.setenv("DEMO_DIR", "/elsewhere")
    config = load_config(CONFIG)
    paths = [config.model.from_, config.data.tokenizer, config.logging.run_dir]
    paths += [source.path for source in (*config.data.train, *config.data.validation)]
    assert all(str(path).startswith("/elsewhere/") for path in paths)


def test_the_tokenizer_is_of_llamas_kind(tmp_path):
    files = DemoFiles(tmp_path)
    write_world(files, TINY, seed=0)
    train_tokenizer(files, TINY.vocab_size)
    tokenizer = load_tokenizer(files.tokenizer)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (600, 1, 2)
    text = "Question: 漢字?\n  Answer: 150 mg"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("150", bos=False, eos=False)) == 4  # a space and three digits


def test_packed_documents_are_what_is_read_and_predicted():
    batch = PackedBatch(
        tokens_T=torch.tensor([1, 5, 2, 1, 6, 7, 0, 0]),
        labels_T=torch.tensor([5, 2, 0, 6, 7, 8, 0, 0]),
        loss_mask_T=torch.tensor([1.0, 1, 0, 1, 1, 1, 0, 0]),
        positions_T=torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]),
        cu_seqlens=torch.tensor([0, 3, 6, 8], dtype=torch.int32),
    )
    assert packed_documents(batch) == [[1, 5, 2], [1, 6, 7, 8]]


@pytest.fixture(scope="module")
def tiny_demo(tmp_path_factory):
    """A whole demo, with models that learn nothing in two steps."""
    files = DemoFiles(tmp_path_factory.mktemp("demo"))
    sizes = DemoSizes(**{**vars(TINY), "overrides": (*TINY.overrides, "train.steps=2")})
    report = run_experiment(files, sizes, seed=3)
    return files, report


@pytest.mark.long
def test_every_stage_leaves_its_files(tiny_demo):
    files, report = tiny_demo
    assert json.loads(files.report.read_text()) == json.loads(json.dumps(report))
    for name in ("general", "medical"):
        assert (files.texts / f"{name}.jsonl").is_file()
    for name in ("general.train", "medical.train", "medical.validation"):
        prefix = files.data / "tokenized" / name
        assert Path(f"{prefix}.idx").is_file() and Path(f"{prefix}.bin").is_file()
        assert report["tokens"][name] > 0
    for short, name in (("medical", "medical.train"), ("medical-validation", "medical.validation")):
        assert (files.data / f"{short}.bin").samefile(files.data / "tokenized" / f"{name}.bin")
    for name in ("taught", "held-out"):
        lines = (files.questions / f"{name}.jsonl").read_text().splitlines()
        assert len(lines) == report["questions"][name]["num_questions"] > 0
    for directory in (files.base, files.result):
        assert {"config.json", "tokenizer.model", "tokenizer.json"} <= {
            path.name for path in directory.iterdir()
        }
    assert report["checks"]["num_equal_tensors"] == 4 * 9 + 3
    assert report["perplexity"]["after"] != report["perplexity"]["before"]


@pytest.mark.long
def test_the_report_is_printed(tiny_demo, capsys):
    print_report(tiny_demo[1])
    output = capsys.readouterr().out
    for word in ("taught facts", "held-out facts", "perplexity", "total", "report.json"):
        assert word in output


@pytest.mark.long
def test_a_result_that_is_not_what_was_trained_is_found(tiny_demo, tmp_path):
    from meditron_train.flows.demo.stages import check_result

    files = DemoFiles(tmp_path / "demo")
    shutil.copytree(tiny_demo[0].root, files.root)
    weights = next(files.result.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with refused("is not the model in", kind=MeditronError):
        check_result(files)


@pytest.mark.long
def test_a_loss_that_transformers_does_not_find_is_an_error(tiny_demo, tmp_path):
    from meditron_train.flows.demo.stages import check_result

    files = DemoFiles(tmp_path / "demo")
    shutil.copytree(tiny_demo[0].root, files.root)
    metrics = files.continued_run / "metrics.jsonl"
    *earlier, last = metrics.read_text().splitlines()
    changed = json.loads(last)
    changed["validation_loss.medical"] += 0.01
    metrics.write_text("\n".join([*earlier, json.dumps(changed)]) + "\n")
    with refused("validation loss", kind=MeditronError):
        check_result(files)
