"""A GPU that has neither memory nor kernels: torch's PrivateUse1 device, with CUDA's Python functions answered for it.

For a process that does nothing else: nothing is put back. `device="cuda"` itself cannot be pretended on a build of
torch without CUDA: autograd aborts for want of a device guard.

What it cannot see: kernels that fail, hang or are wrong; orders of streams; what C++ operators allocate inside; the
allocator's fragmentation.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
import warnings
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
from torch.utils.flop_counter import register_flop_formula

from meditron_train.flows.trace.recorder import Recorder, host_values, values_of
from meditron_train.native.devices import PRETENDED_GPU
from meditron_train.native.operators import LOAD_ERROR


class _Backend(_DummyBackendModule):
    """`is_available` is False: what asks for an accelerator would otherwise want its streams and its random state."""

    def is_available(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def make_device() -> torch.device:
    """The pretended GPU; once in a process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _setup_privateuseone_for_python_backend(PRETENDED_GPU, backend_module=_Backend())
    _register_fused_elementwise()
    _register_fused_attention()
    _count_native_attention()
    torch.nn.Module._apply = _apply  # type: ignore[method-assign]
    torch.autograd.set_multithreading_enabled(False)  # the backward runs where it is watched
    torch._C._set_only_lift_cpu_tensors(True)
    return torch.device(PRETENDED_GPU, 0)


def answer_for_cuda(recorder: Recorder) -> None:
    """Let `torch.cuda`'s streams, events and waits be those of the pretended GPU."""

    class Event:
        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
        def record(self, *args: Any) -> None: ...
        def wait(self, *args: Any) -> None: ...
        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            recorder.wait("an event is waited for")

        def elapsed_time(self, end: Any) -> float:
            return 0.0

    class Stream:
        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
        def wait_stream(self, *args: Any) -> None: ...
        def wait_event(self, *args: Any) -> None: ...
        def record_event(self, *args: Any) -> Event:
            return Event()

        def synchronize(self) -> None:
            recorder.wait("a stream is waited for")

        def __enter__(self) -> Stream:
            return self

        def __exit__(self, *args: Any) -> None: ...

    on_host = torch.Tensor.tolist

    def tolist(self: torch.Tensor) -> Any:
        if self.device.type != PRETENDED_GPU:
            return on_host(self)
        recorder.wait("copied to the host")
        return on_host(values_of(self))

    torch.Tensor.tolist = FakeTensor.tolist = tolist  # type: ignore[method-assign, assignment]
    cuda: Any = torch.cuda
    cuda.Event, cuda.Stream = Event, Stream
    cuda.current_stream = cuda.default_stream = lambda *args: Stream()
    cuda.stream = lambda stream: stream
    cuda.synchronize = lambda *args: recorder.wait("the device is waited for")
    cuda.empty_cache = lambda: recorder.wait("the allocator's cache is emptied")


def _apply(self: torch.nn.Module, function: Any, recurse: bool = True) -> torch.nn.Module:
    """`Module._apply` with new parameters where a CUDA device would keep the old: a fake tensor cannot take the place
    of a real one."""
    for module in self.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            with torch.no_grad():
                value = function(parameter.detach())
            if value.device == parameter.device and value.dtype == parameter.dtype:
                continue
            moved = torch.nn.Parameter(value, parameter.requires_grad)
            moved.__dict__.update(parameter.__dict__)
            module._parameters[name] = moved
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = function(buffer)
    return self


# ---- kernels that CUDA has and a new device lacks ---------------------------------------------------------------

_libraries: list[torch.library.Library] = []  # what is registered lasts as long as its library


def _register_fused_elementwise() -> None:
    """What is one kernel in CUDA and several elsewhere: RMSNorm, which keeps its input and one fp32 number for each
    row, and the gradient of SiLU."""

    class FusedNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, shape: Any, weight: torch.Tensor, eps: Any) -> Any:
            out = torch.ops.pretended.rms_norm(x, weight)
            ctx.save_for_backward(x, weight, out[1])
            ctx.mark_non_differentiable(out[1])
            return out

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            dx, dw = torch.ops.pretended.rms_norm_backward(grads[0], *ctx.saved_tensors)
            return dx, None, dw, None

    _define(
        "rms_norm(Tensor x, Tensor weight) -> (Tensor, Tensor)",
        lambda x, weight: (torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)),
    )
    _define(
        "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
        lambda grad, x, weight, rstd: (torch.empty_like(x), torch.empty_like(weight)),
    )
    _define("silu_backward(Tensor grad, Tensor x) -> Tensor", lambda grad, x: torch.empty_like(x))
    library = torch.library.Library("aten", "IMPL")
    library.impl("_fused_rms_norm", FusedNorm.apply, "AutogradPrivateUse1")
    library.impl("silu_backward", torch.ops.pretended.silu_backward, "AutogradPrivateUse1")
    _libraries.append(library)


