"""Errors that rank 0 meets while it writes the files of a checkpoint that megatron-core has one rank write.

Each of these files is written between two collectives: an error that left there at once (a full disk) would
leave the other ranks waiting in the next one. It is kept instead, until all ranks are through.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_kept: list[Exception] = []


def _keep_error(write: Callable) -> Callable:
    @functools.wraps(write)
    def call(*args: Any, **kwargs: Any) -> None:
        try:
            write(*args, **kwargs)
        except (OSError, RuntimeError) as error:  # torch.save raises the latter for a full disk
            _kept.append(error)

    return call


def raise_save_error() -> None:
    """After a save's last collective: raise the first error that was kept during it."""
    if _kept:
        error = _kept[0]
        _kept.clear()
        raise error


def install() -> None:
    """For common.pt, .metadata and metadata.json."""
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    TorchCommonSaveStrategy.save_common = _keep_error(TorchCommonSaveStrategy.save_common)
    FileSystemWriterAsync.finish = _keep_error(FileSystemWriterAsync.finish)
    serialization.save_config = _keep_error(serialization.save_config)
