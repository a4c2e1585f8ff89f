"""An error of rank 0 between two collectives of a save must reach all ranks, hang none, and count once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import pytest

from meditron_train.checkpoint.sharded.store import CheckpointStore
from tests.distributed import run_ranks
from tests.long import mostly_long
from tests.train.test_failures import message_rank
from tests.train.test_loop import run, run_rank


def with_a_directory_in_the_way(
    rank: int,
    world_size: int,
    config_file: Path,
    name: str,
    steps: Container[int],
    action: Callable[[int, int, Path], Any],
) -> Any:
    """Where a file of the checkpoints of `steps` belongs there is a directory, so that rank 0 cannot write the file."""
    original = CheckpointStore.begin

    def begin(store: CheckpointStore, step: int) -> Path:
        directory = original(store, step)
        if step in steps:
            (directory / name).mkdir()
        return directory

    CheckpointStore.begin = begin
    try:
        return action(rank, world_size, config_file)
    finally:
        CheckpointStore.begin = original


@pytest.fixture
def config(write_config):
    train = {"seq_len": 64, "global_batch_size": 4, "precision": "fp32", "device": "cpu"}

    def make(steps: int, interval: int, async_save: bool) -> Path:
        return write_config(
            train={"steps": steps, **train},
            checkpoint={"interval": interval, "export_hf": False, "async_save": async_save, "keep_last": 9},
        )

    return make


@pytest.mark.parametrize("async_save", mostly_long([False, True], False))
@pytest.mark.parametrize("name", mostly_long(["common.pt", ".metadata", "metadata.json"], ".metadata"))
def test_a_file_that_rank_0_alone_cannot_write(config, tmp_path, name, async_save):
    path = config(9, 4, async_save)
    assert run_ranks(with_a_directory_in_the_way, 2, path, name, [4], run_rank, timeout_s=120) == [0, 0]
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    # That of step 4 failed on both ranks, and nothing is left of it; the next one did not fail with it.
    assert names == ["step_00000008", "step_00000009"]
    assert len(run(path, world_size=2)) == 9


@pytest.mark.long
@pytest.mark.parametrize("async_save", [False, True])
def test_the_third_failure_in_a_row_ends_the_run(config, tmp_path, async_save):
    path = config(40, 2, async_save)
    outcomes = run_ranks(
        with_a_directory_in_the_way, 2, path, ".metadata", range(4, 99), message_rank, timeout_s=120
    )
    assert [code for code, _ in outcomes] == [1, 1]
    assert "the checkpoint of step 8 could not be written" in outcomes[0][1]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")] == ["step_00000002"]


def dead_writers_rank(rank: int, world_size: int, config_file: Path, end: str) -> tuple[int, str]:
    """The writers of the last rank end without a word, as without psutil or when memory is short."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def memory() -> int:
        if end == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("psutil is not installed")

    if rank == world_size - 1:
        filesystem_async._process_memory = memory
    return message_rank(rank, world_size, config_file)


@pytest.mark.parametrize(
    ("end", "async_save"),
    [
        ("killed", True),
        pytest.param("killed", False, marks=pytest.mark.long),
        pytest.param("raised", True, marks=pytest.mark.long),
        pytest.param("raised", False, marks=pytest.mark.long),
    ],
)
def test_dead_writers_end_the_save_and_do_not_hang_it(config, tmp_path, end, async_save):
    outcomes = run_ranks(dead_writers_rank, 2, config(3, 1, async_save), end, timeout_s=120)
    assert [code for code, _ in outcomes] == [1, 1]
    assert "could not be written" in outcomes[0][1]
    assert ("ended with -9" if end == "killed" else "psutil is not installed") in outcomes[0][1]
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))
