from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from meditron_train.errors import UserError
from meditron_train.train.life import run_lock
from meditron_train.train.life.run_dir import RunDir


@pytest.fixture
def messages():
    """What the module logs, whatever logging was set up by others."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("meditron_train.train.life.run_lock")
    level, logger.level = logger.level, logging.INFO
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)
    logger.level = level


def start_owner(path: Path, then: str = "") -> subprocess.Popen:
    code = (
        "import sys\nfrom pathlib import Path\nfrom meditron_train.train.life.run_dir import RunDir\n"
        "run_dir = RunDir(Path(sys.argv[1]))\nrun_dir.lock()\n"
        + then
        + "print('locked', flush=True)\nsys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    return process


# --- the lock


def test_a_second_process_is_refused_and_told_by_whom(tmp_path):
    owner = start_owner(tmp_path / "run")
    try:
        with pytest.raises(UserError) as caught:
            RunDir(tmp_path / "run").lock()
        text = str(caught.value)
        assert f"process {owner.pid} on host {socket.gethostname()} since 20" in text
        assert "logging.run_dir" in text
        assert caught.value.exit_code == 2
    finally:
        owner.communicate()
    with RunDir(tmp_path / "run").locked():
        pass


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, messages):
    owner = start_owner(tmp_path)
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    run_dir = RunDir(tmp_path)
    run_dir.lock()
    assert len(messages) == 1
    assert f"left locked by process {owner.pid}" in messages[0]
    with pytest.raises(UserError, match=f"process {os.getpid()}"):
        RunDir(tmp_path).lock()
    run_dir.unlock()


def test_unlock_gives_it_back_without_a_trace(tmp_path, messages):
    run_dir = RunDir(tmp_path)
    run_dir.unlock()
    for _ in range(2):
        with run_dir.locked():
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
        assert (tmp_path / ".lock").read_text() == ""
    with pytest.raises(RuntimeError), run_dir.locked():
        raise RuntimeError
    with RunDir(tmp_path).locked():
        pass
    assert messages == []


@pytest.mark.parametrize("text", ["", "{", "[1]", "\0\0"])
def test_an_unreadable_owner_does_not_matter(tmp_path, text):
    (tmp_path / ".lock").write_text(text)
    with RunDir(tmp_path).locked():
        pass


def test_a_lock_held_without_a_name(tmp_path):
    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use by a process that has not given its name yet"):
            RunDir(tmp_path).lock()


def test_what_a_killed_process_left_behind_is_waited_for(tmp_path, fast):
    """A fork that was writing a checkpoint has the lock's file open, and with it the lock."""
    owner = start_owner(
        tmp_path, then="import os, time\nif os.fork() == 0:\n    time.sleep(1)\n    os._exit(0)\n"
    )
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert run_lock._try_flock(open(tmp_path / ".lock")) is False  # noqa: SIM115
    with RunDir(tmp_path).locked():
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def without_flock(*arguments):
    raise OSError(errno.ENOLCK, "No locks available")


def write_owner(path: Path, pid: int, host: str, job: str | None = None) -> None:
    owner = {"pid": pid, "host": host, "job": job, "since": "2024-01-01T00:00:00+00:00"}
    (path / ".lock").write_text(json.dumps(owner))


@pytest.fixture
def fast(monkeypatch):
    """Signs of life every 20 ms, watched for half a second."""
    monkeypatch.setattr(run_lock, "TOUCH_INTERVAL_S", 0.02)
    monkeypatch.setattr(run_lock, "WATCH_S", 0.5)


def test_without_file_locks_the_name_and_its_signs_of_life_decide(tmp_path, monkeypatch, messages, fast):
    monkeypatch.setattr(run_lock.fcntl, "flock", without_flock)
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    write_owner(tmp_path, finished.pid, socket.gethostname())
    with RunDir(tmp_path).locked():
        assert any("has no file locks" in message for message in messages)
        assert any(f"left locked by process {finished.pid}" in message for message in messages)
        with pytest.raises(UserError, match=r"remove .*\.lock"):
            RunDir(tmp_path).lock()


@pytest.mark.parametrize("has_flock", [True, False])
def test_a_name_of_another_host_is_watched(tmp_path, monkeypatch, messages, fast, has_flock):
    """flock may only hold on one host (Lustre's localflock): to have it says nothing of the other one."""
    if not has_flock:
        monkeypatch.setattr(run_lock.fcntl, "flock", without_flock)
    write_owner(tmp_path, 1, "another-host")
    with RunDir(tmp_path).locked():
        assert any("left locked by process 1 on host another-host" in message for message in messages)
    write_owner(tmp_path, 1, "another-host")
    ended = threading.Event()

    def live() -> None:
        while not ended.wait(0.01):
            os.utime(tmp_path / ".lock")

    alive = threading.Thread(target=live)
    alive.start()
    try:
        with pytest.raises(UserError, match=r"on host another-host since 2024-01-01.*remove .*\.lock"):
            RunDir(tmp_path).lock()
    finally:
        ended.set()
        alive.join()


def test_an_earlier_start_of_the_same_job_is_waited_for(tmp_path, monkeypatch, fast):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    owner = start_owner(tmp_path)
    threading.Timer(0.3, owner.stdin.close).start()
    with RunDir(tmp_path).locked():
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    owner.wait()
    with RunDir(tmp_path).locked():
        monkeypatch.setenv("SLURM_JOB_ID", "8")
        with pytest.raises(UserError, match="is in use"):  # another job is not waited for
            RunDir(tmp_path).lock()


def test_the_lock_follows_the_umask(tmp_path):
    before = os.umask(0o002)
    try:
        lock = run_lock.RunLock(tmp_path)
        lock.acquire()
        assert (tmp_path / ".lock").stat().st_mode & 0o777 == 0o664
        lock.release()
    finally:
        os.umask(before)
