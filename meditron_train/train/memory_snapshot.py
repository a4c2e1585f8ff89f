"""What lies in the GPU's memory when it does not suffice, for https://pytorch.org/memory_viz."""

from __future__ import annotations

from pathlib import Path

import torch

from meditron_train.log import get_logger

_log = get_logger(__name__)

_MAX_EVENTS = 100_000


def remember_allocations() -> None:
    """Let snapshots say where each block was allocated, from now on."""
    torch.cuda.memory._record_memory_history(max_entries=_MAX_EVENTS)


def write_if_out_of_memory(error: BaseException, run_dir: Path, rank: int) -> None:
    """Write RUN_DIR/logs/rank_*.memory.pickle where the GPU's memory is why a run ends; elsewhere do nothing."""
    if not _is_out_of_memory(error):
        return
    path = run_dir / "logs" / f"rank_{rank:05d}.memory.pickle"
    try:
        torch.cuda.memory._dump_snapshot(str(path))
    except Exception as problem:  # whatever it is, the run ends for the other reason
        _log.warning("no snapshot of the GPU's memory: %s", problem)
        return
    _log.error("a snapshot of the GPU's memory is in %s; https://pytorch.org/memory_viz shows it", path)


def _is_out_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False
