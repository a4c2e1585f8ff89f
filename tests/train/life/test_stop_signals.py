from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from meditron_train.errors import Cause
from meditron_train.train.life.stop_signals import (
    STOP_SIGNALS,
    StopRequest,
    StopSignals,
    forget_stop_of_job,
)


def test_nothing_is_requested_at_first(tmp_path):
    with StopSignals(tmp_path, checks_files=True) as stop_signals:
        assert stop_signals.requested is None
        assert stop_signals.save_requested is False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_remembered_and_the_first_one_wins(tmp_path, number):
    with StopSignals(tmp_path, checks_files=False) as stop_signals:
        os.kill(os.getpid(), number)
        assert stop_signals.requested == StopRequest(STOP_SIGNALS[number], number.name)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_signals.requested == StopRequest(STOP_SIGNALS[number], number.name)
        stop_signals.acknowledge(stop=True)
        assert stop_signals.requested == StopRequest(STOP_SIGNALS[number], number.name)


def test_old_handlers_come_back_after_an_error_too(tmp_path):
    def mine(number, frame):
        raise AssertionError("not in this test")

    def fail_inside(stop_signals):
        with stop_signals:
            assert signal.getsignal(signal.SIGUSR1) is not mine
            raise RuntimeError("in the loop")

    before = signal.signal(signal.SIGUSR1, mine)
    try:
        with pytest.raises(RuntimeError, match="in the loop"):
            fail_inside(StopSignals(tmp_path, checks_files=True))
        assert signal.getsignal(signal.SIGUSR1) is mine
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_stop_file_stands_until_it_is_obeyed(tmp_path):
    with StopSignals(tmp_path, checks_files=True) as stop_signals:
        (tmp_path / "stop").touch()
        assert stop_signals.requested == StopRequest(Cause.STOP_FILE, f"the file {tmp_path / 'stop'}")
        stop_signals.acknowledge(stop=False)  # an ordinary checkpoint does not answer it
        assert stop_signals.requested is not None
        stop_signals.acknowledge(stop=True)
        assert stop_signals.requested is None
        assert not (tmp_path / "stop").exists()


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ('{"job": "7", "cause": "time_limit"}\n', Cause.TIME_LIMIT),
        ('{"job": "7", "cause": "terminated"}\n', Cause.TERMINATED),
        ("please, I need the nodes\n", Cause.STOP_FILE),
        ('{"job": "7", "cause": "full moon"}\n', Cause.STOP_FILE),
        ("[]", Cause.STOP_FILE),
        ("[" * 100_000, Cause.STOP_FILE),
    ],
)
def test_a_batch_job_says_why_in_the_stop_file_and_only_its_wish_is_forgotten(tmp_path, text, cause):
    (tmp_path / "stop").write_text(text)
    with StopSignals(tmp_path, checks_files=True) as stop_signals:
        assert stop_signals.requested.cause is cause
    forget_stop_of_job(tmp_path)
    assert (tmp_path / "stop").exists() is (cause is Cause.STOP_FILE)


def test_the_save_file_is_gone_after_one_save(tmp_path):
    with StopSignals(tmp_path, checks_files=True) as stop_signals:
        (tmp_path / "save").touch()
        assert stop_signals.save_requested is True
        assert stop_signals.requested is None
        stop_signals.acknowledge(stop=False)
        assert stop_signals.save_requested is False
        stop_signals.acknowledge(stop=False)


def test_other_ranks_leave_the_files_alone(tmp_path):
    (tmp_path / "stop").touch()
    (tmp_path / "save").touch()
    with StopSignals(tmp_path, checks_files=False) as stop_signals:
        assert stop_signals.requested is None
        assert stop_signals.save_requested is False
        stop_signals.acknowledge(stop=True)
    assert sorted(os.listdir(tmp_path)) == ["save", "stop"]


def test_a_running_loop_ends_at_a_step_boundary(tmp_path):
    loop = (
        "import sys, time\nfrom pathlib import Path\n"
        "from meditron_train.train.life.stop_signals import StopSignals\n"
        "with StopSignals(Path(sys.argv[1]), checks_files=True) as stop_signals:\n"
        "    for step in range(1, 10_000):\n"
        "        time.sleep(0.02)\n"
        "        print('finished', step, flush=True)\n"
        "        if stop_signals.requested:\n"
        "            print('saved', step, stop_signals.requested.reason, flush=True)\n"
        "            sys.exit(85)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", loop, tmp_path], stdout=subprocess.PIPE, text=True)
    first_line = process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    *_, finished, saved = (first_line + output).splitlines()
    assert finished.split()[1] == saved.split()[1]
    assert saved.endswith("SIGTERM")
    assert process.returncode == 85
