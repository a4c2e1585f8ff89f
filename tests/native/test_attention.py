"""Packed attention against a float64 softmax written out, and its refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meditron_train.native import packed_attention


def naive(q, k, v, cu_q, cu_k, scale=None, window=None):
    """Softmax attention, one query at a time, in float64."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    out = torch.zeros_like(q)
    for d in range(len(cu_q) - 1):
        num_queries, num_keys = cu_q[d + 1] - cu_q[d], cu_k[d + 1] - cu_k[d]
        for j in range(num_queries):
            last = num_keys - num_queries + j
            first = 0 if window is None else max(0, last - window + 1)
            rows = slice(cu_k[d] + first, cu_k[d] + last + 1)
            scores = torch.einsum("nd,snd->ns", q[cu_q[d] + j], k[rows]) * scale
            out[cu_q[d] + j] = torch.einsum("ns,snd->nd", scores.softmax(-1), v[rows])
    return out


def random_qkv(cu_q, cu_k, heads, kv_heads, dim, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    make = lambda n, h: torch.randn(n, h, dim, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return make(cu_q[-1], heads), make(cu_k[-1], kv_heads), make(cu_k[-1], kv_heads)


@st.composite
def packings(draw):
    lengths = draw(st.lists(st.integers(0, 12), min_size=1, max_size=6))
    extra = draw(st.lists(st.integers(0, 4), min_size=len(lengths), max_size=len(lengths)))
    cu_q, cu_k = [0], [0]
    for n, e in zip(lengths, extra, strict=True):
        cu_q.append(cu_q[-1] + n)
        cu_k.append(cu_k[-1] + n + e)
    return cu_q, cu_k


@settings(max_examples=60, deadline=None)
@given(
    packings(), st.sampled_from([(4, 4), (4, 2), (6, 1)]), st.sampled_from([None, 1, 3, 100]), st.booleans()
)
def test_equals_float64_softmax(packing, heads, window, same_keys):
    cu_q, cu_k = packing
    cu_k = cu_q if same_keys else cu_k
    q, k, v = (x.requires_grad_() for x in random_qkv(cu_q, cu_k, *heads, 8))
    output = packed_attention(
        q, k, v, torch.tensor(cu_q), cu_seqlens_kv=None if same_keys else torch.tensor(cu_k), window=window
    )
    expected = naive(q, k, v, cu_q, cu_k, window=window)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    if q.numel():
        weights = torch.randn_like(expected)
        got = torch.autograd.grad((output * weights).sum(), (q, k, v))
        want = torch.autograd.grad((expected * weights).sum(), (q, k, v))
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)]
)
def test_low_precision_is_close(dtype, tolerance):
    cu = [0, 7, 20, 52]
    q, k, v = random_qkv(cu, cu, 8, 2, 64, dtype=dtype)
    output = packed_attention(q, k, v, torch.tensor(cu, dtype=torch.int32), softmax_scale=0.2)
    assert output.dtype == dtype
    torch.testing.assert_close(
        output.double(), naive(q, k, v, cu, cu, scale=0.2), rtol=tolerance, atol=tolerance
    )


def test_no_tokens():
    q, k, v = random_qkv([0, 0], [0, 0], 4, 2, 8)
    assert packed_attention(q, k, v, torch.tensor([0, 0])).shape == (0, 4, 8)


BAD = {
    "starts late": (dict(cu=[1, 10]), "starts at 0"),
    "decreases": (dict(cu=[0, 6, 4, 10]), "decreases from 6 to 4"),
    "ends early": (dict(cu=[0, 9]), "ends at 9, but there are 10"),
    "heads": (dict(kv_heads=3), "4 query heads are not a multiple of 3"),
    "dtypes": (dict(k_dtype=torch.float32), "different dtypes"),
    "window": (dict(window=0), "window is 0"),
    "more queries than keys": (
        dict(cu_kv=[0, 4, 10], cu=[0, 5, 10]),
        "document 0 has 5 queries but only 4 keys",
    ),
    "unpaired": (dict(cu_kv=[0, 4, 10]), "1 documents and cu_seqlens_kv 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case):
    change, message = BAD[case]
    q, k, v = random_qkv([0, 10], [0, 10], 4, change.get("kv_heads", 2), 8)
    k = k.to(change.get("k_dtype", k.dtype))
    cu_kv = change.get("cu_kv")
    with pytest.raises(ValueError, match=message):
        packed_attention(
            q,
            k,
            v,
            torch.tensor(change.get("cu", [0, 10])),
            cu_seqlens_kv=None if cu_kv is None else torch.tensor(cu_kv),
            window=change.get("window"),
        )
