"""A few faults of the campaign, so that the campaign itself stays true."""

from __future__ import annotations

import pytest

from tests.faults import ranks
from tests.faults.workload import Workload

CHOSEN = ("kill -9 while a checkpoint is written", "latest checkpoint damaged", "SIGTERM at a random moment")


@pytest.fixture(scope="module")
def workload(tmp_path_factory) -> Workload:
    return Workload.make(tmp_path_factory.mktemp("workload"))


@pytest.fixture(scope="module")
def undisturbed(workload, tmp_path_factory) -> list[float]:
    return ranks.run_undisturbed(workload, tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("fault", [f for f in ranks.FAULTS if f.name in CHOSEN], ids=lambda f: f.name)
def test_the_promise_is_kept(fault, workload, undisturbed, tmp_path):
    outcome = ranks.try_fault(fault, "test", workload, tmp_path / "run", undisturbed)
    log = (tmp_path / "run" / "ranks.log").read_text()
    assert outcome.kept and outcome.starts > 1 and outcome.recovery_s > 0, f"{outcome}\n{log[-4000:]}"
