"""An error of rank 0 between two collectives of a save must reach all ranks, and hang none."""

from __future__ import annotations

import errno
from pathlib import Path

from tests.distributed import run_ranks
from tests.train.test_loop import run, run_rank


def full_for_the_first_common_file(rank: int, world_size: int, config_file: Path) -> int:
    """Rank 0's first common.pt meets a full disk; what comes later does not."""
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy

    original, calls = TorchCommonSaveStrategy.save_common, []

    def save_common(self, state, directory):
        calls.append(directory)
        if rank == 0 and len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device", f"{directory}/common.pt")
        return original(self, state, directory)

    TorchCommonSaveStrategy.save_common = save_common
    try:
        return run_rank(rank, world_size, config_file)
    finally:
        TorchCommonSaveStrategy.save_common = original


def test_a_disk_that_is_full_for_rank_0_alone(write_config, tmp_path):
    config = write_config(train={"steps": 9, "seq_len": 64, "global_batch_size": 8, "precision": "fp32",
                          "device": "cpu"}, checkpoint={"interval": 4, "export_hf": False})  # fmt: skip
    assert run_ranks(full_for_the_first_common_file, 2, config, timeout_s=120) == [0, 0]
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert names == [
        "step_00000008",
        "step_00000009",
    ]  # that of step 4 failed on both ranks, and nothing is left of it
    assert len(run(config, world_size=2)) == 9
