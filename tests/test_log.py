from __future__ import annotations

import logging

import pytest

from meditron_train.log import EVERY_RANK, ROOT_NAME, get_logger, setup_logging


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


def test_before_the_run_has_its_directory_rank_0_speaks_for_all(capsys):
    setup_logging(rank=1)
    get_logger("x").warning("what every rank finds")
    get_logger("x").error("an error")
    err = capsys.readouterr().err
    assert "what every rank finds" not in err and "[rank 1] ERROR an error" in err


def test_a_full_disk_costs_one_warning_until_a_line_gets_through(capsys, tmp_path):
    setup_logging(rank=0, run_dir=tmp_path)
    (record,) = (h for h in logging.getLogger(ROOT_NAME).handlers if isinstance(h, logging.FileHandler))
    log, disk = get_logger("x"), record.stream

    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

        def flush(self):
            pass

        def close(self):
            pass

    for number in range(5):
        record.stream = Full()
        log.info("line %d", number)
        log.info("line %d again", number)
        if number % 2:  # there is room for a moment
            record.stream = disk
            log.info("through %d", number)
    err = capsys.readouterr().err
    assert "Logging error" not in err and "Traceback" not in err
    assert err.count("cannot be written, the console has the lines: No space left on device") == 3
    assert all(f"line {number} again" in err for number in range(5))
    record.stream = disk
    assert "through 3" in (tmp_path / "logs" / "rank_00000.log").read_text()


def test_names_in_files_do_not_drive_the_terminal(capsys, tmp_path):
    from meditron_train.log import get_logger, printable, setup_logging

    assert printable("µ 漢\n\tx") == "µ 漢\n\tx"
    assert printable("a\x1b[2Jb\x9bc\ud800\r") == "a\\x1b[2Jb\\x9bc\\ud800\\r"
    setup_logging(0, tmp_path)
    get_logger("x").warning("the tensor %s", "\x1b[31mred\ud800")
    assert "the tensor \\x1b[31mred\\ud800" in capsys.readouterr().err
    assert "\\x1b[31mred" in (tmp_path / "logs" / "rank_00000.log").read_text()
    setup_logging()


def test_what_every_rank_says_reaches_the_console_once(capsys, tmp_path):
    for rank in (0, 1):
        setup_logging(rank, tmp_path)
        get_logger("x").warning("a loss spike", extra=EVERY_RANK)
        get_logger("x").warning("of this rank alone")
    said = capsys.readouterr().err
    assert said.count("a loss spike") == 1
    assert said.count("of this rank alone") == 2
    for rank in (0, 1):
        assert "a loss spike" in (tmp_path / "logs" / f"rank_{rank:05d}.log").read_text()
