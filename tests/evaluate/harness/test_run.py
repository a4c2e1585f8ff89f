"""Benchmarks run on a tiny model: against lm-eval's own tasks, and what happens to answers and to bad files."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from meditron_train.errors import UserError
from meditron_train.evaluate.harness.lm_task import Protocol
from meditron_train.evaluate.harness.parse_answer import parse_answer
from meditron_train.tasks.catalogue import BENCHMARKS, find_benchmarks, read_prompt
from meditron_train.tasks.items import find_file, read_items
from tests.evaluate.asking import ask
from tests.long import mostly_long

evaluator = pytest.importorskip("lm_eval.evaluator")
harness_tasks = pytest.importorskip("lm_eval.tasks")

WORDS = ("kamo", "riten", "zupa", "lexor", "dexin", "tavi", "rone", "moka")


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def medqa_rows(number: int, first: int = 0) -> list[dict]:
    return [
        {
            "question": f"Which {WORDS[i % 8]} is {WORDS[i * 3 % 8]} {i}?",
            "options": {letter: f"{WORDS[(i + k) % 8]} {k}" for k, letter in enumerate("ABCD")},
            "answer_idx": "ABCD"[i % 4],
        }
        for i in range(first, first + number)
    ]


def medmcqa_rows(number: int) -> list[dict]:
    return [
        {
            "id": f"q{i}",
            "question": f"{WORDS[i % 8]}?",
            **{f"op{x}": f"{WORDS[(i + k) % 8]}" for k, x in enumerate("abcd")},
            "cop": i % 4,
        }
        for i in range(number)
    ]


def pubmedqa_rows(number: int) -> list[dict]:
    return [
        {
            "pubid": i,
            "question": f"Is {WORDS[i % 8]}?",
            "context": {"contexts": [WORDS[i % 8], WORDS[(i + 1) % 8]]},
            "final_decision": ("yes", "no", "maybe")[i % 3],
        }
        for i in range(number)
    ]


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    from meditron_train.evaluate.harness.runners import open_runner
    from tests.evaluate.models import write_tiny_model

    directory = write_tiny_model(tmp_path_factory.mktemp("lm") / "model", max_position_embeddings=512)
    return open_runner("transformers", directory, device="cpu", batch_size=4, dtype="float32")


@pytest.fixture
def data(tmp_path) -> Path:
    write_lines(tmp_path / "medqa4" / "test.jsonl", medqa_rows(7))
    write_lines(tmp_path / "medqa4" / "train.jsonl", medqa_rows(5, first=100))
    write_lines(tmp_path / "medmcqa.jsonl", medmcqa_rows(6))
    write_lines(tmp_path / "pubmedqa.jsonl", pubmedqa_rows(6))
    return tmp_path


# The file of the harness's task, and rows as their publishers have them, under the benchmark's name here.
PUBLISHED: dict[str, tuple[str, list[dict]]] = {
    "medqa4": ("medqa", medqa_rows(7)),
    "medmcqa": ("medmcqa", medmcqa_rows(6)),
    "pubmedqa": ("pubmedqa", pubmedqa_rows(6)),
    "mmlu_medical": (
        "default/mmlu_clinical_knowledge",
        [
            {"question": f" {WORDS[i]}? ", "choices": [WORDS[(i + k) % 8] for k in range(4)], "answer": i % 4,
             "subject": "clinical_knowledge"}
            for i in range(6)
        ],
    ),
    "careqa": (
        "careqa_en",
        [
            {"question": f"{WORDS[i]}?" if i else None, "cop": i % 4 + 1, "unique_id": str(i),
             **{f"op{k + 1}": WORDS[(i + k) % 8] for k in range(4)}}
            for i in range(5)
        ],
    ),
    "medconceptsqa": (
        "med_concepts_qa_atc_easy",
        [
            {"question_id": i, "answer_id": "ABCD"[i % 4], **{f"option{k + 1}": WORDS[(i + k) % 8] for k in range(4)},
             "question": "\n".join([f"What is the description of the medical code N0{i}A in ATC?",
                                    *(f"{'ABCD'[k]}. {WORDS[(i + k) % 8]}" for k in range(4))])}
            for i in range(5)
        ],
    ),
    "truthfulqa": (
        "truthfulqa_mc1",
        [
            {"question": f"{WORDS[i]}?", "mc1_targets": {
                "choices": [" ".join(WORDS[(i + j) % 8] for j in range(k % 3 + 1)) + f" {k}" for k in range(4 + 3 * i)],
                "labels": [1, *[0] * (3 + 3 * i)]}}
            for i in range(4)
        ],
    ),
    "arc_challenge": (
        "arc_challenge",
        [
            {"id": f"m{i}", "question": f"{WORDS[i]}?", "answerKey": "1234"[i % 4], "choices": {
                "text": [" ".join(WORDS[(i + j) % 8] for j in range(3 * k + 1)) for k in range(4)],
                "label": list("1234")}}
            for i in range(6)
        ],
    ),
}  # fmt: skip


def in_lm_evals_format(name: str, rows: list[dict]) -> list[dict]:
    """The rows as the packaged task of that name wants them."""
    if name == "medqa":
        return [
            {
                "sent1": row["question"],
                **{f"ending{k}": row["options"][letter] for k, letter in enumerate("ABCD")},
                "label": "ABCD".index(row["answer_idx"]),
            }
            for row in rows
        ]
    if name == "pubmedqa":
        return [
            {
                "QUESTION": row["question"],
                "CONTEXTS": row["context"]["contexts"],
                "final_decision": row["final_decision"],
            }
            for row in rows
        ]
    return rows


@pytest.mark.parametrize("name", mostly_long(PUBLISHED, "medqa4", "truthfulqa", "arc_challenge"))
def test_scores_are_lm_evals_own_item_by_item(lm, tmp_path, name):
    task, rows = PUBLISHED[name]
    file = write_lines(tmp_path / "theirs.jsonl", in_lm_evals_format(task, rows))
    packaged = next(Path(harness_tasks.__file__).parent.rglob(f"{task}.yaml"))
    splits = {split: str(file) for split in ("train", "validation", "test", "dev")}
    own = {"include": str(packaged), "task": "theirs", "dataset_path": "json", "dataset_name": None}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "theirs.yaml").write_text(
        yaml.safe_dump({**own, "dataset_kwargs": {"data_files": splits}, "num_fewshot": 0})
    )
    manager = harness_tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    expected = evaluator.simple_evaluate(
        lm, tasks=["theirs"], task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    write_lines(tmp_path / f"{BENCHMARKS[name].file_name}.jsonl", rows)
    score = ask(lm, BENCHMARKS[name], tmp_path, Protocol())
    samples = sorted(expected["samples"]["theirs"], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(score.answers) == len(rows)
    for sample, answer in zip(samples, score.answers, strict=True):
        assert answer.prompt == sample["arguments"][0][0]
        assert answer.log_likelihoods == pytest.approx([float(r[0][0]) for r in sample["resps"]], abs=1e-6)
        assert answer.is_correct == bool(sample["acc"])
        if "acc_norm" in sample:
            by_length = answer.chosen if answer.chosen_by_length is None else answer.chosen_by_length
            assert (by_length == answer.answer) == bool(sample["acc_norm"])
    assert score.accuracy == pytest.approx(expected["results"]["theirs"]["acc,none"])
    if name == "arc_challenge":
        assert score.accuracy_by_length == pytest.approx(expected["results"]["theirs"]["acc_norm,none"])
        assert any(answer.chosen_by_length != answer.chosen for answer in score.answers)


def test_examples_come_from_the_train_split_and_depend_on_the_seed(lm, data):
    score = ask(lm, BENCHMARKS["medqa4"], data, Protocol(shots=2, seeds=(1234, 432)))
    shown = [answer.prompt for answer in score.answers if answer.id == "1"]
    assert len(shown) == 2 and shown[0] != shown[1]
    for prompt in shown:
        assert prompt.count("Question:") == 3
        assert (
            prompt.endswith("Answer:") and " 10" in prompt
        )  # numbers from 100 on are those of the train split
    assert len(score.answers) == 14
    again = ask(lm, BENCHMARKS["medqa4"], data, Protocol(shots=2, seeds=(1234, 432)))
    assert again.answers == score.answers


@pytest.mark.parametrize("mode", ["cot", "sc-cot"])
def test_examples_of_chain_of_thought_reason_and_end_with_the_letter(data, mode):
    train = [
        {**row, **({"explanation": f"Since {i}."} if i % 2 else {})}
        for i, row in enumerate(medqa_rows(6, 100))
    ]
    write_lines(data / "medqa4" / "train.jsonl", train)
    score = ask(Scripted(["The answer is A."]), BENCHMARKS["medqa4"], data, Protocol(mode=mode, shots=3))
    for answer in score.answers:
        examples = answer.prompt.split("\n\nQuestion: ")[:-1]
        assert len(examples) == 3
        for example in examples:
            (number,) = [i for i in (1, 3, 5) if f" {100 + i}?" in example]
            letter = train[number]["answer_idx"]
            assert "Reason step by step" in example
            assert example.endswith(f"\nAnswer: Since {number}.\nThe answer is {letter}.")
            assert parse_answer(
                example.rpartition("Answer: ")[2], read_prompt("options"), "wxyz"
            ) == "ABCD".index(letter)
    with pytest.raises(
        UserError, match="has 3 examples that are not asked and explain their answer.*--shots is 4"
    ):
        ask(Scripted([""]), BENCHMARKS["medqa4"], data, Protocol(mode=mode, shots=4))


@pytest.mark.parametrize("name", ["truthfulqa", "arc_challenge", "mmlu_medical", "medconceptsqa"])
def test_reasoning_sees_the_options_and_answers_by_their_letter(tmp_path, name):
    write_lines(tmp_path / f"{BENCHMARKS[name].file_name}.jsonl", PUBLISHED[name][1][:1])
    score = ask(Scripted(["Hm. The answer is B."]), BENCHMARKS[name], tmp_path, Protocol(mode="cot"))
    (answer,) = score.answers
    assert answer.chosen == 1 and score.num_unparsed == 0
    assert re.search(r"\nA\. .+\nB\. .+\n", answer.prompt) and answer.prompt.endswith("\nAnswer:")
    assert "\nA:\n" not in answer.prompt  # nothing waits for an answer before the instruction


def test_samples_are_drawn_from_the_whole_distribution(lm, data, monkeypatch):
    """transformers would keep 50 tokens, or what the model's generation_config.json says."""
    asked = []
    generate = lm.model.generate
    monkeypatch.setattr(
        lm.model, "generate", lambda **settings: asked.append(settings) or generate(**settings)
    )
    sampled = Protocol(mode="sc-cot", branches=2, temperature=0.8, max_new_tokens=2)
    ask(lm, BENCHMARKS["medqa4"], data, sampled, limit=1)
    assert [(settings["temperature"], settings["top_k"], settings["top_p"]) for settings in asked] == [
        (0.8, 0, 1.0)
    ]
    ask(lm, BENCHMARKS["medqa4"], data, Protocol(mode="cot", max_new_tokens=2), limit=1)
    assert asked[-1]["do_sample"] is False and "top_k" not in asked[-1]


