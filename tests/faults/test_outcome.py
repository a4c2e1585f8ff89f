"""The campaign's own judgment: it must see a broken promise."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.faults.outcome import Outcome, compare, read_outcomes
from tests.faults.table import replace_between_marks, summary, table

GOOD = Outcome(
    fault="kill -9",
    where="ranks",
    promise="starts again",
    recovery_s=3.0,
    steps_lost=4,
    most_lost=5,
    last_step=10,
    planned_step=10,
    identical=True,
    starts=2,
)


@pytest.mark.parametrize(
    "change", [{"steps_lost": 6}, {"last_step": 9}, {"identical": False}, {"problem": "the job ended FAILED"}]
)
def test_a_broken_promise_is_seen(change):
    assert GOOD.kept
    assert not replace(GOOD, **change).kept


@pytest.mark.parametrize(
    ("steps", "losses", "expected"),
    [
        ([1, 2, 3], [3.0, 2.0, 1.0], (3, True, "")),
        ([1, 2], [3.0, 2.0], (2, True, "the run ended at step 2 of 3")),
        ([1, 3], [3.0, 1.0], (3, False, "the metrics do not have each step once")),
        ([1, 2, 2, 3], [3.0, 2.0, 2.0, 1.0], (3, False, "the metrics do not have each step once")),
        (
            [1, 2, 3],
            [3.0, 2.0000001, 1.0],
            (3, False, "the loss of step 2 differs from the undisturbed run's"),
        ),
        ([], [], (0, True, "the run ended at step 0 of 3")),
    ],
)
def test_compare(steps, losses, expected):
    assert compare(steps, losses, [3.0, 2.0, 1.0]) == expected


def test_another_layout_may_round_differently_and_not_more():
    assert compare([1, 2], [3.0, 2.00001], [3.0, 2.0], tolerance=1e-5) == (2, True, "")
    assert compare([1, 2], [3.0, 2.0001], [3.0, 2.0], tolerance=1e-5)[1] is False


def test_a_full_disk_may_cost_lines_and_no_loss():
    assert compare([1, 3], [3.0, 1.0], [3.0, 2.0, 1.0], gaps=True) == (3, True, "")
    assert compare([1, 3], [3.0, 2.0], [3.0, 2.0, 1.0], gaps=True)[1] is False
    assert compare([1, 3, 3], [3.0, 1.0, 1.0], [3.0, 2.0, 1.0], gaps=True)[1] is False


def test_results_of_an_interrupted_campaign(tmp_path):
    path = tmp_path / "results.jsonl"
    GOOD.append_to(path)
    GOOD.append_to(path)
    with open(path, "a") as file:
        file.write('{"fault": "to')
    assert read_outcomes(path) == [GOOD, GOOD]


def test_the_table_counts_and_names_what_broke():
    bad = replace(GOOD, fault="disk full", problem="the run ended at\nstep 3", last_step=3)
    text = table([GOOD, replace(GOOD, recovery_s=9.0), bad])
    assert "| kill -9 | ranks | starts again | 2 of 2 | 6 / 9 | 4 / 4 |" in text
    assert "| disk full | ranks | starts again | 0 of 1 |" in text
    said = summary([GOOD, bad])
    assert said.startswith("2 faults: 1 promises kept, 1 broken; 1 runs ended")
    assert "- Broken: disk full (ranks): the run ended at step 3" in said


def test_only_what_is_between_the_marks_is_replaced():
    text = "a\n<!-- campaign: begin -->\nold\n<!-- campaign: end -->\nb\n"
    assert replace_between_marks(text, "new") == text.replace("old", "new")
    with pytest.raises(ValueError, match="there is no"):
        replace_between_marks("nothing", "new")
