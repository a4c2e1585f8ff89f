"""The vocabulary-parallel cross-entropy against torch's in float64, on every split and padding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.distributed import run_ranks

VOCAB_SIZE, NUM_TOKENS = 37, 21


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (8 * torch.randn(NUM_TOKENS, VOCAB_SIZE, generator=generator)).to(dtype)
    labels = torch.randint(VOCAB_SIZE, (NUM_TOKENS,), generator=generator)
    return logits, labels, torch.randn(NUM_TOKENS, generator=generator)


def loss_rank(rank: int, world_size: int, padded_size: int, dtype: torch.dtype):
    """This rank's losses and its columns of the gradient of their weighted sum; padding columns hold huge logits."""
    import torch.distributed as dist

    from meditron_train.model.cross_entropy import VocabParallelCrossEntropy

    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    logits, labels, weights = inputs(dtype)
    padded = F.pad(logits, (0, padded_size - VOCAB_SIZE), value=1e4)
    width = padded_size // world_size
    local = padded[:, rank * width : (rank + 1) * width].clone().requires_grad_()
    num_real = min(max(VOCAB_SIZE - rank * width, 0), width)
    losses = VocabParallelCrossEntropy.apply(local * 1, labels, num_real, dist.group.WORLD)
    (losses * weights).sum().backward()
    return losses.detach(), local.grad


# 3 ranks of 37 columns: two of them hold padding only.
@pytest.mark.parametrize("world_size, padded_size", [(1, 37), (1, 64), (2, 38), (2, 64), (4, 40), (3, 111)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_equals_torch_in_float64(world_size, padded_size, dtype, tolerance):
    logits, labels, weights = inputs(dtype)
    reference = logits.double().requires_grad_()
    expected = F.cross_entropy(reference, labels, reduction="none")
    (expected * weights).sum().backward()
    results = run_ranks(loss_rank, world_size, padded_size, dtype)
    for losses, _ in results:
        assert losses.dtype == torch.float32
        torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    gradient = torch.cat([part for _, part in results], dim=1)
    assert gradient.dtype == dtype
    assert not gradient[:, VOCAB_SIZE:].any(), "padding must get no gradient"
    torch.testing.assert_close(
        gradient[:, :VOCAB_SIZE].double(), reference.grad, rtol=tolerance, atol=tolerance
    )


def test_the_forward_leaves_the_logits_and_only_one_backward_is_allowed(tmp_path):
    import torch.distributed as dist

    from meditron_train.model.cross_entropy import VocabParallelCrossEntropy

    logits, labels, _ = inputs(torch.float32)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        before = logits.clone()
        graph = logits.requires_grad_() * 1
        loss = VocabParallelCrossEntropy.apply(graph, labels, VOCAB_SIZE, dist.group.WORLD).sum()
        assert torch.equal(graph, before)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        loss = (
            VocabParallelCrossEntropy.apply(logits * 1, labels, VOCAB_SIZE, dist.group.WORLD).square().sum()
        )
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            (gradient.sum() + logits.sum()).backward()
    finally:
        dist.destroy_process_group()
