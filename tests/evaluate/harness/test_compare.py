"""The table, its warnings, and the paired test, from results by hand."""

from __future__ import annotations

import csv
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from meditron_train.evaluate.harness.compare import compare, compare_pair, describe_protocol, read_result
from tests.refusal import refused

PROTOCOL = {
    "mode": "likelihood",
    "shots": 0,
    "seeds": [1234],
    "branches": 1,
    "temperature": 0.0,
    "chat": False,
}


def result(
    model: str, chosen: list[int], right: list[int], benchmark: str = "medqa4", **changes: Any
) -> dict[str, Any]:
    """As `evaluate --output` writes it: what was chosen, and what was right, question by question."""
    number = len(right)
    accuracy = sum(a == b for a, b in zip(chosen, right, strict=True)) / number
    score = {
        "benchmark": benchmark, "title": benchmark, "protocol": PROTOCOL, "file_sha256": "ab" * 32, "num_items": number,
        "accuracy": accuracy, "interval": [accuracy - 0.125, accuracy + 0.125], "spread": 0.0, "num_unparsed": 0,
        "num_ties": 0, "accuracy_of_parsed": accuracy, "chance": 0.25, **changes,
    }  # fmt: skip
    answers = [
        {"id": str(i), "seed": 1234, "chosen": a, "answer": b}
        for i, (a, b) in enumerate(zip(chosen, right, strict=True), 1)
    ]
    return {"model": model, "protocol": score["protocol"], "scores": [score], "answers": {benchmark: answers}}


RIGHT = [0, 1, 2, 3, 0, 1, 2, 3]


