"""Nothing is exchanged where there is no other rank.

The distributed optimizer reduce-scatters its gradient buffer and all-gathers its parameter buffer in place. With one
data-parallel rank that is the identity, but gloo copies the whole buffer each time (5 % of a step on a laptop).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _skip_when_alone(collective: Callable) -> Callable:
    def call(output: torch.Tensor, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        group = kwargs.get("group")
        alone = group is not None and group.size() == 1 and output.data_ptr() == input.data_ptr()
        # An asynchronous call must return something to wait for.
        if alone and not kwargs.get("async_op", False):
            return None
        return collective(output, input, *args, **kwargs)

    return call


def install() -> None:
    """Give megatron-core's gradient and parameter buffers collectives that know when they are alone."""
    import megatron.core.distributed.param_and_grad_buffer as buffers

    buffers.dist_reduce_scatter_func = _skip_when_alone(buffers.dist_reduce_scatter_func)
    buffers.dist_all_gather_func = _skip_when_alone(buffers.dist_all_gather_func)
