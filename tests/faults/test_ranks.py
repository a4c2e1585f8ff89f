"""A few faults of the campaign, so that the campaign itself stays true."""

from __future__ import annotations

import pytest

from meditron_train.report.diagnosis import diagnose
from meditron_train.report.status import read_requeue
from tests.faults import ranks
from tests.faults.workload import Workload

pytestmark = pytest.mark.long

CHOSEN = ("kill -9 while a checkpoint is written", "latest checkpoint damaged", "SIGTERM at a random moment")


@pytest.fixture(scope="module")
def workload(tmp_path_factory) -> Workload:
    return Workload.make(tmp_path_factory.mktemp("workload"))


@pytest.fixture(scope="module")
def undisturbed(workload, tmp_path_factory) -> list[float]:
    return ranks.run_undisturbed(workload, tmp_path_factory.mktemp("undisturbed"))


def chosen(*names: str) -> list[ranks.Fault]:
    return [fault for fault in ranks.FAULTS if fault.name in names]


@pytest.mark.parametrize("fault", chosen(*CHOSEN), ids=lambda f: f.name)
def test_the_promise_is_kept(fault, workload, undisturbed, tmp_path):
    outcome = ranks.try_fault(fault, "test", workload, tmp_path / "run", undisturbed)
    log = (tmp_path / "run" / "ranks.log").read_text()
    assert outcome.kept and outcome.starts > 1 and outcome.recovery_s > 0, f"{outcome}\n{log[-4000:]}"


@pytest.mark.parametrize(
    "fault", chosen("SIGTERM at a random moment", "SIGSTOP of one rank"), ids=lambda f: f.name
)
def test_the_promise_is_kept_whatever_the_messages_say(fault, workload, undisturbed, tmp_path):
    outcome = ranks.try_fault(fault, "test", workload, tmp_path / "run", undisturbed, reworded=True)
    log = (tmp_path / "run" / "ranks.log").read_text()
    assert outcome.kept and outcome.starts > 1, f"{outcome}\n{log[-4000:]}"
    requeue = read_requeue(tmp_path / "run" / "runs" / "tiny")
    assert requeue is None  # the last start came to the end
    diagnosis = diagnose(tmp_path / "run" / "runs" / "tiny")
    assert diagnosis.cause == "finished"
