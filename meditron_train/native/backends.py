"""Who computes packed attention: our kernels, flash-attn, Transformer Engine, or PyTorch document by document.

On a GPU each candidate but PyTorch must first pass a self-test on that very device, dtype and head size: nothing is
used only because it is installed.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from meditron_train.errors import MeditronError, UserError
from meditron_train.log import get_logger
from meditron_train.native import operators, sdpa
from meditron_train.native.devices import is_gpu
from meditron_train.native.problem import Problem, Rotation

_log = get_logger(__name__)


@dataclass(frozen=True)
class Backend:
    """One implementation. `missing(device, dtype, head_dim)` says why it cannot be used there, or gives None."""

    name: str
    attend: Callable[[Problem], torch.Tensor]
    missing: Callable[[torch.device, torch.dtype, int], str | None]


HALF_PRECISION = (torch.bfloat16, torch.float16)


def _native_missing(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if operators.LOAD_ERROR is not None:
        return operators.LOAD_ERROR
    if device.type == "cpu":
        if dtype not in (torch.float32, *HALF_PRECISION):
            return f"no kernel for {dtype}"
        takes = head_dim % 16 == 0 and head_dim <= 512
        return None if takes else f"head size {head_dim} is not a multiple of 16 up to 512"
    if not is_gpu(device):
        return f"no kernel for {device.type}"
    if device.type == "cuda" and not operators.built_with_cuda():
        return "built without CUDA: install with nvcc on PATH and a CUDA build of torch"
    if dtype not in HALF_PRECISION:
        return f"no CUDA kernel for {dtype}"
    return None if head_dim in (64, 80, 96, 128, 256) else f"no CUDA kernel for head size {head_dim}"


def _flash_attn_missing(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if not is_gpu(device):
        return "runs on CUDA only"
    if dtype not in HALF_PRECISION:
        return f"does not take {dtype}"
    if head_dim > 256 or head_dim % 8:
        return f"does not take head size {head_dim}"
    return None if importlib.util.find_spec("flash_attn") else "not installed: pip install flash-attn"


def _flash_attn(problem: Problem) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    q_TND, k_SKD = problem.rotated()
    return flash_attn_varlen_func(
        q_TND,
        k_SKD,
        problem.v_SKD,
        softmax_scale=problem.softmax_scale,
        causal=True,  # aligned at the last key of each document, as ours
        window_size=_look_back(problem),
        deterministic=problem.deterministic,
        **_boundaries_on_device(problem, "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
    )


def _look_back(problem: Problem) -> tuple[int, int]:
    """The window as flash-attn and Transformer Engine count it: keys before and after the query's own, -1 for all."""
    # Both count in 32 bits.
    return (-1, 0) if problem.window is None else (min(problem.window, problem.k_SKD.shape[0]) - 1, 0)


def _boundaries_on_device(
    problem: Problem, cu_q: str, cu_kv: str, max_q: str, max_kv: str
) -> dict[str, torch.Tensor | int]:
    device = problem.q_TND.device
    return {
        cu_q: problem.cu_seqlens.to(device, torch.int32, non_blocking=True),
        cu_kv: problem.cu_seqlens_kv.to(device, torch.int32, non_blocking=True),
        max_q: int(problem.cu_seqlens.diff().max()),
        max_kv: int(problem.cu_seqlens_kv.diff().max()),
    }


def _transformer_engine_missing(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if not is_gpu(device):
        return "runs on CUDA only"
    if dtype not in HALF_PRECISION:
        return f"does not take {dtype}"
    if importlib.util.find_spec("transformer_engine") is None:
        return "not installed: pip install --no-build-isolation 'transformer-engine[pytorch]'"
    return None


@functools.cache
def _transformer_engine_module(
    num_heads: int, num_kv_heads: int, head_dim: int, scale: float
) -> torch.nn.Module:
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        num_heads,
        head_dim,
        num_gqa_groups=num_kv_heads,
        attention_dropout=0.0,
        softmax_scale=scale,
        qkv_format="thd",
    )


def _transformer_engine(problem: Problem) -> torch.Tensor:
    q_TND, k_SKD = problem.rotated()
    num_heads, head_dim = q_TND.shape[1:]
    attend = _transformer_engine_module(num_heads, k_SKD.shape[1], head_dim, problem.softmax_scale)
    output = attend(
        q_TND,
        k_SKD,
        problem.v_SKD,
        attn_mask_type="padding_causal_bottom_right",
        window_size=_look_back(problem),
        **_boundaries_on_device(problem, "cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv"),
    )
    return output.view(q_TND.shape)


def _sdpa_missing(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    return None


# The fastest first, as far as is known: the speeds of flash-attn and Transformer Engine on GPUs are published, that of
# our CUDA kernels is not measured yet.
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("flash_attn", _flash_attn, _flash_attn_missing),
        Backend("transformer_engine", _transformer_engine, _transformer_engine_missing),
        Backend("native", operators.attend, _native_missing),
        Backend("sdpa", sdpa.attend, _sdpa_missing),
    )
}


