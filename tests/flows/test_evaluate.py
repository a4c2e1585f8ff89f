"""What is asked is read before the model is opened, and what was answered is kept as it comes."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meditron_train.errors import MeditronError, UserError
from meditron_train.evaluate.harness.compare import read_result
from meditron_train.evaluate.harness.lm_task import Protocol
from meditron_train.files import sha256_file
from meditron_train.flows import evaluate as flow
from meditron_train.flows.evaluate import Request, default_output, evaluate_model
from meditron_train.launcher.environment import detect_launcher
from tests.distributed import run_ranks
from tests.evaluate.harness.test_run import medmcqa_rows, medqa_rows, write_lines
from tests.evaluate.models import write_tiny_model
from tests.refusal import refused

pytest.importorskip("lm_eval")


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    write_lines(tmp_path / "data" / "medqa4.jsonl", medqa_rows(3))
    write_lines(tmp_path / "data" / "medmcqa.jsonl", medmcqa_rows(3))
    return Request(
        tmp_path / "model",
        "medqa4,medmcqa",
        tmp_path / "data",
        Protocol(),
        "auto",
        (),
        4,
        "cpu",
        tmp_path / "scores.json",
    )


def test_files_are_read_before_the_model(request_: Request, monkeypatch: Any) -> None:
    write_tiny_model(request_.model, max_position_embeddings=512)
    monkeypatch.setattr(flow, "_opened", lambda *_: pytest.fail("the model was opened"))
    with refused("there is no file of pubmedqa"):
        evaluate_model(replace(request_, tasks="medqa4,pubmedqa"), detect_launcher({}))
    with refused("--shots 1 needs examples"):
        evaluate_model(replace(request_, protocol=Protocol(shots=1)), detect_launcher({}))
    (request_.data / "medmcqa.jsonl").write_text("{}\n")
    with refused("medmcqa.jsonl, row 1 is not of the format"):
        evaluate_model(request_, detect_launcher({}))


def test_a_device_that_is_not_there(request_: Request, monkeypatch: Any) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for device, words in (("gpu", "--device is 'gpu': write auto"), ("cuda", "torch finds no CUDA device")):
        with refused(words):
            evaluate_model(replace(request_, device=device), detect_launcher({}))


LONG = Protocol(mode="cot", max_new_tokens=512)
NO_ROOM = "--max-new-tokens is 512; the model reads 512 tokens, with the prompt"


def test_answers_that_leave_no_room_are_refused_before_anything_is_asked(
    request_: Request, monkeypatch: Any
) -> None:
    write_tiny_model(request_.model, max_position_embeddings=512)
    monkeypatch.setattr(flow, "run_benchmark", lambda *_: pytest.fail("it was asked"))
    with refused(NO_ROOM):
        evaluate_model(replace(request_, protocol=LONG), detect_launcher({}))


@pytest.mark.long
def test_the_parallel_runner_refuses_them_too(request_: Request) -> None:
    write_tiny_model(request_.model, max_position_embeddings=512)
    assert run_ranks(refused_on_a_rank, 1, replace(request_, protocol=LONG, runner="parallel")) == [NO_ROOM]


def refused_on_a_rank(rank: int, world_size: int, request: Request) -> str:
    with pytest.raises(UserError) as caught:
        evaluate_model(request, detect_launcher(os.environ))
    return str(caught.value)


def test_every_benchmark_is_kept_as_soon_as_it_is_done(request_: Request, monkeypatch: Any) -> None:
    write_tiny_model(request_.model, max_position_embeddings=512)
    run = flow.run_benchmark

    def fail_second(lm: Any, questions: Any) -> Any:
        if questions.benchmark.name == "medmcqa":
            raise MeditronError("out of memory")
        return run(lm, questions)

    with monkeypatch.context() as patched:
        patched.setattr(flow, "run_benchmark", fail_second)
        with refused("out of memory", kind=MeditronError):
            evaluate_model(request_, detect_launcher({}))
    kept = read_result(request_.output)
    assert list(kept["answers"]) == ["medqa4"] and len(kept["answers"]["medqa4"]) == 3
    result = evaluate_model(replace(request_, limit=2), detect_launcher({}))
    kept = read_result(request_.output)
    assert kept == json.loads(json.dumps(result))
    assert [score["benchmark"] for score in kept["scores"]] == ["medqa4", "medmcqa"] and kept["limit"] == 2


def test_the_checkpoint_is_named_by_its_hash(request_: Request) -> None:
    write_tiny_model(request_.model, max_position_embeddings=512)
    request = replace(request_, tasks="medqa4", limit=1)
    unknown = {"name": "model", "manifest_sha256": None, "source_manifest_sha256": None}
    assert evaluate_model(request, detect_launcher({}))["checkpoint"] == unknown
    manifest = request.model / "manifest.json"
    manifest.write_text(json.dumps({"files": {}, "source": {"manifest_sha256": "ab"}}))
    assert evaluate_model(request, detect_launcher({}))["checkpoint"] == {
        "name": "model", "manifest_sha256": sha256_file(manifest), "source_manifest_sha256": "ab"
    }  # fmt: skip


def test_a_default_output_takes_no_ones_place(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_output(Path("models/tiny")) == Path("evaluation-tiny.json")
    Path("evaluation-tiny.json").touch()
    assert default_output(Path("models/tiny")) == Path("evaluation-tiny-2.json")
    assert default_output(Path("runs/mine/hf")) == Path("evaluation-mine.json")
