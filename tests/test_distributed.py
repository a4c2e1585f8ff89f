"""The helper that starts ranks: none leaves while another still needs it."""

from __future__ import annotations

import time

from tests.distributed import run_ranks


def last_rank_asks_the_store(rank: int, world_size: int) -> str:
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    store = dist.distributed_c10d._get_default_store()
    if rank == 0:
        store.set("word", "kept by rank 0")
    else:
        time.sleep(1)  # rank 0 has long returned
    return store.get("word").decode()


def test_rank_0_keeps_its_store_until_every_rank_is_done():
    assert run_ranks(last_rank_asks_the_store, 2) == ["kept by rank 0"] * 2
