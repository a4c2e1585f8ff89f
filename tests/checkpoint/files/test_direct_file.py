"""Files written past the page cache, and in the ordinary way where the system has no other."""

from __future__ import annotations

import errno
import fcntl
import os
import random
from pathlib import Path

import pytest

from meditron_train.checkpoint.files import direct_file
from meditron_train.checkpoint.files.direct_file import DirectFile

O_DIRECT = getattr(os, "O_DIRECT", 0)


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & O_DIRECT)


class System:
    """`os` with an `open` and a `write` as some file systems have them. written: whether each write was direct."""

    error = errno.EINVAL

    def __init__(self, refuses: str, most: int) -> None:
        self.refuses, self.most, self.written = refuses, most, []

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)

    def open(self, path: Path, flags: int, mode: int) -> int:
        if self.refuses == "open" and flags & O_DIRECT:
            raise OSError(self.error, os.strerror(self.error))
        return os.open(path, flags, mode)

    def write(self, descriptor: int, data: memoryview) -> int:
        if self.refuses == "write" and is_direct(descriptor):
            raise OSError(self.error, os.strerror(self.error))
        self.written.append(is_direct(descriptor))
        return os.write(descriptor, data[: self.most])


@pytest.fixture
def system(monkeypatch):
    def make(refuses: str = "", most: int = 1 << 40) -> System:
        monkeypatch.setattr(direct_file, "os", system := System(refuses, most))
        return system

    return make


def has_direct(directory: Path) -> bool:
    try:
        os.close(os.open(directory / "probe", os.O_WRONLY | os.O_CREAT | O_DIRECT))
    except OSError:
        return False
    return bool(O_DIRECT)


@pytest.mark.parametrize("refuses", ["", "open", "write"])
@pytest.mark.parametrize("num_bytes", [0, 1, 4096, 4 << 20, (9 << 20) + 77])
def test_the_file_holds_what_was_appended(tmp_path: Path, system, refuses: str, num_bytes: int) -> None:
    system(refuses, most=1 << 20)  # writes may be partial
    data, dice = memoryview(random.Random(num_bytes).randbytes(num_bytes)), random.Random(0)
    (tmp_path / "f").write_bytes(b"an unfinished attempt that is longer" * 300_000)
    with DirectFile(tmp_path / "f") as file:
        rest = data
        while rest:
            count = dice.choice([1, 100, 4096, 1 << 20, 5 << 20])
            file.append(rest[:count])
            rest = rest[count:]
        file.sync()
    assert (tmp_path / "f").read_bytes() == data


def test_whole_buffers_go_past_the_cache(tmp_path: Path, system) -> None:
    if not has_direct(tmp_path):
        pytest.skip(f"the file system of {tmp_path} has no O_DIRECT")
    found = system()
    with DirectFile(tmp_path / "f") as file:
        file.append(memoryview(bytes(10 << 20)))
        file.sync()
    assert found.written == [True, True, False]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EINVAL])
def test_errors_are_passed_on(tmp_path: Path, system, monkeypatch, error: int) -> None:
    found = system()

    def fail(descriptor: int, data: memoryview) -> int:
        raise OSError(error, os.strerror(error))

    found.write = fail
    with pytest.raises(OSError) as caught, DirectFile(tmp_path / "f") as file:
        file.append(memoryview(bytes(5 << 20)))
    assert caught.value.errno == error
    with pytest.raises(OSError) as caught, DirectFile(tmp_path / "f") as file:
        file.append(memoryview(b"short"))
        file.sync()
    assert caught.value.errno == error


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        DirectFile(tmp_path / "absent" / "f")


@pytest.mark.parametrize("refuses", ["open", "write"])
def test_another_way_to_say_that_there_is_no_direct_writing(tmp_path: Path, system, refuses: str) -> None:
    system(refuses).error = errno.EOPNOTSUPP
    with DirectFile(tmp_path / "f") as file:
        file.append(memoryview(b"1" * (5 << 20)))
        file.sync()
    assert (tmp_path / "f").read_bytes() == b"1" * (5 << 20)


def test_without_memory_nothing_stays_open(tmp_path: Path, monkeypatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr("mmap.mmap", refuse)
    for _ in range(3):
        with pytest.raises(OSError):
            DirectFile(tmp_path / "f")
    assert len(os.listdir("/proc/self/fd")) == before
