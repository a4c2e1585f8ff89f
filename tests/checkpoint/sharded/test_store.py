from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from meditron_train.checkpoint.sharded import store as store_module
from meditron_train.checkpoint.sharded.store import CheckpointStore, verify_manifest
from meditron_train.errors import MeditronError, UserError
from tests.checkpoint.filled import fill
from tests.long import mostly_long


def save(store: CheckpointStore, *steps: int) -> Path:
    for step in steps:
        fill(store.begin(step), seed=step)
        path = store.publish(step)
    return path


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep_last=100, keep_every=None)


# --- begin, publish, abandon


def test_a_checkpoint_has_its_name_only_when_published(store):
    directory = store.begin(100)
    assert directory.name == "step_00000100.tmp"
    fill(directory)
    assert store.steps() == []
    assert store.newest_intact() == (None, [])
    path = store.publish(100)
    assert path == store.directory / "step_00000100"
    assert (store.directory / "latest").read_text() == "step_00000100\n"
    assert sorted(entry.name for entry in store.directory.iterdir()) == ["latest", "step_00000100"]
    assert store.newest_intact() == (path, [])


def test_begin_starts_from_an_empty_directory(store):
    fill(store.begin(7))
    assert list(store.begin(7).iterdir()) == []


def test_abandon_leaves_nothing(store):
    save(store, 1)
    fill(store.begin(2))
    store.abandon(2)
    store.abandon(2)
    assert sorted(entry.name for entry in store.directory.iterdir()) == ["latest", "step_00000001"]


def test_a_step_is_replaced_when_it_is_published_again(store):
    save(store, 5)
    (store.begin(5) / "other").write_text("new")
    path = store.publish(5)
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "other"]
    assert sorted(entry.name for entry in store.directory.iterdir()) == ["latest", "step_00000005"]


def test_clean_removes_leftovers_and_gives_back_a_checkpoint_that_was_being_replaced(store):
    save(store, 5, 6)
    fill(store.begin(7))
    (store.directory / "latest.tmp").touch()
    os.rename(store.path(5), store.directory / "step_00000005.replaced.tmp")  # killed between two renames
    shutil.copytree(store.path(6), store.directory / "step_00000006.replaced.tmp")  # killed after both
    os.rename(
        shutil.copytree(store.path(6), store.directory / "x"), store.directory / "step_00000004.deleted.tmp"
    )
    removed = store.clean()
    assert removed == [
        "latest.tmp",
        "step_00000004.deleted.tmp",
        "step_00000006.replaced.tmp",
        "step_00000007.tmp",
    ]
    assert store.steps() == [5, 6]
    assert verify_manifest(store.path(5)) == []
    assert store.clean() == []


def test_clean_leaves_what_is_not_ours(store):
    save(store, 5)
    for name in (
        "precious.tmp",
        "step_5.tmp",
        "step_00000005.tmp.tmp",
        "step_00000005.notes.tmp",
        "x_latest.tmp",
    ):
        (store.directory / name).mkdir()
    before = sorted(store.directory.iterdir())
    assert store.clean() == []
    assert sorted(store.directory.iterdir()) == before


def test_steps_ignores_what_is_not_a_checkpoint(store):
    assert store.steps() == []
    save(store, 20, 3, 100_000_000)
    (store.directory / "step_00000001").touch()  # a file
    (store.directory / "step_1").mkdir()
    (store.directory / "notes").mkdir()
    assert store.steps() == [3, 20, 100_000_000]


# --- the newest intact one


def test_newest_intact_skips_broken_ones_and_says_why(store):
    save(store, 1, 2, 3, 4)
    os.truncate(store.path(4) / "__0_0.distcp", 10)
    content = bytearray((store.path(3) / "__1_0.distcp").read_bytes())
    content[0] ^= 1
    (store.path(3) / "__1_0.distcp").write_bytes(content)
    (store.directory / "latest").write_text("step_00000001\n")  # only a hint: must not win
    path, skipped = store.newest_intact()
    assert path == store.path(2)
    assert [broken for broken, _ in skipped] == [store.path(4), store.path(3)]
    assert skipped[0][1] == ["__0_0.distcp has 10 bytes instead of 1000"]
    assert "has changed" in skipped[1][1][0]
    assert store.newest_intact(check_hashes=False)[0] == store.path(3)


