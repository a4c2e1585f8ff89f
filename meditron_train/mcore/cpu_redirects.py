"""Let unmodified megatron-core train without a CUDA device: CPU tensors, gloo collectives.

`apply()` must run before the first import of `megatron.core`. Where CUDA is available it does nothing, so
a GPU run never meets it. Each redirect answers only callers inside `megatron.core`; every other caller
keeps PyTorch's own behavior, which on a machine without a GPU is an error.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")

_answer = CPU  # the device that megatron-core is given for CUDA's

# Tensor factories that megatron-core calls with device="cuda" or pin_memory=True.
FACTORIES = ("tensor", "zeros", "ones", "empty", "empty_like")


def _called_from_megatron() -> bool:
    """Whether the caller of the redirected function (two frames up) is megatron.core code."""
    return sys._getframe(2).f_globals.get("__name__", "").startswith("megatron.core")


def _redirect(owner: Any, attribute: str, replacement: Callable) -> None:
    original = getattr(owner, attribute)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return replacement(*args, **kwargs) if _called_from_megatron() else original(*args, **kwargs)

    setattr(owner, attribute, call)


def _redirect_factory(name: str) -> None:
    original = getattr(torch, name)

    def make_on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = _answer
        kwargs.pop("pin_memory", None)  # pinning needs a CUDA driver
        return original(*args, **kwargs)

    _redirect(torch, name, make_on_cpu)


def _redirect_devices() -> None:
    """`torch.cuda.current_device()` is where megatron-core puts every tensor it makes."""
    _redirect(torch.cuda, "current_device", lambda: _answer)
    _redirect(torch.cuda, "synchronize", lambda *args: None)  # there is no device queue to wait for
    _redirect(torch.Tensor, "cuda", lambda self, *args, **kwargs: self.to(_answer))


def _redirect_random_state() -> None:
    """The 'CUDA generator' of megatron-core's RNG tracker is the CPU generator here."""
    generator = torch.default_generator
    _redirect(torch.cuda, "get_rng_state", lambda *args, **kwargs: generator.get_state())
    _redirect(torch.cuda.random, "get_rng_state", lambda *args, **kwargs: generator.get_state())
    _redirect(torch.cuda, "set_rng_state", lambda state, *args, **kwargs: generator.set_state(state))
    _redirect(torch.cuda, "manual_seed", lambda seed: generator.manual_seed(seed))
    _redirect(torch.cuda, "_lazy_call", lambda function, **kwargs: function())
    torch.cuda.default_generators = {CPU: generator}  # type: ignore[assignment]
    # With one generator for both, the tracker's warning that the CPU state moved is always true and means nothing.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed within GPU RNG context" not in record.getMessage()
    )


def _redirect_type_names() -> None:
    """The optimizers sort parameters by type name ('torch.cuda.FloatTensor', ...)."""
    original_type = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original_type(self, *args, **kwargs)
        name = original_type(self).rpartition(".")[2]
        return f"torch.cuda.{name}"

    _redirect(torch.Tensor, "type", type_name)


def apply() -> None:
    """Install the redirects; no effect where CUDA is available.

    Raises:
        RuntimeError: `megatron.core` was already imported, so some of its modules have bound the originals.
    """
    if torch.cuda.is_available():
        return
    imported = sorted(name for name in sys.modules if name.startswith("megatron.core"))
    if imported:
        raise RuntimeError(
            f"{imported[0]} was imported before meditron_train.mcore; import names of megatron-core from "
            "meditron_train.mcore only"
        )
    _device_constructors()  # fill its cache with the originals, or `with torch.device(...)` breaks afterwards
    _redirect_devices()
    _redirect_random_state()
    _redirect_type_names()
    for name in FACTORIES:
        _redirect_factory(name)


def answer_with(device: torch.device) -> None:
    """Give megatron-core `device` for CUDA's from now on: the GPU that a trace pretends, whose generator is the CPU's.

    `apply` must have installed the redirects.
    """
    global _answer
    _answer = device
    torch.cuda.default_generators = {device: torch.default_generator}  # type: ignore[assignment]
