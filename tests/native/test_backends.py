"""The choice of a backend, the self-test behind it, and what the adapters of other libraries hand over."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from meditron_train.errors import UserError
from meditron_train.native import backends, operators, sdpa
from meditron_train.native.backends import BACKENDS, Backend, self_test
from meditron_train.native.problem import Problem
from tests.native.attention_reference import example

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _fresh_choices():
    backends._choose_backend.cache_clear()
    backends.why_not.cache_clear()
    yield
    backends._choose_backend.cache_clear()
    backends.why_not.cache_clear()


@pytest.fixture
def messages(monkeypatch):
    seen = []
    monkeypatch.setattr(backends._log, "info", lambda text, *values: seen.append(text % values))
    return seen


def test_the_choice_is_logged_once_with_the_reasons(messages):
    for _ in range(3):
        assert backends.choose_backend("auto", CPU, torch.float32, 128) == "native"
    assert len(messages) == 1
    assert messages[0].startswith(
        "attention on cpu, torch.float32, head size 128: native; flash_attn: runs on CUDA only"
    )


@pytest.mark.parametrize("dtype, head_dim", [(torch.float64, 64), (torch.float32, 24), (torch.float32, 528)])
def test_what_no_kernel_takes_goes_to_pytorch(messages, dtype, head_dim):
    assert backends.choose_backend("auto", CPU, dtype, head_dim) == "sdpa"
    assert "native: " in messages[0]


def test_without_the_operators_pytorch_attends(monkeypatch, messages):
    monkeypatch.setattr(operators, "LOAD_ERROR", "the C++ operators are not built")
    assert backends.choose_backend("auto", CPU, torch.float32, 64) == "sdpa"
    assert "native: the C++ operators are not built" in messages[0]


def test_a_library_that_does_not_load_is_named(monkeypatch, tmp_path):
    broken = tmp_path / "_operators.abi3.so"
    monkeypatch.setattr(operators, "_LIBRARY", broken)
    assert "are not built" in operators.load()
    broken.write_bytes(b"no library")
    assert "do not load" in operators.load()


def test_self_test_passes_ours_and_finds_wrong_ones():
    def wrong_scale(problem):
        return sdpa.attend(Problem(**{**vars(problem), "softmax_scale": 1.1 * problem.softmax_scale}))

    def leaks(problem):
        whole = torch.tensor([0, problem.q_TND.shape[0]])
        return sdpa.attend(Problem(**{**vars(problem), "cu_seqlens": whole, "cu_seqlens_kv": whole}))

    def ignores_the_window(problem):
        return sdpa.attend(Problem(**{**vars(problem), "window": None}))

    def ignores_the_boundaries_of_keys(problem):
        keys = {name: vars(problem)[name][: len(problem.q_TND)] for name in ("k_SKD", "v_SKD")}
        return sdpa.attend(Problem(**{**vars(problem), **keys, "cu_seqlens_kv": problem.cu_seqlens}))

    def wrong_gradient(problem):
        return sdpa.attend(Problem(**{**vars(problem), "k_SKD": problem.k_SKD.detach() + 0 * problem.k_SKD}))

    def crashes(problem):
        raise RuntimeError("no kernel image")

    def verdict(attend):
        return self_test(Backend("x", attend, lambda *_: None), CPU, torch.bfloat16, 64)

    assert verdict(operators.attend) is None
    assert verdict(sdpa.attend) is None
    assert "output differs" in verdict(wrong_scale)
    assert "output differs" in verdict(leaks)
    assert "output differs" in verdict(ignores_the_window)
    assert "output differs" in verdict(ignores_the_boundaries_of_keys)
    assert "dk differs" in verdict(wrong_gradient)
    assert verdict(crashes) == "its self-test failed: RuntimeError: no kernel image"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_self_test_needs_no_training_around_it(mode):
    with mode():
        assert self_test(BACKENDS["native"], CPU, torch.bfloat16, 64) is None


def problem_of(case):
    return Problem(
        case.q,
        case.k,
        case.v,
        torch.tensor(case.cu_q),
        torch.tensor(case.cu_k),
        0.1,
        case.window,
        case.rotation,
        True,
    )


@pytest.mark.parametrize("window", [None, 5])
def test_flash_attn_gets_what_its_documentation_asks_for(monkeypatch, window):
    """A stand-in of the documented signature: the real library needs a GPU."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
    ):  # fmt: skip
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert (max_seqlen_q, max_seqlen_k) == (9, 11) and causal and deterministic and window_size[1] == 0
        looks_back = None if window_size[0] < 0 else window_size[0] + 1
        return sdpa.attend(
            Problem(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, looks_back, None, True)
        )

    stand_in = types.ModuleType("flash_attn")
    stand_in.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    case = example(
        [4, 0, 9], (4, 2), 64, extra_keys=[1, 0, 2], window=window, rotated=True, dtype=torch.bfloat16
    )
    want = sdpa.attend(problem_of(case))
    torch.testing.assert_close(BACKENDS["flash_attn"].attend(problem_of(case)), want)


@pytest.mark.parametrize("window", [None, 5])
def test_transformer_engine_gets_what_its_documentation_asks_for(monkeypatch, window):
    """A stand-in of the documented module: the real library needs a GPU."""

    class DotProductAttention(torch.nn.Module):
        def __init__(self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0,
                     softmax_scale=None, qkv_format="sbhd"):  # fmt: skip
            super().__init__()
            assert (num_attention_heads, kv_channels, num_gqa_groups) == (4, 64, 2)
            assert attention_dropout == 0.0 and qkv_format == "thd"
            self.scale = softmax_scale

        def forward(self, q, k, v, attn_mask_type, window_size, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q,
                    max_seqlen_kv):  # fmt: skip
            assert attn_mask_type == "padding_causal_bottom_right" and (max_seqlen_q, max_seqlen_kv) == (
                9,
                11,
            )
            looks_back = None if window_size[0] < 0 else window_size[0] + 1
            return sdpa.attend(
                Problem(q, k, v, cu_seqlens_q, cu_seqlens_kv, self.scale, looks_back, None, True)
            ).flatten(1)

    package, stand_in = types.ModuleType("transformer_engine"), types.ModuleType("transformer_engine.pytorch")
    stand_in.DotProductAttention = DotProductAttention
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", stand_in)
    backends._transformer_engine_module.cache_clear()
    case = example(
        [4, 0, 9], (4, 2), 64, extra_keys=[1, 0, 2], window=window, rotated=True, dtype=torch.bfloat16
    )
    want = sdpa.attend(problem_of(case))
    torch.testing.assert_close(BACKENDS["transformer_engine"].attend(problem_of(case)), want)
    backends._transformer_engine_module.cache_clear()


def test_on_a_gpu_nothing_but_pytorch_is_used_untested(monkeypatch, messages):
    """Installed and willing is not enough: the self-test has the last word."""
    monkeypatch.setitem(BACKENDS, "flash_attn", Backend("flash_attn", sdpa.attend, lambda *_: None))
    monkeypatch.setattr(backends, "self_test", lambda backend, *_: f"{backend.name} is wrong here")
    assert backends.choose_backend("auto", CUDA, torch.bfloat16, 128) == "sdpa"
    assert "flash_attn: flash_attn is wrong here" in messages[0]
    with pytest.raises(
        UserError, match="'flash_attn' cannot be used on cuda with torch.bfloat16: flash_attn is wrong"
    ):
        backends.choose_backend("flash_attn", CUDA, torch.bfloat16, 128)
