from __future__ import annotations

import multiprocessing
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meditron_train.data.indexed import IndexedDataset
from meditron_train.data.packing import index_cache
from meditron_train.data.packing.index_cache import IndexCache, read_index_file, write_index_file
from meditron_train.data.packing.order import SourceOrder
from meditron_train.files import replacing
from tests.data.test_packed import write

ARRAYS = {
    "documents": np.arange(1000, dtype=np.uint32),
    "starts": np.empty(0, dtype=np.uint32),
    "boundaries": np.arange(7, dtype=np.int64),
    "samples": np.array([2**40], dtype=np.int64),
}


def build_counted(calls: list[int]) -> Callable[[], dict[str, np.ndarray]]:
    def build() -> dict[str, np.ndarray]:
        calls.append(1)
        return ARRAYS

    return build


def same(found: dict) -> bool:
    return list(found) == list(ARRAYS) and all(
        np.array_equal(found[name], ARRAYS[name]) and found[name].dtype == ARRAYS[name].dtype
        for name in ARRAYS
    )


@pytest.fixture(autouse=True)
def own_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    return directory


def cache_of(tmp_path: Path, directory: Path | None = None, content: str = "abc") -> IndexCache:
    return IndexCache(tmp_path / "data" / "a", lambda: content, directory, smallest=0)


def entries(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.index"))


class TestFile:
    def test_round_trip_is_mapped_and_read_only(self, tmp_path: Path) -> None:
        write_index_file(tmp_path / "x", "key", ARRAYS)
        found = read_index_file(tmp_path / "x", "key")
        assert same(found)
        assert not found["documents"].flags.writeable
        assert os.listdir(tmp_path) == ["x", "temporary"] or sorted(os.listdir(tmp_path)) == [
            "temporary",
            "x",
        ]

    def test_every_cut_is_refused(self, tmp_path: Path) -> None:
        write_index_file(tmp_path / "x", "key", ARRAYS)
        content = (tmp_path / "x").read_bytes()
        for size in [*range(0, 600, 7), len(content) - 1]:
            (tmp_path / "x").write_bytes(content[:size])
            with pytest.raises(ValueError):
                read_index_file(tmp_path / "x", "key")
        (tmp_path / "x").write_bytes(content + b"\0")
        with pytest.raises(ValueError, match=f"{len(content) + 1} bytes instead of {len(content)}"):
            read_index_file(tmp_path / "x", "key")

    @given(st.integers(0, 400), st.integers(1, 255))
    @settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_a_damaged_header_is_refused(self, tmp_path: Path, at: int, change: int) -> None:
        write_index_file(tmp_path / "x", "key", ARRAYS)
        content = bytearray((tmp_path / "x").read_bytes())
        header_bytes = struct.unpack("<I", content[8:12])[0]
        at %= 16 + header_bytes
        content[at] ^= change
        (tmp_path / "x").write_bytes(bytes(content))
        with pytest.raises(ValueError):
            read_index_file(tmp_path / "x", "key")

    def test_another_key(self, tmp_path: Path) -> None:
        write_index_file(tmp_path / "x", "key", ARRAYS)
        with pytest.raises(ValueError, match="other data"):
            read_index_file(tmp_path / "x", "other")

    def test_a_failed_write_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(descriptor: int) -> None:
            raise OSError("no space")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="no space"):
            write_index_file(tmp_path / "x", "key", ARRAYS)
        assert os.listdir(tmp_path) == ["temporary"]


