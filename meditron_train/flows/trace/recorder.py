"""Watches every operator of a step on the pretended GPU: memory, kernels, collectives, waits and misplaced tensors.

Tensors of the pretended GPU are fake: shapes, strides and types without values. Those of the CPU are real.
"""

from __future__ import annotations

import functools
import sys
import traceback
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch._C._distributed_c10d import FakeWork, ProcessGroup
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.flop_counter import flop_registry

from meditron_train.flows.trace.ledger import Ledger
from meditron_train.flows.trace.results import Collective, Kernels, Peak, Place
from meditron_train.native.devices import PRETENDED_GPU

aten = torch.ops.aten

_STAGED_BYTES = 64 << 10  # up to this the CUDA runtime takes pageable memory without waiting for the stream
_NO_KERNEL = {
    "empty",
    "empty_strided",
    "empty_like",
    "new_empty",
    "new_empty_strided",
    "lift_fresh",
    "_local_scalar_dense",
}
# The shape of their result depends on values: the host reads its size.
_COUNTED_ON_HOST = {
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "repeat_interleave",
}
# What may have tensors of both devices: copies, and our attention, whose boundaries are the host's to read.
_MIXES_DEVICES = {"_to_copy", "copy_", "_copy_from", "packed_attention", "packed_attention_backward"}
ANY_NUMBER = 4096.0
"""What is read from the device, where nothing has a value: labels are counted, and the gradient is clipped."""

_ON_HOST = "meditron_on_host"  # of a copy of whole numbers: where their values still are
_KERNEL_NAMESPACES = ("aten", "meditron", "pretended")
_TRANSPARENT = ("meditron_train.flows.trace", "meditron_train.mcore.cpu_redirects")
_OWN = ("meditron_train", "megatron", "tests")


