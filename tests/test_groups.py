"""Which tests stay in one process when several run side by side."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conftest import group_of

TEST = """
import os, time
from pathlib import Path
import pytest

@pytest.mark.parametrize("number", range(4))
def test_worker(number):
    time.sleep(0.05)
    Path(f"{__file__}.{number}").write_text(os.environ["PYTEST_XDIST_WORKER"])
"""


def test_the_tests_of_a_file_run_in_one_process(tmp_path: Path) -> None:
    for name in ("test_a.py", "test_b.py", "test_c.py"):
        (tmp_path / name).write_text(TEST)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "2", "-p", "tests.conftest", "-c", "/dev/null", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    workers = {
        name: {path.read_text() for path in tmp_path.glob(f"{name}.py.*")} for name in ("test_a", "test_b")
    }
    assert [len(found) for found in workers.values()] == [1, 1]


def test_what_shares_nothing_goes_alone() -> None:
    one, other = "tests/train/test_loop.py::test_x", "tests/train/test_loop.py::test_y"
    assert group_of(one) != group_of(other)
    assert group_of("tests/flows/publish/test_a.py::x") == group_of("tests/flows/publish/test_b.py::y")