def _register_fused_attention() -> None:
    """flash-attn and Transformer Engine, by the functions that `native.backends` calls: both keep q, k, v, the output
    and one fp32 number for each head of a query."""

    class FusedAttention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any, num_pairs: int) -> torch.Tensor:
            out, lse = torch.ops.pretended.varlen_attention(q, k, v, num_pairs)
            ctx.save_for_backward(q, k, v, out, lse)
            ctx.num_pairs = num_pairs
            return out

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return (
                *torch.ops.pretended.varlen_attention_backward(*grads, *ctx.saved_tensors, ctx.num_pairs),
                None,
            )

    _define(
        "varlen_attention(Tensor q, Tensor k, Tensor v, int num_pairs) -> (Tensor, Tensor)",
        lambda q, k, v, num_pairs: (
            q.new_empty(q.shape),
            q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32),
        ),
    )
    _define(
        "varlen_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, int num_pairs)"
        " -> (Tensor, Tensor, Tensor)",
        lambda grad, q, k, v, *_: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)),
    )
    register_flop_formula(torch.ops.pretended.varlen_attention, get_raw=True)(
        lambda q, k, v, num_pairs, out_val=None: _attention_flops(2, q, num_pairs)
    )
    register_flop_formula(torch.ops.pretended.varlen_attention_backward, get_raw=True)(
        lambda grad, q, k, v, out, lse, num_pairs, out_val=None: _attention_flops(5, q, num_pairs)
    )

    def attend(q: Any, k: Any, v: Any, cu_q: Any, cu_kv: Any, window_size: tuple[int, int]) -> torch.Tensor:
        return FusedAttention.apply(
            q, k, v, visible_pairs(host_values(cu_q), host_values(cu_kv), window_size[0] + 1)
        )

    def varlen(
        q: Any, k: Any, v: Any, *, cu_seqlens_q: Any, cu_seqlens_k: Any, window_size: Any, **_: Any
    ) -> torch.Tensor:
        return attend(q, k, v, cu_seqlens_q, cu_seqlens_k, window_size)

    class DotProductAttention(torch.nn.Module):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__()

        def forward(
            self, q: Any, k: Any, v: Any, *, cu_seqlens_q: Any, cu_seqlens_kv: Any, window_size: Any, **_: Any
        ) -> torch.Tensor:
            return attend(q, k, v, cu_seqlens_q, cu_seqlens_kv, window_size).flatten(1)

    _pretend_module("flash_attn", flash_attn_varlen_func=varlen)
    _pretend_module("transformer_engine")
    _pretend_module("transformer_engine.pytorch", DotProductAttention=DotProductAttention)


def visible_pairs(cu_q: torch.Tensor, cu_kv: torch.Tensor, window: int = 0) -> int:
    """Pairs of a query and a key that it sees. Of a document of n queries and m keys query j sees the first m-n+j+1
    keys, with a window the last `window` of them.

    Args:
        cu_q, cu_kv: boundaries of the documents, on the host.
        window: 0 for none.
    """
    queries, most = cu_q.diff().long(), cu_kv.diff().long()
    least = most - queries + 1
    if window == 0:
        return int((queries * (least + most) // 2).sum())
    # Those that see fewer keys than the window has: a sum from `least`; and the others.
    below = (window - least).clamp(min=0).minimum(queries)
    return int((below * (2 * least + below - 1) // 2 + (queries - below) * window).sum())


def _attention_flops(num_products: int, q: torch.Tensor, num_pairs: int) -> int:
    """Of so many products, q·k and p·v in the forward, between the heads of these pairs."""
    return num_products * 2 * num_pairs * q.shape[1] * q.shape[2]


def _count_native_attention() -> None:
    """FLOPs of our own operators, which read the boundaries of documents on the host."""

    def flops(num_products: int, q: torch.Tensor, cu_q: torch.Tensor, cu_kv: torch.Tensor, rest: Any) -> int:
        *_rotation, _scale, window, _instruction_set = rest
        return _attention_flops(num_products, q, visible_pairs(cu_q, cu_kv, window))

    if LOAD_ERROR is None:
        register_flop_formula(torch.ops.meditron.packed_attention, get_raw=True)(
            lambda q, k, v, cu_q, cu_kv, *rest, out_val=None: flops(2, q, cu_q, cu_kv, rest)
        )
        register_flop_formula(torch.ops.meditron.packed_attention_backward, get_raw=True)(
            lambda grad, out, lse, q, k, v, cu_q, cu_kv, *rest, out_val=None: flops(5, q, cu_q, cu_kv, rest)
        )


def _define(schema: str, shapes: Any) -> None:
    library = torch.library.Library("pretended", "FRAGMENT")
    library.define(schema)
    torch.library.register_fake(f"pretended::{schema.partition('(')[0]}", shapes, lib=library)
    _libraries.append(library)


def _pretend_module(name: str, **contents: Any) -> None:
    module: Any = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__dict__.update(contents)
    sys.modules[name] = module