def test_the_table_has_ours_beside_the_published() -> None:
    table = compare([result("ours", [0, 1, 2, 3, 1, 2, 3, 0], RIGHT), result("mmlu one", [1], [1], "mmlu")])
    assert table.columns[-1] == "mmlu"
    (model, protocol, source, cells), *others = table.rows
    assert (model, protocol, source) == ("ours", "likelihood, 0 shots", "this evaluation")
    assert cells[table.columns.index("MedQA-4")] == "50.0 [37.5, 62.5] n=8"
    assert [cell for cell in cells if cell] == ["50.0 [37.5, 62.5] n=8"]
    assert any(model == "Meditron-70B" and "Chen et al. 2023" in source for model, _, source, _ in others)
    lines = table.markdown().splitlines()
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_html_and_csv_say_the_same() -> None:
    table = compare([result('<b>a & b</b>, "c"', RIGHT, RIGHT)])
    rows = list(csv.reader(io.StringIO(table.csv())))
    assert rows[0] == ["model", "protocol", *table.columns, "source"]
    assert rows[1:] == [[model, protocol, *cells, source] for model, protocol, source, cells in table.rows]
    cells: list[str] = []

    class Cells(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            assert tag != "b"
            if tag in ("td", "th"):
                cells.append("")
            self.inside = tag in ("td", "th")

        def handle_data(self, data: str) -> None:
            if self.inside:
                cells[-1] += data

        def handle_endtag(self, tag: str) -> None:
            self.inside = False

    Cells().feed(table.html())
    assert cells == [cell for row in rows for cell in row]


def test_a_protocol_in_words() -> None:
    assert describe_protocol({**PROTOCOL, "chat": True}) == "likelihood, 0 shots, chat"
    sampled = {
        **PROTOCOL,
        "mode": "sc-cot",
        "shots": 3,
        "seeds": [1, 2, 3],
        "branches": 5,
        "temperature": 0.8,
    }
    assert describe_protocol(sampled) == "sc-cot, 3 shots, seeds 1, 2, 3, 5 branches at T=0.8"
    longer = {**PROTOCOL, "mode": "cot", "max_new_tokens": 512}
    assert describe_protocol(longer) == "cot, 0 shots, up to 512 tokens"
    assert describe_protocol({**PROTOCOL, "shots": 1}) == "likelihood, 1 shots, seed 1234"


def warnings(*results: dict[str, Any]) -> str:
    return "\n".join(compare(results).warnings)


def test_what_cannot_be_compared_is_said() -> None:
    ours = result("ours", RIGHT, RIGHT)
    assert "differ" not in warnings(ours, result("other", RIGHT, RIGHT)).partition("\n")[2]
    chat = result("chat", RIGHT, RIGHT, protocol={**PROTOCOL, "chat": True})
    assert (
        "the protocols of these evaluations differ: likelihood, 0 shots; likelihood, 0 shots, chat"
        in warnings(ours, chat)
    )
    half = {**result("half", RIGHT, RIGHT), "runner": "parallel", "dtype": "bfloat16"}
    whole = {**half, "dtype": "float32"}
    assert "likelihood, 0 shots, parallel, bfloat16; likelihood, 0 shots, parallel, float32" in warnings(
        half, whole
    )
    assert compare([half]).rows[0][1] == "likelihood, 0 shots, parallel, bfloat16"
    cut = result("cut", RIGHT, RIGHT)
    cut["scores"][0]["num_cut"] = 2
    assert f"2 of {len(RIGHT)} prompts are longer than what the model reads" in warnings(cut)
    few = {**result("few", [0], [0]), "limit": 1}
    said = warnings(ours, few)
    assert "few: only the first 1 questions" in said
    assert "medqa4: the questions of these evaluations differ: ours: 8 of the file abab" in said
    other = result("other", RIGHT, RIGHT, file_sha256="cd" * 32)
    assert "other: 8 of the file cdcd" in warnings(ours, other)


def test_answers_that_could_not_be_parsed_are_said() -> None:
    some = result("ours", RIGHT, RIGHT, num_unparsed=3, accuracy_of_parsed=0.8)
    assert (
        "ours, medqa4: 3 of 8 answers could not be parsed and count as wrong (without them: 80.0)"
        in warnings(some)
    )
    none = result("ours", RIGHT, RIGHT, num_unparsed=8, accuracy_of_parsed=None)
    assert "ours, medqa4: no answer could be parsed" in warnings(none)


def test_the_paired_test_counts_what_only_one_answers() -> None:
    first = result("a", [0, 1, 2, 3, 0, 1, 0, 0], RIGHT)
    second = result("b", [0, 0, 0, 0, 1, 0, 2, 0], RIGHT)
    ((name, test),) = compare_pair(first, second).items()
    assert test is not None
    assert (name, test.only_first, test.only_second) == ("medqa4", 5, 1)
    assert test.p_value == pytest.approx(2 * (1 + 6) / 2**6)  # two-sided binomial, 1 of 6 by hand


@pytest.mark.parametrize(
    "other",
    [
        result("b", RIGHT, RIGHT, file_sha256="cd" * 32),  # other questions of the same numbers
        result("b", RIGHT, RIGHT[::-1]),
        result("b", RIGHT[:4], RIGHT[:4]),
    ],
)
def test_other_questions_are_not_paired(other: dict[str, Any]) -> None:
    assert compare_pair(result("a", RIGHT, RIGHT), other) == {"medqa4": None}


def test_open_questions_have_no_paired_test() -> None:
    unscored = {"benchmark": "medicationqa", "accuracy": None, "interval": None}
    assert compare_pair(result("a", [0], [0], **unscored), result("b", [1], [0], **unscored)) == {}
    assert compare([result("a", [0], [0], **unscored)]).rows[0][3].count("") == len(compare([]).columns) + 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"benchmark": "medqa6"}, "its benchmark 'medqa6' is unknown; known are medqa4"),
        ({"protocol": {"mode": "cot"}}, "its protocol lacks 'shots'"),
        ({"protocol": 3}, "is not a result"),
    ],
)
def test_results_that_cannot_be_read(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(result("a", RIGHT, RIGHT)))
    assert read_result(path)["model"] == "a"
    content = result("a", RIGHT, RIGHT)
    content["scores"][0].update(change)
    path.write_text(json.dumps(content))
    with refused("r.json is not a result of `evaluate --output`", words):
        read_result(path)
    del content["scores"][0]["num_items"]
    path.write_text(json.dumps(content))
    with refused("a score lacks 'num_items'"):
        read_result(path)
