"""Process groups: what each gets from `initialize`."""

from __future__ import annotations

from tests.distributed import run_ranks


def timeouts_rank(rank: int, world_size: int, timeout_s: int) -> dict[str, float]:
    """Seconds after which this rank gives up waiting for the others, by group."""
    import torch
    import torch.distributed as dist

    from meditron_train.layout import ParallelLayout
    from meditron_train.parallel import initialize

    mesh = initialize(
        ParallelLayout(world_size), rank=rank, local_rank=rank, device="cpu", timeout_s=timeout_s
    )
    groups = {"world": dist.group.WORLD, "dp": mesh.groups.dp, "dp_cp": mesh.groups.dp_cp}
    return {
        name: group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
        for name, group in groups.items()
    }


def test_every_group_waits_as_long_as_it_was_told():
    """Not whole minutes: one that gives up before the watchdog takes the word from it."""
    want = {"world": 90.0, "dp": 90.0, "dp_cp": 90.0}
    assert run_ranks(timeouts_rank, 2, 90) == [want, want]
