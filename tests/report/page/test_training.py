"""Words about the training curves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meditron_train.report.page.training import skipped_steps
from meditron_train.report.run_record import read_run
from tests.report.synthetic_run import write_run


@pytest.mark.parametrize(
    ("interval", "said"),
    [(1, "the count rose in steps 2, 4."), (25, "the count rose in steps 26–50, 76–100.")],
)
def test_skipped_steps_are_placed_no_closer_than_they_were_recorded(tmp_path: Path, interval: int, said: str):
    lines = [
        {"step": number * interval, "loss": 2.0, "num_skipped_steps": skipped}
        for number, skipped in enumerate((0, 1, 1, 3), start=1)
    ]
    write_run(tmp_path, num_steps=1)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (text, *_) = skipped_steps(read_run(tmp_path))
    assert said in text.text