def test_too_few_examples_are_refused(lm, data):
    with pytest.raises(UserError, match="has 5 examples"):
        ask(lm, BENCHMARKS["medqa4"], data, Protocol(shots=6))
    with pytest.raises(UserError, match="needs examples that are not asked"):
        ask(lm, BENCHMARKS["medmcqa"], data, Protocol(shots=1))


class Scripted:
    """Stands in for a model: gives the texts of a script, one after the other."""

    def __new__(cls, texts):
        from lm_eval.api.model import LM

        class _Scripted(LM):
            def generate_until(self, requests, disable_tqdm=False):
                return [texts[i % len(texts)] for i, _ in enumerate(requests)]

            def loglikelihood(self, requests, disable_tqdm=False):
                raise NotImplementedError

            loglikelihood_rolling = loglikelihood

        return _Scripted()


def test_self_consistency_votes_and_counts_what_cannot_be_parsed(data):
    branches = ["The answer is B.", "so the answer is (B)", "Answer: C", "I cannot say.", "The answer is J."]
    score = ask(
        Scripted(branches),
        replace(BENCHMARKS["medqa4"]),
        data,
        Protocol(mode="sc-cot", branches=5, temperature=0.8),
        limit=4,
    )
    for answer in score.answers:
        assert answer.parsed == (1, 1, 2, None, None)
        assert answer.chosen == 1 and not answer.is_tie
        assert answer.generations == tuple(branches)
        assert "Reason step by step" in answer.prompt
    assert score.accuracy == 0.25 and score.num_unparsed == 0


