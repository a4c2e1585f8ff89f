"""Repairs megatron-core's offsets of optimizer state in gradient buckets that are padded.

With the distributed optimizer every gradient bucket is padded to a multiple of the data-parallel size (and of 128).
`DistributedOptimizer.sharded_param_state_fully_reshardable` gathers each bucket's state without the padding, one behind
the other, and then takes a parameter's state from where the parameter lies in the *padded* buffer. So with several
buckets (overlap_grad_reduce) all parameters behind a padded one get their neighbors' optimizer state and fp32 weights,
and zeros at the end, with a warning at most. Megatron-LM's pull request 5077 repairs it; releases up to 0.19.2 lack it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from typing import Any


@contextmanager
def offsets_without_padding(optimizer: Any) -> Iterator[None]:
    """Inside, the parameters of a distributed optimizer lie where the gathered state has them.

    Args:
        optimizer: megatron-core's, chained or not; one that shares no state among ranks is left as it is.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    buffers = [buffer for part in parts for buffer in getattr(part, "buffers", ())]
    with ExitStack() as restored:
        for buffer in buffers:
            restored.callback(setattr, buffer, "param_index_map", buffer.param_index_map)
            buffer.param_index_map = _gathered_places(buffer)
        yield


def _gathered_places(buffer: Any) -> dict[Any, tuple[int, int, int]]:
    """(start, end, bucket) of every parameter of a buffer whose buckets stand without their padding."""
    padding = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets]
    before = [0, *accumulate(padding)]
    return {
        parameter: (start - before[bucket], end - before[bucket], bucket)
        for parameter, (start, end, bucket) in buffer.param_index_map.items()
    }
