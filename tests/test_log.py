from __future__ import annotations

import logging

import pytest

from meditron_train.log import ROOT_NAME, get_logger, setup_logging


@pytest.fixture(autouse=True)
def _restore_logging():
    root = logging.getLogger(ROOT_NAME)
    handlers, level, propagate = list(root.handlers), root.level, root.propagate
    root.handlers.clear()
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    root.propagate = propagate


def test_rank_zero_speaks_and_the_others_only_warn(capsys, tmp_path):
    setup_logging(rank=0, run_dir=tmp_path)
    get_logger("meditron_train.data").info("zero says")
    setup_logging(rank=1, run_dir=tmp_path)
    get_logger("elsewhere").info("one says")
    get_logger("elsewhere").warning("one warns")
    out, err = capsys.readouterr()
    assert out == ""
    assert "zero says" in err
    assert "one says" not in err
    assert "[rank 1] WARNING one warns" in err
    assert "zero says" in (tmp_path / "logs/rank_00000.log").read_text()
    assert "one says" in (tmp_path / "logs/rank_00001.log").read_text()


def test_a_second_setup_does_not_repeat_lines(capsys):
    setup_logging()
    setup_logging()
    get_logger("x").info("once")
    assert capsys.readouterr().err.count("once") == 1