@torch.compiler.assume_constant_result  # whatever is asked and logged, torch.compile keeps only the answer
def choose_backend(request: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The name of the backend for such tensors; see `_choose_backend`."""
    return _choose_backend(request, device, dtype, head_dim)


@functools.cache
def _choose_backend(request: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The name of the backend for such tensors; the choice is logged once.

    Args:
        request: "auto" for the first of BACKENDS that can, or a name.

    Raises:
        ValueError: an unknown name. UserError: a requested backend that cannot do it, with the reason.
    """
    if request != "auto":
        if request not in BACKENDS:
            raise ValueError(f"attention backend {request!r} is not one of auto, {', '.join(BACKENDS)}")
        reason = why_not(BACKENDS[request], device, dtype, head_dim)
        if reason is not None:
            raise UserError(f"train.attention: {request!r} cannot be used on {device} with {dtype}: {reason}")
        return request
    reasons: list[str] = []
    for backend in BACKENDS.values():
        reason = why_not(backend, device, dtype, head_dim)
        if reason is None:
            _log.info(
                "attention on %s, %s, head size %d: %s%s",
                device,
                dtype,
                head_dim,
                backend.name,
                "".join(reasons),
            )
            return backend.name
        reasons.append(f"; {backend.name}: {reason}")
    raise AssertionError("sdpa takes everything")


@functools.cache
def why_not(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this backend is not for such tensors (also: it fails its self-test on this GPU), or None.

    Raises:
        MeditronError, torch.OutOfMemoryError: as `self_test`. Neither is kept: the next call asks again.
    """
    reason = backend.missing(device, dtype, head_dim)
    if reason is None and device.type == "cuda" and backend.name != "sdpa":
        return self_test(backend, device, dtype, head_dim)
    return reason


@dataclass(frozen=True)
class _Packing:
    """Boundaries of queries and of keys, and the window."""

    cu_seqlens: list[int]
    cu_seqlens_kv: list[int]
    window: int | None = None


def _packings(num_multiprocessors: int) -> tuple[_Packing, ...]:
    """What a backend is tested on.

    The first is what training without context parallelism asks for; the second has keys before the queries of each
    document and, in one, keys alone. Blocks of a kernel may stay on their multiprocessor and take tiles one after the
    other: the third has more than two tiles of 128 tokens for each, already for two key/value heads.
    """
    lengths = [700, *itertools.islice(itertools.cycle((33, 1, 150, 17)), num_multiprocessors)]
    many = list(itertools.accumulate(lengths, initial=0))
    return (
        _Packing([0, 3, 3, 140, 301], [0, 3, 3, 140, 301]),
        _Packing([0, 3, 3, 140, 301], [0, 8, 15, 180, 390], 50),
        _Packing(many, many),
    )


def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def self_test(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Compare output and gradients on small packings with PyTorch in fp32; what differs, or None.

    Raises:
        torch.OutOfMemoryError: the GPU is full, which says nothing of the backend.
        MeditronError: the backend left the GPU in a state in which nothing else runs in this process.
    """
    # The first call may come from an evaluation: its verdict also holds for training.
    with torch.inference_mode(False), torch.enable_grad():
        for packing in _packings(_num_multiprocessors(device)):
            reason = _compare_with_pytorch(backend, device, dtype, head_dim, packing)
            if reason is not None:
                return f"its self-test failed: {reason}"
    return None


def _compare_with_pytorch(
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    packing: _Packing,
) -> str | None:
    generator = torch.Generator().manual_seed(0)
    num_queries, num_keys = packing.cu_seqlens[-1], packing.cu_seqlens_kv[-1]

    def random(tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(tokens, heads, head_dim, generator=generator).to(device, dtype)

    sides, grad = [random(num_queries, 4), random(num_keys, 2), random(num_keys, 2)], random(num_queries, 4)
    angles = torch.rand(num_keys, head_dim // 2, generator=generator).to(device)
    settings = (
        torch.tensor(packing.cu_seqlens, dtype=torch.int32),
        torch.tensor(packing.cu_seqlens_kv, dtype=torch.int32),
        head_dim**-0.5,
        packing.window,
        Rotation(angles.cos(), angles.sin()),
        True,
    )

    def run(attend: Callable[[Problem], torch.Tensor], in_dtype: torch.dtype) -> list[torch.Tensor]:
        q, k, v = (side.detach().to(in_dtype).requires_grad_() for side in sides)
        out = attend(Problem(q, k, v, *settings))
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad.to(in_dtype))]

    try:
        results = run(backend.attend, dtype)
        _wait_for(
            device
        )  # what fails on the GPU is reported by a later call: here, not inside PyTorch's attention
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # Whatever a third-party kernel raises: it is not used, and the reason is logged.
        if "out of memory" in str(error).lower():  # in the words of another library
            raise torch.OutOfMemoryError(f"{backend.name}: {error}") from error
        _check_still_usable(device, backend, error)
        return f"{type(error).__name__}: {error}"
    for name, got, want in zip(
        ("output", "dq", "dk", "dv"), results, run(sdpa.attend, torch.float32), strict=True
    ):
        error_norm = float((got.float() - want).norm() / want.norm())
        if not error_norm < 0.02:  # bf16 rounds to 0.004; a wrong mask or scale is far above
            return f"{name} differs by {error_norm:.1%} from PyTorch in fp32 (window {packing.window})"
    return None


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _check_still_usable(device: torch.device, backend: Backend, error: Exception) -> None:
    """After a fault of some kinds (an illegal address), CUDA answers every later call of the process with it."""
    try:
        _wait_for(device)
    except Exception as lasting:
        cause = str(error).strip().partition("\n")[0]
        raise MeditronError(
            f"attention backend {backend.name!r} crashed on {device} in its self-test, and nothing else can run there "
            f"in this process ({cause}); start again with train.attention: sdpa"
        ) from lasting
