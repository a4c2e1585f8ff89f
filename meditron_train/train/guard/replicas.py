"""Weights that several ranks hold must be bit-identical; where they are not, memory or a processor has failed.

Data-parallel (and context-parallel) ranks hold the same weights, tensor-parallel ranks the same norms. Each rank adds
up the bits of each parameter as integers, so any single flipped bit changes the sum; the sums of all are compared.

The check belongs between the gradients and the update: the distributed optimizer then sends every rank new weights, and
with them wipes out the trace of a flip that has already spoiled the gradients. What it cannot see: a flip in state that
only one rank holds (the distributed optimizer's master weights and moments), which reaches all replicas alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from meditron_train.errors import Cause, MeditronError, RequeueError
from meditron_train.layout import ParallelLayout
from meditron_train.train.engine import Engine

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

# (name in the whole model, tensor-parallel rank or -1 for what all of them hold) -> sum of bits
Checksums = dict[tuple[str, int], int]


def checksums(engine: Engine) -> Checksums:
    """The sums of this rank's parameters."""
    layout, at, on_gpu = engine.mesh.layout, engine.mesh.at, engine.mesh.on_gpu
    # Without sequence parallelism each tensor-parallel rank computes the norms' gradients by itself: the same on a CPU,
    # but a GPU's order of summation may differ from run to run.
    norms_are_equal = layout.sequence or not on_gpu
    keys, sums = [], []
    for virtual_rank, chunk in enumerate(engine.chunks):
        names = engine.global_names(virtual_rank)
        for local, parameter in chunk.named_parameters():
            is_split = getattr(parameter, "tensor_model_parallel", False) or not norms_are_equal
            keys.append((names[local], at.tensor if is_split else -1))
            bits = parameter.detach().contiguous().view(_INTEGERS[parameter.element_size()])
            sums.append(bits.sum(dtype=torch.int64))
    return dict(zip(keys, torch.stack(sums).tolist(), strict=True))


def deviating_ranks(sums_of_ranks: Sequence[Checksums]) -> dict[int, list[str]]:
    """Rank -> names of its parameters that differ from most others' copies. Of two copies, both are named."""
    copies: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for rank, sums in enumerate(sums_of_ranks):
        for key, value in sums.items():
            copies.setdefault(key, []).append((rank, value))
    deviating: dict[int, list[str]] = {}
    for (name, _), held in copies.items():
        counts = Counter(value for _, value in held).most_common(2)
        if len(counts) == 1:
            continue
        usual = counts[0][0] if counts[0][1] > counts[1][1] else None
        for rank, value in held:
            if value != usual:
                deviating.setdefault(rank, []).append(name)
    return deviating


def has_replicas(layout: ParallelLayout) -> bool:
    """Whether any two ranks hold the same weights."""
    return layout.data * layout.context > 1 or layout.tensor > 1


def check_replicas(engine: Engine, hosts: Sequence[str], step: int, *, action: str) -> None:
    """Compare all copies of all weights; collective.

    Args:
        hosts: the host of each rank.
        action: `resilience.on_replica_mismatch`.

    Raises:
        RequeueError, MeditronError: copies differ; the message names the ranks, their hosts and the parameters.
    """
    deviating = deviating_ranks(engine.mesh.gather_objects(checksums(engine)))
    if not deviating:
        return
    named = [
        f"rank {rank} on host {hosts[rank]} ({_few(names)})" for rank, names in sorted(deviating.items())
    ]
    certain = len(deviating) == 1
    kind = RequeueError if action == "requeue" else MeditronError
    raise kind(
        f"in step {step} copies of the same weights differ: {'; '.join(named)}. "
        + (
            "A bit has flipped there"
            if certain
            else "One of them has flipped bits (with two copies, there is no telling which)"
        )
        + ", in memory or in a processor: have that machine tested. No checkpoint was made of these weights",
        cause=Cause.REPLICAS_DIFFER,
    )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
