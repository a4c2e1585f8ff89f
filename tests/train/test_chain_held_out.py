"""The warning of what earlier runs held out never ends a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from meditron_train.config.schema import Config
from meditron_train.train.chain_held_out import warn_of_earlier_held_out

TEXTS = [
    "[" * 100_000,
    "a: &a [*a]",
    "data: 3",
    "data: {validation: 5, train: yes, validation_fraction: much}",
    'data: {validation: [{path: "\\0"}], train: [{path: 1}, 2], validation_fraction: [1]}',
    'model: {from: "\\0"}',
    "\x00",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_foreign_file_beside_the_base_raises_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    values = {
        "model": {"from": str(tmp_path / "hf")},
        "data": {"tokenizer": "tok", "train": [{"name": "c", "path": str(tmp_path / "c")}]},
        "train": {"steps": 1, "seq_len": 8, "global_batch_size": 1},
    }
    warn_of_earlier_held_out(Config.model_validate(values))


def test_a_directory_in_its_place_raises_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").mkdir()
    test_a_foreign_file_beside_the_base_raises_nothing(tmp_path / "config.yaml", "a: 1")