def test_ties_are_said_and_unparsed_answers_count_as_wrong(data):
    tied = ask(
        Scripted(["The answer is A.", "The answer is B."]),
        BENCHMARKS["medqa4"],
        data,
        Protocol(mode="sc-cot", branches=2, temperature=0.8),
        limit=4,
    )
    assert tied.num_ties == 4 and all(answer.chosen == 0 for answer in tied.answers)
    silent = ask(Scripted(["Hm."]), BENCHMARKS["medqa4"], data, Protocol(mode="cot"), limit=4)
    assert (silent.accuracy, silent.num_unparsed, silent.accuracy_of_parsed) == (0.0, 4, None)


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("It may be A, but the answer is D.", 3),
        ("The answer is: (c)", 2),
        ("Answer: B\n\nThe answer is A.", 0),
        ("The answer is Aspirin.", None),
        ("The answer is a beta blocker.", None),
        ("The answer is a matter of timing: option B.", None),
        ("ANSWER: B", 1),
        ("The answer is **B**.", 1),
        ("**Answer:** (B) Aspirin", 1),
        ("the answer is option C.", 2),
        ("Answer: b", None),
        ("The answer is A-dependent.", None),
        ("The answer is E.", None),
        ("Answer: A beta blocker", None),
        ("The answer is A because it blocks.", 0),
        ("The answer is A\nbecause it blocks.", 0),
        ("Answer: A Beta blocker", 0),
        ("", None),
    ],
)
def test_parsing_letters(text, option):
    assert parse_answer(text, read_prompt("options"), ("w", "x", "y", "z")) == option