def test_newest_intact_of_broken_ones_only(store):
    save(store, 1)
    (store.path(1) / "manifest.json").unlink()
    assert store.newest_intact() == (None, [(store.path(1), ["manifest.json is missing"])])


# --- retention


RETENTIONS = {
    (1, None): [70],
    (3, None): [50, 60, 70],
    (9, None): [10, 20, 30, 40, 50, 60, 70],
    (1, 30): [30, 60, 70],
    (2, 20): [20, 40, 60, 70],
}


@pytest.mark.parametrize("rule", mostly_long(RETENTIONS, (3, None), (9, None), (2, 20)), ids=str)
def test_retention(tmp_path, rule):
    (keep_last, keep_every), kept = rule, RETENTIONS[rule]
    store = CheckpointStore(tmp_path, keep_last, keep_every)
    save(store, 10, 20, 30, 40, 50, 60, 70)
    assert store.steps() == kept
    assert not list(tmp_path.glob("*.tmp"))
    assert store.newest_intact() == (store.path(70), [])


def test_retention_does_not_count_checkpoints_cut_off_by_a_fault(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=100, keep_every=None)
    save(store, 10, 20, 30)
    os.truncate(store.path(30) / "__0_0.distcp", 1)
    store.keep_last = 2
    save(store, 40)
    assert store.steps() == [20, 40]


def test_a_resume_from_before_a_rotten_checkpoint_never_loses_the_last_intact_one(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=100, keep_every=None)
    save(store, 10, 20, 30)
    for step in (20, 30):
        content = bytearray((store.path(step) / "__0_0.distcp").read_bytes())
        content[0] ^= 1
        (store.path(step) / "__0_0.distcp").write_bytes(content)
    store.keep_last = 1
    assert store.newest_intact()[0] == store.path(10)
    save(store, 15)
    assert store.newest_intact()[0] == store.path(15)
    save(store, 20)  # comes by the rotten step 20 and replaces it
    assert store.newest_intact()[0] == store.path(20)
    save(store, 30)
    assert store.newest_intact() == (store.path(30), [])
    assert store.steps() == [30]


