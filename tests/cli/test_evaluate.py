"""Results of earlier evaluations, and what is refused before a model is opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from meditron_train.cli.evaluate import _line, evaluate
from meditron_train.evaluate.harness.compare import read_result
from tests.refusal import refused


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{}"])
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with refused("r.json", "is not a result of `evaluate --output`"):
        read_result(tmp_path / "r.json")


def test_a_wish_that_cannot_be_met_is_refused_before_the_model_is_opened(tmp_path: Path) -> None:
    """There is no model at all."""
    model, result = tmp_path / "model", tmp_path / "r.json"
    result.write_text("{}")
    (tmp_path / "file").touch()
    for wish, words in (
        ({"table": tmp_path / "table.txt"}, "write a name that ends in .md, .html or .csv"),
        ({"table": tmp_path / "file" / "table.md"}, "its directory cannot be made"),
        ({"output": tmp_path}, "cannot be written"),
        ({"output": result, "compare": [result]}, "would take the place of a file that --compare reads"),
        ({"compare": [result]}, "r.json is not a result"),
        ({"compare": [tmp_path / "absent.json"]}, "absent.json is not a result"),
    ):
        with refused(words):
            evaluate(model, tasks="medqa4", **wish)  # type: ignore[arg-type]


def test_a_score_in_one_line() -> None:
    score = {
        "benchmark": "arc_challenge", "accuracy": 0.5, "interval": [0.25, 0.75], "num_items": 8, "chance": 0.25,
        "accuracy_by_length": 0.625, "spread": 0.0, "num_unparsed": 0, "num_ties": 0, "protocol": {"seeds": [1]},
    }  # fmt: skip
    assert _line("m", score) == "m  arc_challenge: 50.0 % [25.0, 75.0] of 8 (chance 25.0, acc_norm 62.5)"
    assert _line("m", {**score, "num_cut": 3}).endswith("acc_norm 62.5, 3 prompts cut)")
    del score["accuracy_by_length"]
    assert _line("m", score) == "m  arc_challenge: 50.0 % [25.0, 75.0] of 8 (chance 25.0)"
