"""The choice of a backend, the self-test behind it, and what the adapters of other libraries hand over."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from meditron_train.errors import MeditronError, UserError
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


def gpu_stand_in(monkeypatch, *, faults: list[bool]) -> torch.device:
    """The CPU as a GPU whose kernels run late: the n-th wait for it reports a fault where `faults` says so."""
    waits = iter(faults)

    def wait(device):
        if next(waits, False):
            raise RuntimeError(
                "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be"
            )

    monkeypatch.setattr(backends, "_wait_for", wait)
    return CPU


def test_a_fault_that_the_gpu_reports_late_is_the_backends(monkeypatch):
    """The first wait reports it, the second finds the device usable again."""
    device = gpu_stand_in(monkeypatch, faults=[True, False])
    verdict = self_test(Backend("x", sdpa.attend, lambda *_: None), device, torch.bfloat16, 64)
    assert verdict.startswith("its self-test failed: RuntimeError: CUDA error: an illegal memory access")


def test_a_fault_that_stays_ends_the_process_with_the_backends_name(monkeypatch):
    device = gpu_stand_in(monkeypatch, faults=[True, True])
    with pytest.raises(MeditronError) as caught:
        self_test(Backend("x", sdpa.attend, lambda *_: None), device, torch.bfloat16, 64)
    assert str(caught.value) == (
        "attention backend 'x' crashed on cpu in its self-test, and nothing else can run there in this process "
        "(CUDA error: an illegal memory access was encountered); start again with train.attention: sdpa"
    )


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), RuntimeError("CUDA driver: Out of memory")], ids=str
)
def test_a_full_gpu_is_no_verdict_and_asked_again(monkeypatch, error):
    tries = []

    def attend(problem):
        tries.append(problem)
        if len(tries) == 1:
            raise error
        return sdpa.attend(problem)

    def on_cpu(backend, device, *rest):
        return self_test(backend, CPU, *rest)

    monkeypatch.setattr(backends, "self_test", on_cpu)
    backend = Backend("x", attend, lambda *_: None)
    with pytest.raises(torch.OutOfMemoryError):
        backends.why_not(backend, CUDA, torch.bfloat16, 64)
    assert backends.why_not(backend, CUDA, torch.bfloat16, 64) is None


def test_self_test_takes_every_multiprocessor_more_than_two_tiles(monkeypatch):
    """A stand-in for a kernel that goes wrong only where a block takes its third tile."""
    num_multiprocessors, heads, seen = 132, 2, []
    monkeypatch.setattr(backends, "_num_multiprocessors", lambda device: num_multiprocessors)

    def wrong_from_the_third_turn(problem):
        lengths = problem.cu_seqlens.diff().tolist()
        num_tiles = sum(-(-length // 128) for length in lengths)
        seen.append(problem.q_TND.shape[0])
        out = sdpa.attend(problem)
        return out * 0 if num_tiles * heads > 2 * num_multiprocessors else out

    backend = Backend("x", wrong_from_the_third_turn, lambda *_: None)
    assert "output differs" in self_test(backend, CPU, torch.bfloat16, 64)
    assert max(seen) < 10_000  # small, as it runs once in each process


@pytest.mark.parametrize("dtype, extra_keys, window, wanted", [
    (torch.bfloat16, [0, 0], None, [True, True]),
    (torch.bfloat16, [0, 3], None, [True, False]),
    (torch.bfloat16, [0, 0], 4, [False, False]),
    (torch.float32, [0, 0], None, [False, False]),
])  # fmt: skip
def test_grouped_heads_never_leave_a_gpu_the_kernel_with_all_scores(
    monkeypatch, dtype, extra_keys, window, wanted
):
    """On a GPU only the flash kernel takes groups, and it takes neither a mask nor fp32."""
    case = example([40, 9], (4, 2), 64, extra_keys=extra_keys, window=window, dtype=dtype)

    def run() -> tuple[list[torch.Tensor], list[bool]]:
        sides = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
        grouped = []

        def spy(q, k, v, **options):
            assert (q.shape[1] != k.shape[1]) <= options["enable_gqa"]
            grouped.append(k.shape[1] == 2)
            return scaled_dot_product_attention(q, k, v, **options)

        with monkeypatch.context() as patch:
            patch.setattr(sdpa.F, "scaled_dot_product_attention", spy)
            given = dict(zip(("q_TND", "k_SKD", "v_SKD"), sides, strict=True))
            out = sdpa.attend(Problem(**{**vars(problem_of(case)), **given}))
        return [out.detach(), *torch.autograd.grad(out, sides, torch.ones_like(out))], grouped

    scaled_dot_product_attention = torch.nn.functional.scaled_dot_product_attention
    on_cpu, grouped = run()
    assert all(grouped)  # there it costs nothing
    monkeypatch.setattr(sdpa, "is_gpu", lambda device: True)
    on_gpu, grouped = run()
    assert grouped == wanted  # by document
    for got, want in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


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
