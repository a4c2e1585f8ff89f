"""What a checkpoint takes from an engine is what the engine has."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from tests.distributed import run_ranks
from tests.long import mostly_long
from tests.train.ranks import make_config, start_engine, take_steps
from tests.train.reference import hf_model, random_batch

_BUCKET_NUMEL = 3000  # several buckets in a tiny model, none of them a multiple of 3 * 128


def save_and_load(rank: int, world_size: int, config, directory: Path) -> tuple[int, int, list[float]]:
    """(buckets, padded ones, per tensor of the rank: how far it is off) after a checkpoint was written and read."""
    from meditron_train.checkpoint.sharded.ranks import ShardedSaver, load_sharded
    from meditron_train.train import engine as engine_module
    from meditron_train.train.engine_state import load_state, local_state, sharded_state

    engine_module.DistributedDataParallelConfig = partial(
        engine_module.DistributedDataParallelConfig, bucket_size=_BUCKET_NUMEL
    )
    engine = start_engine(rank, world_size, config)
    buckets = [bucket for chunk in engine.ddp_chunks for buffer in chunk.buffers for bucket in buffer.buckets]
    num_padded = sum(bucket.grad_data.numel() > bucket.numel_unpadded for bucket in buckets)
    take_steps(
        engine, [[random_batch(seed) for seed in range(3)], [random_batch(seed) for seed in range(3, 6)]]
    )
    before = [tensor.clone() for tensor in local_state(engine)["tensors"]]
    if rank == 0:
        directory.mkdir()
    torch.distributed.barrier()
    saver = ShardedSaver(engine.mesh.groups.dp_cp, asynchronous=False)
    saver.save(sharded_state(engine, with_optimizer=True, is_loading=False), directory)
    for tensor in local_state(engine)["tensors"]:
        tensor.zero_()
    load_state(engine, load_sharded(sharded_state(engine, with_optimizer=True, is_loading=True), directory))
    after = local_state(engine)["tensors"]
    return len(buckets), num_padded, [float((a - b).abs().max()) for a, b in zip(before, after, strict=True)]


@pytest.mark.parametrize("precision", mostly_long(["fp32", "bf16"], "bf16"))
def test_state_in_several_padded_buckets_is_saved_exactly(tmp_path, precision):
    hf_model().save_pretrained(tmp_path / "hf")
    sections = {
        "parallel": {"overlap_grad_reduce": True},
        "train": {"precision": precision, "global_batch_size": 3},
    }
    config = make_config(tmp_path / "hf", sections)
    for num_buckets, num_padded, differences in run_ranks(save_and_load, 3, config, tmp_path / "checkpoint"):
        assert num_buckets > 3 and num_padded > 1, "the case that was wrong"
        assert differences and max(differences) == 0.0
