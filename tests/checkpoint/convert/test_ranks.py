"""The same conversion by several processes: the files are shared out, the failure of one is the failure of all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meditron_train.checkpoint.convert import engine
from meditron_train.checkpoint.convert.from_hf import hf_to_sharded
from meditron_train.checkpoint.convert.to_hf import export_hf
from meditron_train.checkpoint.convert.workspace import Workspace
from meditron_train.checkpoint.files.stored import ReadError
from meditron_train.checkpoint.manifest import verify_manifest
from meditron_train.checkpoint.sharded import plan as sharded_plan
from meditron_train.errors import MeditronError, PassingError, UserError
from meditron_train.launcher.environment import detect_launcher
from meditron_train.launcher.rendezvous import Ranks, meet
from meditron_train.verify.verify import verify
from tests.checkpoint.tiny_llama import read_tensors, rewrite_tensors, write_tiny_llama
from tests.distributed import run_ranks
from tests.long import mostly_long
from tests.refusal import refused


def _convert(rank: int, world_size: int, direction: str, source: str, target: str) -> list[str]:
    """The files that this rank wrote, or what went wrong."""
    sharded_plan._MAX_FILE_BYTES = 30_000
    names: list[str] = []
    record = Workspace.record

    def remember(work: Workspace, name: str, written: object) -> None:
        names.append(name)
        record(work, name, written)  # type: ignore[arg-type]

    Workspace.record = remember  # type: ignore[method-assign]
    try:
        with meet(detect_launcher()) as ranks:
            if direction == "to":
                hf_to_sharded(source, target, ranks=ranks)
            else:
                export_hf(source, target, max_shard_size="40KB", ranks=ranks)
        return names
    except MeditronError as error:
        return [type(error).__name__, str(error)]
    finally:
        Workspace.record = record  # type: ignore[method-assign]


@pytest.mark.parametrize("direction", ["to", "from"])
def test_files_are_shared_out(tmp_path: Path, direction: str, monkeypatch) -> None:
    monkeypatch.setattr(sharded_plan, "_MAX_FILE_BYTES", 30_000)
    source = write_tiny_llama(tmp_path / "hf")
    if direction == "from":
        hf_to_sharded(source, tmp_path / "checkpoint")
        source = tmp_path / "checkpoint"
    before = {path.name for path in tmp_path.iterdir()}
    shares = run_ranks(_convert, 3, direction, str(source), str(tmp_path / "target"))
    assert all(shares)
    written = [name for share in shares for name in share]
    assert len(written) == len(set(written))
    assert set(written) == {
        p.name for p in (tmp_path / "target").iterdir() if p.suffix in (".distcp", ".safetensors")
    }
    assert {path.name for path in tmp_path.iterdir()} == {*before, "target"}
    assert verify_manifest(tmp_path / "target") == []
    assert verify(source, tmp_path / "target").differences == ()
    convert = {"to": hf_to_sharded, "from": export_hf}[direction]
    options = {} if direction == "to" else {"max_shard_size": "40KB"}
    convert(source, tmp_path / "alone", **options)  # type: ignore[operator]
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("target", "alone")]
    assert manifests[0] == manifests[1]


def test_what_one_rank_finds_wrong_ends_all(tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "hf")
    tensors = read_tensors(source)
    tensors["model.norm.weight"][3] = float("nan")  # in the last file but one, which one rank writes
    rewrite_tensors(source, tensors)
    results = run_ranks(_convert, 2, "to", str(source), str(tmp_path / "target"))
    assert {kind for kind, _ in results} == {UserError.__name__}
    assert all("model.norm.weight (nan at [3])" in message for _, message in results)
    assert sum("failed:" in message for _, message in results) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def _convert_with_a_bad_disk(rank: int, world_size: int, source: str, target: str, bad: bool) -> list[str]:
    """The files that this rank wrote, then what went wrong: rank 1 reads one file, then nothing more."""
    names: list[str] = []
    write_file = engine.write_file

    def write(path: Path, *args: Any, **options: Any) -> Any:
        if bad and rank == 1 and names:
            raise ReadError("the disk of this node cannot be read")
        written = write_file(path, *args, **options)
        names.append(path.name)
        return written

    sharded_plan._MAX_FILE_BYTES, engine._MAX_WORKERS = 30_000, 1
    engine.write_file = write
    try:
        with meet(detect_launcher()) as ranks:
            hf_to_sharded(source, target, ranks=ranks)
    except MeditronError as error:
        return [*names, type(error).__name__, str(error)]
    finally:
        engine.write_file = write_file
    return names


def test_what_all_have_written_is_kept_when_one_cannot_read(tmp_path: Path) -> None:
    source, target = write_tiny_llama(tmp_path / "hf"), tmp_path / "target"
    (*first, kind, said), (*second, own_kind, _) = run_ranks(
        _convert_with_a_bad_disk, 2, str(source), str(target), True
    )
    assert (kind, own_kind) == ("PassingError", "ReadError")
    assert said == "rank 1 failed: the disk of this node cannot be read"
    assert first and second and not target.exists()
    again = run_ranks(_convert_with_a_bad_disk, 2, str(source), str(target), False)
    assert not {*first, *second} & {name for share in again for name in share}
    assert verify(source, target).differences == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "target"]


FAILURES: dict[str, tuple[BaseException, type[MeditronError]]] = {
    "user": (UserError("no"), UserError),
    "read": (ReadError("no"), PassingError),
    "interrupted": (KeyboardInterrupt("no"), PassingError),
    "full": (MeditronError("no"), MeditronError),
    "crash": (TypeError("no"), MeditronError),
}


def _fail_in_every_way(rank: int, world_size: int, name: str) -> str:
    error, _ = FAILURES[name]
    try:
        with meet(detect_launcher()) as ranks:
            assert ranks is not None
            if rank == 1:
                raise error
            ranks.gather(rank)
    except BaseException as heard:
        return type(heard).__name__
    return "nothing"


@pytest.mark.parametrize("name", mostly_long(FAILURES, "user", "read", "crash"))
def test_the_kind_of_a_failure_is_heard(name: str) -> None:
    error, kind = FAILURES[name]
    assert run_ranks(_fail_in_every_way, 2, name) == [kind.__name__, type(error).__name__]


def test_a_store_that_has_gone_says_nothing_of_the_data() -> None:
    class Gone:
        def __getattr__(self, name: str) -> Any:
            def fail(*_: Any) -> None:
                raise RuntimeError("Connection reset by peer")

            return fail

    ranks = Ranks(Gone(), 0, 2)  # type: ignore[arg-type]
    for call in (ranks.check, lambda: ranks.gather(1), lambda: ranks.on_first(lambda: None)):
        with refused("the store at rank 0 has gone", kind=PassingError):
            call()


def _fail_alone(rank: int, world_size: int) -> str:
    """Rank 1 fails before it meets the others in anything."""
    try:
        with meet(detect_launcher()) as ranks:
            assert ranks is not None
            if rank == 1:
                raise UserError("a file is missing on this node")
            ranks.gather(rank)
    except UserError as error:
        return str(error)
    return "nothing"


def test_a_failure_outside_of_any_meeting_is_heard(tmp_path: Path) -> None:
    first, second, third = run_ranks(_fail_alone, 3)
    assert first == third == "rank 1 failed: a file is missing on this node"
    assert second == "a file is missing on this node"


def _be_silent(rank: int, world_size: int) -> str:
    with meet(detect_launcher()) as ranks:
        assert ranks is not None
        if rank == 1:
            ranks.gather = lambda value: []  # type: ignore[method-assign]  # as if it had been killed
            return "gone"
        ranks._silence_s = 0.5
        try:
            ranks.gather(0)
        except PassingError as error:
            ranks.gather = lambda value: []  # type: ignore[method-assign]
            return str(error)
    return "nothing"


def test_a_rank_that_dies_is_noticed() -> None:
    first, second = run_ranks(_be_silent, 2)
    assert (first, second) == ("rank 1 has given no sign of life for 0 s", "gone")