class TestCache:
    def test_built_once(self, tmp_path: Path) -> None:
        calls: list[int] = []
        for _ in range(2):
            assert same(cache_of(tmp_path).load_or_build([1], build_counted(calls)))
        assert len(calls) == 1
        assert len(entries(tmp_path / "data" / ".index_cache")) == 1

    def test_the_key_covers_content_settings_and_version(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[int] = []
        cache_of(tmp_path).load_or_build([1, "x"], build_counted(calls))
        cache_of(tmp_path).load_or_build([1, "y"], build_counted(calls))
        cache_of(tmp_path, content="abd").load_or_build([1, "x"], build_counted(calls))
        monkeypatch.setattr(index_cache, "_FORMAT_VERSION", 999)
        cache_of(tmp_path).load_or_build([1, "x"], build_counted(calls))
        assert len(calls) == 4

    def test_a_damaged_file_is_built_again_with_a_word(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        messages: list[str] = []
        monkeypatch.setattr(index_cache._log, "warning", lambda text, *values: messages.append(text % values))
        calls: list[int] = []
        cache_of(tmp_path).load_or_build([1], build_counted(calls))
        (path,) = entries(tmp_path / "data" / ".index_cache")
        path.write_bytes(path.read_bytes()[:100])
        assert same(cache_of(tmp_path).load_or_build([1], build_counted(calls)))
        assert len(calls) == 2
        assert "is damaged" in messages[0] and str(path) in messages[0]
        assert same(cache_of(tmp_path).load_or_build([1], build_counted(calls)))
        assert len(calls) == 2

    def test_where_nothing_can_be_written_beside_the_data(
        self, tmp_path: Path, own_temporary_directory: Path
    ) -> None:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / ".index_cache").write_text(
            "in the way"
        )  # also root cannot make a directory here
        calls: list[int] = []
        for _ in range(2):
            assert same(cache_of(tmp_path).load_or_build([1], build_counted(calls)))
        assert len(calls) == 1
        (fallback,) = own_temporary_directory.iterdir()
        assert fallback.stat().st_mode & 0o777 == 0o700
        assert len(entries(fallback)) == 1

    def test_where_nothing_can_be_written_at_all(self, tmp_path: Path, own_temporary_directory: Path) -> None:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / ".index_cache").write_text("in the way")
        (own_temporary_directory / f"meditron-train-index-{os.getuid()}").write_text("in the way")
        calls: list[int] = []
        for _ in range(2):
            assert same(cache_of(tmp_path).load_or_build([1], build_counted(calls)))
        assert len(calls) == 2

    def test_directory_of_the_configuration(self, tmp_path: Path) -> None:
        cache_of(tmp_path, tmp_path / "here").load_or_build([1], build_counted([]))
        assert len(entries(tmp_path / "here")) == 1
        assert not (tmp_path / "data").exists()

    def test_old_entries_and_leftovers_go(self, tmp_path: Path) -> None:
        directory = tmp_path / "here"
        directory.mkdir()
        other = directory / f"other.{'0' * 32}.index"
        other.write_text("of another dataset")
        stale, fresh = [_killed_while_writing(directory / f"a.{n * 32}.index") for n in "01"]
        os.utime(stale, (1, 1))
        for number in range(20):
            cache_of(tmp_path, directory).load_or_build([number], build_counted([]))
            for path in directory.glob("a.*.index"):  # time passes
                os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 10))
            cache_of(tmp_path, directory).load_or_build([0], build_counted([]))  # used all the time
        assert len(list(directory.glob("a.*.index"))) == 8
        calls: list[int] = []
        cache_of(tmp_path, directory).load_or_build([0], build_counted(calls))
        cache_of(tmp_path, directory).load_or_build([19], build_counted(calls))
        assert calls == []
        assert [path.exists() for path in (other, fresh, stale)] == [True, True, False]

    def test_ranks_of_a_node_build_once(self, tmp_path: Path) -> None:
        context = multiprocessing.get_context("fork")
        with context.Pool(4) as pool:
            built = pool.starmap(_build_as_rank, [(tmp_path, number) for number in range(4)])
        assert sum(built) == 1


def _killed_while_writing(path: Path) -> Path:
    """What a process that dies while it replaces `path` leaves."""
    if (writer := os.fork()) == 0:
        with replacing(path, shared=True):
            os._exit(1)
    os.waitpid(writer, 0)
    (leftover,) = path.parent.glob(f".{path.name}.*")
    return leftover


