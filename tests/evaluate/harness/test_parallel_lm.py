"""The parallel runner gives what lm-eval's own Hugging Face model gives, item by item, and does not depend on the
layout."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace

import pytest

from meditron_train.evaluate.harness.lm_task import Protocol
from meditron_train.tasks.catalogue import BENCHMARKS
from tests.checkpoint.tiny_llama import change_json
from tests.commands import Command
from tests.distributed import run_ranks
from tests.evaluate.asking import ask
from tests.evaluate.harness.test_run import medmcqa_rows, medqa_rows, pubmedqa_rows, write_lines
from tests.evaluate.models import write_tiny_model
from tests.evaluate.ranks import answer_benchmark

pytest.importorskip("lm_eval")

ASKED = [
    ("medqa4", Protocol(shots=1)),
    ("medmcqa", Protocol()),
    ("pubmedqa", Protocol()),
    ("medqa4", Protocol(mode="cot", max_new_tokens=8)),
]
SAMPLED = ("medqa4", Protocol(mode="sc-cot", branches=2, temperature=0.8, max_new_tokens=4))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("lm") / "model", max_position_embeddings=512)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    write_lines(path / "medqa4" / "test.jsonl", medqa_rows(5))
    write_lines(path / "medqa4" / "train.jsonl", medqa_rows(3, first=100))
    write_lines(path / "medmcqa.jsonl", medmcqa_rows(5))
    write_lines(path / "pubmedqa.jsonl", pubmedqa_rows(3))
    return path


@pytest.fixture(scope="module")
def expected(directory, data):
    """By lm-eval's HFLM."""
    from meditron_train.evaluate.harness.runners import open_runner

    lm = open_runner("transformers", directory, device="cpu", batch_size=4, dtype="float32")
    return [ask(lm, BENCHMARKS[name], data, protocol).answers for name, protocol in ASKED]


def assert_same(answers, wanted):
    assert len(answers) == len(wanted) > 0
    for ours, theirs in zip(answers, wanted, strict=True):
        assert ours.log_likelihoods == pytest.approx(theirs.log_likelihoods, abs=1e-5)
        assert replace(ours, log_likelihoods=()) == replace(theirs, log_likelihoods=())


@pytest.mark.parametrize(
    ("world_size", "parallel"), [(2, {"pipeline": 2}), pytest.param(2, {"tensor": 2}, marks=pytest.mark.long)]
)
def test_answers_are_those_of_lm_evals_own_model(directory, data, expected, world_size, parallel):
    ranks = run_ranks(answer_benchmark, world_size, directory, parallel, data, ASKED)
    for found in ranks:  # each rank has all of them
        for answers, wanted in zip(found, expected, strict=True):
            assert_same(answers, wanted)


@pytest.mark.long
def test_prompts_that_are_cut_are_counted(tmp_path, data):
    """Against the lengths of the prompts and their answers, as transformers' tokenizer has them."""
    from transformers import AutoTokenizer

    from meditron_train.evaluate.harness.runners import open_runner

    directory = write_tiny_model(tmp_path / "model")
    plain, cot = Protocol(), Protocol(mode="cot", max_new_tokens=8)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    lm = open_runner("transformers", directory, device="cpu", batch_size=4, dtype="float32")
    lengths = [
        len(tokenizer(f"{answer.prompt} A").input_ids)
        for answer in ask(lm, BENCHMARKS["medqa4"], data, plain).answers
    ]
    size = sorted(lengths)[2] - 1  # the last token is not read
    change_json(directory / "config.json", max_position_embeddings=size)
    lm = open_runner("transformers", directory, device="cpu", batch_size=4, dtype="float32")
    scores = [ask(lm, BENCHMARKS["medqa4"], data, protocol) for protocol in (plain, cot)]
    cut = [answer.is_cut for answer in scores[0].answers]
    assert cut == [length > size + 1 for length in lengths] and 0 < scores[0].num_cut == sum(cut) < 5
    assert scores[1].num_cut == 5
    (found,) = run_ranks(answer_benchmark, 1, directory, {}, data, [("medqa4", plain), ("medqa4", cot)])
    for answers, score in zip(found, scores, strict=True):
        assert_same(answers, score.answers)


@pytest.mark.long
def test_samples_do_not_depend_on_the_layout(directory, data):
    alone = run_ranks(answer_benchmark, 1, directory, {}, data, [SAMPLED])[0][0]
    assert run_ranks(answer_benchmark, 2, directory, {"pipeline": 2}, data, [SAMPLED])[1][0] == alone
    assert any(first != second for first, second in (answer.generations for answer in alone))


@pytest.mark.long
def test_a_sharded_checkpoint_on_two_stages_by_the_command(directory, data, expected, tmp_path):

    from meditron_train.checkpoint.convert.from_hf import hf_to_sharded

    hf_to_sharded(directory, tmp_path / "sharded")
    output = tmp_path / "scores.json"
    command = Command(
        "evaluate", tmp_path / "sharded", "parallel.pipeline=2", "--processes", 2, "--tasks", "medmcqa",
        "--data", data, "--output", output,
        environment=os.environ,
    )  # fmt: skip
    stdout, stderr = command.communicate(timeout=240)
    assert command.returncode == 0, stderr
    assert stdout.count("medmcqa:") == 1  # rank 0 alone reports
    result = json.loads(output.read_text())
    assert result["runner"] == "parallel"
    wanted = [asdict(answer) for answer in expected[1]]
    for ours, theirs in zip(result["answers"]["medmcqa"], wanted, strict=True):
        assert ours["log_likelihoods"] == pytest.approx(theirs["log_likelihoods"], abs=1e-5)
