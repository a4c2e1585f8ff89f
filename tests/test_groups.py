"""Which tests stay in one process when several run side by side."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import group_of

FILES = ("test_a.py", "test_b.py", "test_c.py", "test_d.py")
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
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    for name in FILES:
        (tmp_path / name).write_text(TEST)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "2", "-p", "tests.conftest", "-c", "pytest.ini", "."],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    workers = [{path.read_text() for path in tmp_path.glob(f"{name}.*")} for name in FILES]
    assert [len(found) for found in workers] == [1] * len(FILES)
    assert set.union(*workers) == {"gw0", "gw1"}


def test_what_shares_nothing_goes_alone() -> None:
    one, other = "tests/train/test_loop.py::test_x", "tests/train/test_loop.py::test_y"
    assert group_of(one) != group_of(other)
    assert group_of("tests/flows/publish/test_a.py::x") == group_of("tests/flows/publish/test_b.py::y")
