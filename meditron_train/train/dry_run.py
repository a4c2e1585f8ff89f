"""One step on invented data at full size, so that too little memory shows before the first real step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from meditron_train.data.packed import PackedBatch
from meditron_train.data.packing.batch_schedule import BatchSchedule
from meditron_train.errors import Cause, MeditronError
from meditron_train.layout import ParallelLayout
from meditron_train.parallel import PackedTokens
from meditron_train.train.engine import Engine


def try_step(engine: Engine, batches: BatchSchedule) -> None:
    """`take_dry_step` with as many micro-batches as the pipeline schedule holds at once.

    Raises:
        MeditronError: it does not fit into the memory.
    """
    train, layout = engine.config.train, engine.mesh.layout
    smallest_batch = min(batches.batch_sizes) // (train.micro_batch_size * layout.data)
    batch = invented_batch(train.seq_len, train.micro_batch_size, engine.model.vocab_size)
    try:
        take_dry_step(engine, [batch] * min(num_micro_batches_held(layout), smallest_batch))
    except torch.OutOfMemoryError as error:
        raise MeditronError(
            f"a training step does not fit into the memory of {engine.mesh.device}: {str(error).splitlines()[0]} "
            "Lower train.micro_batch_size or train.seq_len, choose train.recompute=full, or raise parallel.tensor "
            "or parallel.pipeline",
            cause=Cause.OUT_OF_MEMORY,
        ) from error


def num_micro_batches_held(layout: ParallelLayout) -> int:
    """As many as the pipeline schedule keeps alive at most; interleaving holds about twice the stages."""
    return layout.pipeline * (2 if layout.virtual_pipeline > 1 else 1)


def take_dry_step(engine: Engine, batches: Sequence[PackedTokens]) -> None:
    """Take all the memory a training step takes, and change nothing.

    Runs forward and backward on `batches`, and allocates the optimizer's state.
    """
    engine.zero_gradients()
    engine.forward_backward(batches, forward_only=False)
    for optimizer in engine.optimizer.chained_optimizers:
        optimizer.init_state_fn(optimizer.optimizer)
    engine.zero_gradients()


def invented_batch(seq_len: int, micro_batch_size: int, vocab_size: int) -> PackedBatch:
    """A micro-batch with one token id everywhere and one document per sample: the worst case for attention."""
    num_tokens = seq_len * micro_batch_size
    return PackedBatch(
        tokens_T=torch.full((num_tokens,), vocab_size - 1, dtype=torch.int32),
        labels_T=torch.full((num_tokens,), vocab_size - 1, dtype=torch.int32),
        loss_mask_T=torch.ones(num_tokens, dtype=torch.bool),
        positions_T=torch.arange(seq_len, dtype=torch.int32).repeat(micro_batch_size),
        cu_seqlens=torch.arange(0, num_tokens + 1, seq_len, dtype=torch.int32),
    )
