"""Packed attention on a GPU against softmax attention in float64 on the CPU, forward and backward.

Legend: T packed query tokens, S packed key tokens, N query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import pytest
import torch

from tests.gpu.devices import CPU, CUDA, num_not_finite

# Largest error as a share of the largest value: sums in fp32, and one rounding of the weights to the low dtypes.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
QUERY_LENGTHS = [1, 17, 0, 128, 300]


def dense_attention(q_TND, k_SKD, v_SKD, query_lengths, key_lengths):
    """Softmax attention written out, document by document; the last query looks at the last key."""
    group = q_TND.shape[1] // k_SKD.shape[1]
    k_SND, v_SND = (x.repeat_interleave(group, dim=1) for x in (k_SKD, v_SKD))
    outputs = []
    for q, k, v in zip(
        q_TND.split(query_lengths), k_SND.split(key_lengths), v_SND.split(key_lengths), strict=True
    ):
        scores = torch.einsum("tnd,snd->nts", q, k) * q.shape[2] ** -0.5
        hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(1 + len(k) - len(q))
        outputs.append(torch.einsum("nts,snd->tnd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("extra_keys", [0, 40], ids=["same-keys", "more-keys"])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=["mha", "gqa"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_equals_float64_softmax(device, dtype, head_dim, heads, extra_keys):
    from meditron_train.native import packed_attention

    num_heads, num_kv_heads = heads
    key_lengths = [
        QUERY_LENGTHS[0] + extra_keys,
        *QUERY_LENGTHS[1:],
    ]  # as under context parallelism: the first
    num_queries, num_keys = sum(QUERY_LENGTHS), sum(key_lengths)
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "q": (num_queries, num_heads, head_dim),
        "k": (num_keys, num_kv_heads, head_dim),
        "v": (num_keys, num_kv_heads, head_dim),
        "output_grad": (num_queries, num_heads, head_dim),
    }
    # Values of the low dtype, so that both sides start from the same numbers.
    given = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    output_grad = given.pop("output_grad")
    exact = {name: tensor.double().requires_grad_() for name, tensor in given.items()}
    expected = dense_attention(*exact.values(), QUERY_LENGTHS, key_lengths)
    expected_grads = torch.autograd.grad(expected, list(exact.values()), output_grad.double())

    torch.set_float32_matmul_precision("highest")  # no TF32
    ours = {name: tensor.to(device).requires_grad_() for name, tensor in given.items()}
    output = packed_attention(*ours.values(), bounds(QUERY_LENGTHS), cu_seqlens_kv=bounds(key_lengths))
    grads = torch.autograd.grad(output, list(ours.values()), output_grad.to(device))
    assert output.dtype == dtype and output.device.type == device
    results = dict(zip(("output", "q", "k", "v"), (output.detach(), *grads), strict=True))
    assert num_not_finite(results) == {}
    for (name, result), wanted in zip(results.items(), (expected, *expected_grads), strict=True):
        error = (result.cpu().double() - wanted).abs().max() / wanted.abs().max()
        assert error <= TOLERANCES[dtype], f"{name} is off by {error:.1e} of its largest value"