def _build_as_rank(tmp_path: Path, number: int) -> int:
    calls: list[int] = []
    assert same(cache_of(tmp_path, tmp_path / "here").load_or_build([1], build_counted(calls)))
    return len(calls)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_samples_from_disk_are_those_from_memory(tmp_path: Path, packing: str) -> None:
    lengths = np.random.default_rng(0).integers(0, 90, 300)
    dataset = IndexedDataset(write(tmp_path / "a", lengths.tolist()))
    documents = np.arange(300)
    arguments = (dataset.file, dataset.document_lengths, documents, packing, 32, 7)
    in_memory = SourceOrder(*arguments)
    for _ in range(2):
        cached = SourceOrder(*arguments, IndexCache(tmp_path / "a", lambda: "x", smallest=0))
        for number in range(3 * in_memory.samples_per_epoch):
            assert np.array_equal(in_memory.segments(number), cached.segments(number))
    assert entries(tmp_path / ".index_cache")


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_arrays_raise_or_stay_inside(tmp_path: Path, packing: str, data: st.DataObject) -> None:
    lengths = [5, 0, 70, 32, 33, 1, 12, 31]
    dataset = IndexedDataset(write(tmp_path / "a", lengths))
    arguments = (dataset.file, dataset.document_lengths, np.arange(len(lengths)), packing, 32, 7)
    order = SourceOrder(*arguments, IndexCache(tmp_path / "a", lambda: "x", smallest=0))
    order.index(0)
    path = next(iter(entries(tmp_path / ".index_cache")))
    content = bytearray(path.read_bytes())
    header_bytes = struct.unpack("<I", content[8:12])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(16 + header_bytes, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    damaged = SourceOrder(*arguments, IndexCache(tmp_path / "a", lambda: "x", smallest=0))
    for number in range(damaged.samples_per_epoch):
        try:
            rows = damaged.segments(number).tolist()
        except IndexError:
            continue
        assert all(0 <= start < start + length <= lengths[document] for document, start, length in rows)


class TestTrust:
    """An index decides what is trained on: one that another user could have made is not used."""

    def test_a_planted_index_is_not_used(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cache, calls = cache_of(tmp_path), []
        cache.load_or_build([1], build_counted(calls))
        monkeypatch.setattr(os, "getuid", lambda: 4321)  # from now on the files are another's
        monkeypatch.setattr(index_cache, "_ROOT", 4321)
        assert same(cache_of(tmp_path).load_or_build([1], build_counted(calls)))
        assert len(calls) == 2

    @pytest.mark.parametrize("mode", [0o775, 0o757])
    def test_a_directory_that_others_may_write_is_not_used(self, tmp_path: Path, mode: int) -> None:
        calls: list[int] = []
        cache_of(tmp_path).load_or_build([1], build_counted(calls))
        (tmp_path / "data" / ".index_cache").chmod(mode)
        assert same(cache_of(tmp_path).load_or_build([1], build_counted(calls)))
        assert len(calls) == 2

    def test_a_generous_umask_makes_no_directory_that_others_may_write(self, tmp_path: Path) -> None:
        before = os.umask(0)
        try:
            cache_of(tmp_path).load_or_build([1], build_counted([]))
        finally:
            os.umask(before)
        directory = tmp_path / "data" / ".index_cache"
        assert directory.stat().st_mode & 0o777 == 0o755
        assert entries(directory)[0].stat().st_mode & 0o777 == 0o644

    def test_an_array_has_a_checksum(self, tmp_path: Path) -> None:
        path = tmp_path / "a.index"
        write_index_file(path, "key", ARRAYS)
        content = bytearray(path.read_bytes())
        place = content.index(np.arange(1000, dtype=np.uint32).tobytes())
        content[place + 40] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match="checksum of documents is wrong"):
            read_index_file(path, "key")