def test_a_file_system_that_refuses_to_delete_does_not_stop_the_run(store, monkeypatch):
    save(store, 1, 2)
    store.keep_last = 1

    def refuse(path):
        raise OSError(errno.EBUSY, "in use", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    store.directory.joinpath("step_00000003.tmp").mkdir()
    fill(store.directory / "step_00000003.tmp")
    store.publish(3)
    assert store.steps() == [3]  # renamed away, so none of them looks finished
    monkeypatch.undo()
    assert store.clean() == ["step_00000001.deleted.tmp", "step_00000002.deleted.tmp"]


@pytest.mark.parametrize(("keep_last", "keep_every"), [(0, None), (-1, 5), (1, 0)])
def test_senseless_retention_is_refused(tmp_path, keep_last, keep_every):
    with pytest.raises(ValueError, match="start at 1"):
        CheckpointStore(tmp_path, keep_last, keep_every)


# --- the disk


def test_free_space_is_checked_before_anything_is_written(store):
    save(store, 4)
    store.check_free_space(1)
    with pytest.raises(
        MeditronError, match=r"needs about 1024\.00 TiB.*the last good checkpoint is .*step_00000004"
    ):
        store.check_free_space(2**50)


def test_free_space_of_a_directory_that_does_not_exist_yet(tmp_path):
    store = CheckpointStore(tmp_path / "a" / "b", 1, None)
    store.check_free_space(1)
    with pytest.raises(MeditronError, match="there is no earlier checkpoint"):
        store.check_free_space(2**50)
    assert not (tmp_path / "a").exists()


def test_old_checkpoints_make_room_for_one_that_must_be_written(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, keep_last=100, keep_every=4)
    save(store, 2, 4, 6, 8, 30)
    num_bytes = sum(path.stat().st_size for path in store.path(2).rglob("*"))
    monkeypatch.setattr(CheckpointStore, "_free_bytes", lambda self: 1000)
    store.make_room(10, 1000)
    store.make_room(10, 1000 + 2 * num_bytes + 99)  # more than 2 and 6 hold
    assert store.steps() == [2, 4, 6, 8, 30]
    store.make_room(10, 1001)
    assert store.steps() == [4, 6, 8, 30]
    store.make_room(10, 1001)
    store.make_room(10, 1001)  # 4 and 8 are kept for ever, 30 is of a run that went further
    assert store.steps() == [4, 8, 30]


def test_the_newest_good_checkpoint_never_makes_room(store, monkeypatch):
    save(store, 1, 2, 3)
    (store.path(3) / "manifest.json").unlink()
    monkeypatch.setattr(CheckpointStore, "_free_bytes", lambda self: 0)
    for _ in range(3):
        store.make_room(4, 1)
    assert store.steps() == [2, 3]


FULL = [(call, when) for call in ("fsync", "replace", "rename", "open") for when in ("new step", "again")]


@pytest.mark.parametrize(
    "case",
    mostly_long(FULL, ("fsync", "new step"), ("open", "new step"), ("replace", "again"), ("rename", "again")),
    ids=", ".join,
)
def test_a_full_disk_while_publishing(store, monkeypatch, case):
    failing_call, again = case[0], case[1] == "again"
    save(store, 1, *([2] if again else []))
    fill(store.begin(2), seed=99)

    def no_space(*arguments, **keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store_module.os, failing_call, no_space)
        with pytest.raises(MeditronError) as caught:
            store.publish(2)
    last_good = store.path(2 if again else 1)
    assert "step 2 could not be written" in str(caught.value)
    assert "the disk is full" in str(caught.value)
    assert str(last_good) in str(caught.value)
    assert "free" in str(caught.value)
    assert caught.value.exit_code == 1
    assert not isinstance(caught.value, UserError)
    store.clean()
    assert store.newest_intact() == (last_good, [])
    assert not list(store.directory.glob("*.tmp"))


def test_the_second_rename_of_a_replacement_fails(store, monkeypatch):
    save(store, 1, 2)
    fill(store.begin(2), seed=99)
    rename = os.rename

    def fail_on_the_new_one(source, target):
        if str(source).endswith("step_00000002.tmp"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(store_module.os, "rename", fail_on_the_new_one)
        with pytest.raises(MeditronError, match=r"OSError.*Input/output error.*last good.*step_00000002"):
            store.publish(2)
    assert store.newest_intact() == (store.path(2), [])
    assert not list(store.directory.glob("step*.tmp"))


def test_failed_finds_the_cause_in_wrapped_errors(store):
    save(store, 1)
    fill(store.begin(2))
    try:
        try:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        except OSError as error:
            raise RuntimeError("writer process 3 failed") from error
    except RuntimeError as error:
        failure = store.failed(2, error)
    assert "the disk is full" in str(failure)
    assert "step_00000001" in str(failure)
    assert not (store.directory / "step_00000002.tmp").exists()

    class CheckpointException(Exception):  # as torch.distributed.checkpoint raises it
        def __init__(self):
            self.failures = {1: (OSError(errno.ENOSPC, "No space left on device"), [])}

    assert "the disk is full" in str(store.failed(3, CheckpointException()))
    assert "ValueError: odd" in str(store.failed(3, ValueError("odd")))


@pytest.fixture
def small_disk(tmp_path):
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)]
    try:
        result = subprocess.run(command, check=False, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if result.returncode != 0:
        pytest.skip(f"mounting a tmpfs of 4 MB is not permitted here: {result.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def use_up_the_space(file: Path) -> None:
    with open(file, "wb", buffering=0) as other_data, contextlib.suppress(OSError):
        while other_data.write(bytes(4096)):
            pass


def test_a_really_full_disk(small_disk):
    store = CheckpointStore(small_disk / "checkpoints", keep_last=3, keep_every=None)
    fill(store.begin(1), num_bytes=1_000_000)
    store.publish(1)
    # While files are written ...
    directory = store.begin(2)
    with pytest.raises(OSError) as caught:
        fill(directory, num_bytes=1_500_000)
    failure = store.failed(2, caught.value)
    assert "the disk is full (" in str(failure)
    assert " KiB free" in str(failure) or " MiB free" in str(failure) or " bytes free" in str(failure)
    assert "step_00000001" in str(failure)
    assert [entry.name for entry in store.directory.glob("step*")] == ["step_00000001"]
    # ... and with the last block gone, while the manifest is.
    directory = store.begin(3)
    fill(directory, num_bytes=100_000)
    use_up_the_space(small_disk / "others")
    with pytest.raises(
        MeditronError, match=r"step 3 .*the disk is full.*last good checkpoint is .*step_00000001"
    ):
        store.publish(3)
    with pytest.raises(MeditronError, match="needs about"):
        store.check_free_space(3_000_000)
    assert store.newest_intact() == (store.path(1), [])
    assert sorted(entry.name for entry in store.directory.iterdir()) == ["latest", "step_00000001"]
    # Space comes back: the run goes on.
    (small_disk / "others").unlink()
    fill(store.begin(3), num_bytes=100_000)
    store.publish(3)
    assert store.newest_intact() == (store.path(3), [])


# --- kill -9

_WRITER = """
import sys
from pathlib import Path
from meditron_train.checkpoint.sharded.store import CheckpointStore
store = CheckpointStore(Path(sys.argv[1]), keep_last=2, keep_every=None)
store.clean()
newest = store.steps()[-1] if store.steps() else 0
if sys.argv[2] == "begin only":
    directory = store.begin(newest + 1)
    (directory / "part").write_bytes(bytes(1000))
    print("begun", flush=True)
    sys.stdin.read()
print("started", flush=True)
for step in range(max(1, newest), 10_000):   # the newest step is written again: replacements are killed, too
    directory = store.begin(step)
    for part in range(4):
        (directory / f"part{part}").write_bytes(bytes([step % 256]) * 50_000)
    store.publish(step)
"""


def start_writer(directory: Path, mode: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(directory), mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    return process


def end(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_kill_between_begin_and_publish(store):
    save(store, 10)
    end(start_writer(store.directory, "begin only"))
    assert (store.directory / "step_00000011.tmp" / "part").exists()
    assert store.newest_intact() == (store.path(10), [])
    assert store.clean() == ["step_00000011.tmp"]
    assert store.newest_intact() == (store.path(10), [])


@pytest.mark.parametrize("times", mostly_long([4, 20], 4))
def test_kill_at_random_moments_never_leaves_a_broken_or_missing_checkpoint(store, times):
    generator = random.Random(0)
    newest_seen = 0
    for number in range(times):
        process = start_writer(store.directory, "all")
        time.sleep(generator.uniform(0.05, 0.15))
        while number == times - 1 and not (store.directory / "latest").exists():
            assert process.poll() is None, "the writer ended before its first checkpoint"
            time.sleep(0.01)
        end(process)
        store.clean()
        path, skipped = store.newest_intact()
        assert skipped == []
        if path is not None:
            assert store.steps()[-1] >= newest_seen
            newest_seen = store.steps()[-1]
            assert len(store.steps()) <= 3  # keep_last, and one more if killed before retention
            assert (store.directory / "latest").read_text().startswith("step_")
    assert newest_seen > 0