@pytest.mark.parametrize(
    ("text", "option"),
    [("The answer is No.", 1), ('answer: "maybe"', 2), ("yes", None), ("The answer is yesterday", None)],
)
def test_parsing_words(text, option):
    assert parse_answer(text, read_prompt("pubmedqa"), ("yes", "no", "maybe")) == option


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "x?", "options": {"A": "a", "B": "b"}}, "row 2 .*no 'answer_idx'"),
        ({"question": "x?", "options": {}, "answer_idx": "A"}, "row 2 "),
        ({"question": " ", "options": {"A": "a", "B": "b"}, "answer_idx": "A"}, "row 2 .*its question is"),
        ({"question": "x?", "options": {"A": "a", "B": 3}, "answer_idx": "A"}, "row 2 .*option B is 3"),
        ({"question": "x?", "options": {"A": "a", "B": "b"}, "answer_idx": "C"}, "row 2 "),
        ([], "row 2 "),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    path = write_lines(tmp_path / "medqa4.jsonl", [medqa_rows(1)[0], row])
    with pytest.raises(UserError, match=message):
        read_items(path, BENCHMARKS["medqa4"])


def test_a_row_that_is_not_json_is_named(tmp_path):
    path = tmp_path / "medqa4.jsonl"
    path.write_text(json.dumps(medqa_rows(1)[0]) + "\n{broken\n")
    with pytest.raises(UserError, match="row 2 is not JSON"):
        read_items(path, BENCHMARKS["medqa4"])


def test_only_the_nine_medical_subjects(tmp_path):
    rows = [
        {"question": f"{subject}?", "choices": ["a", "b", "c", "d"], "answer": 1, "subject": subject}
        for subject in ("anatomy", "astronomy", "virology")
    ]
    path = write_lines(tmp_path / "mmlu.jsonl", rows)
    assert [item.category for item in read_items(path, BENCHMARKS["mmlu_medical"])] == ["anatomy", "virology"]
    with pytest.raises(UserError, match="holds no items of the categories"):
        read_items(write_lines(tmp_path / "other.jsonl", rows[1:2]), BENCHMARKS["mmlu_medical"])


def test_files_are_found_by_name_or_folder(tmp_path):
    benchmark = BENCHMARKS["medqa4"]
    assert find_file(tmp_path, benchmark) is None
    folder = write_lines(tmp_path / "medqa4" / "validation.jsonl", medqa_rows(1))
    assert find_file(tmp_path, benchmark) == folder
    single = write_lines(tmp_path / "medqa4.jsonl", medqa_rows(1))
    assert find_file(tmp_path, benchmark) == single


def test_the_split_that_is_scored_comes_first(tmp_path):
    write_lines(tmp_path / "medmcqa" / "test.jsonl", [{**row, "cop": -1} for row in medmcqa_rows(2)])
    validation = write_lines(tmp_path / "medmcqa" / "validation.jsonl", medmcqa_rows(2))
    assert find_file(tmp_path, BENCHMARKS["medmcqa"]) == validation
    other = write_lines(tmp_path / "medqa4" / "validation.jsonl", medqa_rows(1))
    assert find_file(tmp_path, BENCHMARKS["medqa4"]) == other
    test = write_lines(tmp_path / "medqa4" / "test.jsonl", medqa_rows(1))
    assert find_file(tmp_path, BENCHMARKS["medqa4"]) == test


@pytest.mark.parametrize("content", [{"data": [{"question": "x?"}]}, 3, "rows"])
def test_json_that_holds_no_rows_is_refused(tmp_path, content):
    path = tmp_path / "medqa4.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="medqa4.json cannot be read: it is neither a list of objects nor"):
        read_items(path, BENCHMARKS["medqa4"])


def test_an_unknown_task_gets_the_nearest_name():
    with pytest.raises(UserError, match="'medqa'.*Did you mean medqa"):
        find_benchmarks("pubmedqa,medqa")