class Recorder(TorchDispatchMode):
    """Sees every operator while it is entered.

    Attributes:
        phase: one of `results.PHASES`, set by who takes the step.
        ledger: the bytes of the pretended GPU.
    """

    def __init__(self, groups: dict[str, str], logits_width: int | None) -> None:
        """For one rank.

        Args:
            groups: name of a process group -> what it is called in the report.
            logits_width: columns of the logits; None on a rank that has none.
        """
        super().__init__()
        self.phase = "build"
        self.ledger = Ledger()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._groups, self._logits_width = groups, logits_width
        self._pinned: weakref.WeakSet[Any] = weakref.WeakSet()
        self._kernels: Counter[tuple[str, str]] = Counter()
        self._flops: Counter[tuple[str, str]] = Counter()
        self._collectives: Counter[tuple[str, str, int, str]] = Counter()
        self._waits: Counter[tuple[str, str, str]] = Counter()
        self._misplaced: Counter[tuple[str, str, str]] = Counter()

    # ---- what others tell ---------------------------------------------------------------------------------------

    def enter(self, phase: str) -> None:
        self.phase = phase
        self.ledger.enter(phase)

    def pin(self, tensor: torch.Tensor) -> None:
        """Take a CPU tensor for one in pinned memory."""
        self._pinned.add(tensor.untyped_storage())

    def wait(self, what: str) -> None:
        """The host waits for the device here."""
        self._waits[what, where(), self.phase] += 1

    # ---- what it saw --------------------------------------------------------------------------------------------

    def peaks(self) -> tuple[Peak, ...]:
        return self.ledger.peaks()

    def kernels(self) -> tuple[Kernels, ...]:
        return tuple(
            Kernels(operator, phase, count, self._flops[operator, phase])
            for (operator, phase), count in self._kernels.items()
        )

    def collectives(self) -> tuple[Collective, ...]:
        return tuple(Collective(*key, count) for key, count in self._collectives.items())

    def waits(self) -> tuple[Place, ...]:
        return tuple(Place(*key, count) for key, count in self._waits.items())

    def misplaced(self) -> tuple[Place, ...]:
        return tuple(Place(*key, count) for key, count in self._misplaced.items())

    # ---- operators ----------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return self._communicate(func, args)
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu = any(isinstance(x, FakeTensor) for x in tensors)
        target = kwargs.get("device")
        if target is not None:
            to_gpu = torch.device(target).type == PRETENDED_GPU
        else:
            to_gpu = on_gpu
        if not (on_gpu or to_gpu):
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "is_nonzero"):
            self.wait("a value of the device is read")
            return value_of(args[0].dtype)
        if on_gpu and not to_gpu:
            return self._read(func, args, kwargs)
        if name == "copy_" and not isinstance(args[0], FakeTensor):
            self.wait("copied to the host")
            return args[0].fill_(1)
        if name in ("copy_", "_to_copy"):
            self._note_copy(name, args, kwargs)
            out = self._compute(func, name, args, kwargs)
            if name == "_to_copy" and not isinstance(args[0], FakeTensor) and not args[0].is_floating_point():
                setattr(out, _ON_HOST, args[0])
            return out
        if name not in _MIXES_DEVICES and on_gpu:
            args, kwargs = self._bring_together(name, tensors, args, kwargs)
        return self._compute(func, name, args, kwargs)

    def _compute(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in _COUNTED_ON_HOST:
            self.wait(f"{name}: the host reads the size of its result")
        with self._fake:
            try:
                out = func(*args, **kwargs)
            except DynamicOutputShapeException:
                raise RuntimeError(f"the shape of {name}'s result depends on values, at {where()}") from None
        if func.namespace in _KERNEL_NAMESPACES and not _is_view(func) and name not in _NO_KERNEL:
            key = (name, self.phase)
            self._kernels[key] += 1
            if (formula := flop_registry.get(func.overloadpacket)) is not None:
                self._flops[key] += int(formula(*args, **kwargs, out_val=out))
        for tensor in tree_iter(out):
            if isinstance(tensor, FakeTensor) and tensor.device.type == PRETENDED_GPU:
                self._allocate(name, tensor)
        return out

    def _allocate(self, name: str, tensor: FakeTensor) -> None:
        storage = tensor.untyped_storage()
        if self.ledger.knows(storage):
            return
        part = "activations"
        if self.phase != "build" and tensor.dim() >= 2 and tensor.shape[-1] == self._logits_width:
            part = "logits"
        elif name == "empty" and _called_by("get_tensor", "megatron"):
            part = "buffers"  # of megatron-core's GlobalMemoryBuffer
        self.ledger.add(storage, part)

    # ---- between host and device --------------------------------------------------------------------------------

    def _read(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A tensor of the host made from one of the device; a copy waits for its values."""
        if func.overloadpacket is aten._to_copy:
            self.wait("copied to the host")
        args, kwargs = tree_map_only(FakeTensor, values_of, (args, kwargs))
        return func(*args, **kwargs)

    def _note_copy(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Does a copy from the host make it wait?"""
        source = args[1] if name == "copy_" else args[0]
        if isinstance(source, FakeTensor) or source.numel() == 0:
            return
        non_blocking = kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
        if not non_blocking:
            self.wait("copied from the host, blocking")
        elif source.untyped_storage() not in self._pinned and source.nbytes > _STAGED_BYTES:
            self.wait("copied from pageable memory")

    def _bring_together(
        self, name: str, tensors: list[torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Note what lies on the CPU beside tensors of the device, and go on as if it did not. Numbers may."""
        takes_numbers = name not in ("cat", "stack")
        strays = [
            x for x in tensors if not isinstance(x, FakeTensor) and not (takes_numbers and x.dim() == 0)
        ]
        if not strays:
            return args, kwargs
        if name.startswith("index") and isinstance(args[0], FakeTensor):
            self.wait(f"{name}: indices are copied from the host")  # allowed by torch
        else:
            shapes = ", ".join(str(list(stray.shape)) for stray in strays)
            self._misplaced[f"{name}: {shapes} on the CPU", where(), self.phase] += 1

        def move(x: torch.Tensor) -> torch.Tensor:
            if isinstance(x, FakeTensor) or (takes_numbers and x.dim() == 0):
                return x
            with self._fake:
                return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=PRETENDED_GPU)

        return tree_map_only(torch.Tensor, move, (args, kwargs))

    def _communicate(self, func: Any, args: tuple[Any, ...]) -> Any:
        kind = func.overloadpacket.__name__.strip("_")
        group = next(
            ProcessGroup.unbox(x) for x in args if isinstance(x, torch.ScriptObject) and _is_group(x)
        )
        tensors = [x for x in tree_iter(args) if isinstance(x, torch.Tensor)]
        # The larger of what goes in and what comes out.
        num_bytes = max(
            sum(x.numel() * x.element_size() for x in tree_iter(arg) if isinstance(x, torch.Tensor))
            for arg in args
        )
        if any(not isinstance(x, FakeTensor) for x in tensors):
            return self._communicate_on_host(func, kind, args, tensors)
        if group.size() > 1:
            label = self._groups.get(group.group_name, f"{group.size()} ranks")
            self._collectives[_KINDS.get(kind, kind), label, num_bytes, self.phase] += 1
        work = FakeWork().boxed()
        return work if len(func._schema.returns) == 1 else (args[0], work)

    def _communicate_on_host(
        self, func: Any, kind: str, args: tuple[Any, ...], tensors: list[torch.Tensor]
    ) -> Any:
        """torch's own collectives of Python objects, which NCCL would have go through the device; nothing else may."""
        if any(frame.f_code.co_name in _OBJECT_COLLECTIVES for frame in _frames()):
            self.wait("Python objects are exchanged")
        else:
            self._misplaced[f"{kind}: {list(tensors[0].shape)} on the CPU", where(), self.phase] += 1
        return func(*args)


_OBJECT_COLLECTIVES = {"all_gather_object", "broadcast_object_list", "gather_object"}
_KINDS = {
    "allreduce": "all-reduce",
    "allreduce_coalesced": "all-reduce",
    "allgather_base": "all-gather",
    "allgather_into_tensor_coalesced": "all-gather",
    "reduce_scatter_base": "reduce-scatter",
    "reduce_scatter_tensor_coalesced": "reduce-scatter",
    "recv": "receive",
}


def _is_group(x: Any) -> bool:
    return "ProcessGroup" in str(x._type())


@functools.cache
def _is_view(func: Any) -> bool:
    aliases = [result.alias_info for result in func._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def value_of(dtype: torch.dtype) -> Any:
    """What every value of the device is read as."""
    return True if dtype is torch.bool else ANY_NUMBER if dtype.is_floating_point else 1


def values_of(fake: torch.Tensor) -> torch.Tensor:
    return torch.full(fake.shape, value_of(fake.dtype), dtype=fake.dtype)


def host_values(copied: torch.Tensor) -> torch.Tensor:
    """The tensor of the host that a tensor of the device was copied from, and no operator has made anew."""
    values: torch.Tensor = getattr(copied, _ON_HOST)
    return values


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _called_by(function: str, package: str) -> bool:
    """Is a function of that name among the nearest callers that belong to `package`?"""
    for frame in _frames():
        module = frame.f_globals.get("__name__", "")
        if module.startswith(package):
            return frame.f_code.co_name == function
    return False


def where() -> str:
    """The innermost line of ours or megatron-core's."""
    return next((place(frame, frame.f_lineno) for frame in _frames() if is_own(frame)), "elsewhere")


def is_own(frame: FrameType) -> bool:
    module = frame.f_globals.get("__name__", "")
    return module.split(".")[0] in _OWN and not module.startswith(_TRANSPARENT)


def place(frame: FrameType, line: int) -> str:
    """`package/file.py:line (function)`."""
    file = Path(frame.f_code.co_filename)
    depth = len(frame.f_globals["__name__"].split(".")) + (file.name == "__init__.py")
    return f"{Path(*file.parts[-depth:])}:{line} ({frame.f_code.co_name})"


def place_of(error: BaseException) -> str:
    """The innermost line of ours or megatron-core's that an error passed."""
    places = [place(frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if is_own(frame)]
    return places[-1] if places else "elsewhere"
