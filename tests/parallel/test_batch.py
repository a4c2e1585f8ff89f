"""Cutting a packed micro-batch for context parallelism: nothing lost, and attention unchanged."""

from __future__ import annotations

import pytest
import torch

from meditron_train.native import packed_attention
from meditron_train.parallel import localize
from tests.train.reference import random_batch

CPU = torch.device("cpu")


def test_one_rank_has_everything():
    batch = random_batch(0)
    local = localize(batch, context_rank=0, context_size=1, device=CPU)
    assert torch.equal(local.tokens_BL[0], batch.tokens_T)
    assert local.local_index is None and local.gather_index is None
    (span,) = local.spans
    assert span.cu_seqlens.tolist() == span.cu_seqlens_kv.tolist() == batch.cu_seqlens.tolist()


@pytest.mark.parametrize("context_size", [2, 4, 8])
@pytest.mark.parametrize("seed", range(5))
def test_ranks_together_are_the_whole(context_size, seed):
    batch = random_batch(seed)
    locals_ = [
        localize(batch, context_rank=r, context_size=context_size, device=CPU) for r in range(context_size)
    ]
    index = torch.cat([local.local_index for local in locals_])
    assert sorted(index.tolist()) == list(range(64))
    gathered = torch.cat([local.tokens_BL[0] for local in locals_])
    for local in locals_:
        assert torch.equal(gathered[local.gather_index], batch.tokens_T)
        assert torch.equal(local.labels_BL[0], batch.labels_T[local.local_index])
        assert torch.equal(local.loss_mask_BL[0], batch.loss_mask_T[local.local_index])


@pytest.mark.parametrize("context_size", [2, 4])
@pytest.mark.parametrize("seed", range(8))
def test_attention_over_spans_is_attention_over_the_whole(context_size, seed):
    batch = random_batch(seed)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(64, h, 8, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    whole = packed_attention(q, k, v, batch.cu_seqlens)
    for rank in range(context_size):
        local = localize(batch, context_rank=rank, context_size=context_size, device=CPU)
        local_q = q[local.local_index]
        parts = [
            packed_attention(
                local_q[span.query_start : span.query_end],
                k[span.key_start : span.key_end],
                v[span.key_start : span.key_end],
                span.cu_seqlens,
                cu_seqlens_kv=span.cu_seqlens_kv,
            )
            for span in local.spans
        ]
        torch.testing.assert_close(torch.cat(parts), whole[local.local_index], rtol=1e-12, atol=1e-12)


def test_a_length_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="64 tokens do not divide into 2 x 3 chunks"):
        localize(random_batch(0), context_rank=0, context_size=3, device=CPU)
