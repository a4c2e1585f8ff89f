"""What a trace of one rank saw. Free of torch; every number is exact for the traced step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")
"""Of the memory. activations: all that the step itself makes and gives back. buffers: megatron-core's, used again."""

PHASES = ("build", "forward and backward", "reduction", "update")
"""Of the time: construction; the loop over micro-batches; adding up the gradients and their norm; the optimizer."""


@dataclass(frozen=True)
class Peak:
    """The most bytes that a phase held at once, and what they were then."""

    phase: str
    num_bytes: int
    by_part: dict[str, int]


@dataclass(frozen=True)
class Collective:
    """Calls of one kind and size.

    Attributes:
        num_bytes: of the whole tensor, gathered or before it is scattered.
    """

    kind: str
    group: str
    num_bytes: int
    phase: str
    count: int


@dataclass(frozen=True)
class Kernels:
    """Launches of one operator in one phase.

    Attributes:
        flops: of matrix products and attention only; 2 for a multiply-add.
    """

    operator: str
    phase: str
    count: int
    flops: int


@dataclass(frozen=True)
class Place:
    """Something at a line of the code.

    Attributes:
        what: in words.
    """

    what: str
    where: str
    phase: str
    count: int


@dataclass(frozen=True)
class RankTrace:
    """One rank's step.

    Attributes:
        parameters: names in the whole model, of what this rank holds, each as often as it holds it.
        num_parameters: elements of them, vocabulary padding included.
        num_micro_batches: that were traced; those of the real step are in `real_micro_batches`.
        attention: the backend that was traced.
        synchronizations: where the host waits for the device.
        misplaced: tensors on another device than the operator that uses them.
        failure: why the step ended early; None where it did not.
        cpu_seconds, resident_bytes: what the trace itself took, imports excepted.
    """

    rank: int
    stage: int
    parameters: tuple[str, ...]
    num_parameters: int
    num_micro_batches: int
    real_micro_batches: int
    attention: str
    peaks: tuple[Peak, ...]
    collectives: tuple[Collective, ...]
    kernels: tuple[Kernels, ...]
    synchronizations: tuple[Place, ...]
    misplaced: tuple[Place, ...]
    failure: str | None
    cpu_seconds: float
    resident_bytes: int

    @property
    def peak(self) -> Peak:
        """The fullest moment of the step."""
        return max(self.peaks, key=lambda peak: peak.num_bytes)

    def in_real_step(self, count: int, phase: str, group: str = "") -> int:
        """What `count` in a phase of the traced step is in the real one, which may have more micro-batches.

        Gradients are reduced once, whether or not the last micro-batch hides it.
        """
        if phase != "forward and backward" or group.startswith("data"):
            return count
        return count * self.real_micro_batches // self.num_micro_batches

    def flops(self) -> int:
        """Of the real step, recomputation included."""
        return sum(self.in_real_step(kernel.flops, kernel.phase) for kernel in self.kernels)

    def num_kernels(self) -> int:
        return sum(self.in_real_step(kernel.count, kernel.phase) for kernel in self.kernels)

    def num_synchronizations(self) -> int:
        return total(place for place in self.synchronizations if place.phase != "build")

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def total(places: Iterable[Place]) -> int:
    return sum(place.count for place in places)


@dataclass(frozen=True)
class Coverage:
    """Who owns the elements of the model and of the optimizer's state, over all ranks.

    Attributes:
        num_layers: of the model that was looked at, which has fewer layers than the real one.
        num_ranks: that were asked: all.
        wrong: tensors whose elements are not owned exactly once, in words.
        checkpoint_bytes: of the tensors of a checkpoint of the real model.
        num_checkpoint_files: at most; a rank that has nothing to write makes none.
        failure: why not all ranks could be asked; None where they were.
    """

    num_layers: int
    num_ranks: int
    wrong: tuple[str, ...]
    checkpoint_bytes: int
    num_checkpoint_files: int
    failure: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
