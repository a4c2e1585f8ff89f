"""Write a whole directory of planned files, by several threads and ranks, within a limit of memory."""

from __future__ import annotations

import ctypes
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import meditron_train
from meditron_train.checkpoint.hf_write import format_num_bytes
from meditron_train.checkpoint.manifest import TensorEntry
from meditron_train.checkpoint.stream import (
    BLOCKS_IN_FLIGHT,
    Cancelled,
    PlannedFile,
    PlannedTensor,
    RowSource,
    WrittenFile,
    write_file,
)
from meditron_train.checkpoint.workspace import Alone, Ranks, Workspace, publish, workspace
from meditron_train.errors import UserError
from meditron_train.log import get_logger

_log = get_logger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with a tensor's name, the bytes just written of it, and the bytes of all that this process will write."""

_BLOCK_BYTES, _MIN_BLOCK_BYTES = 8 << 20, 1 << 20
_MAX_WORKERS = 8
_M_MMAP_THRESHOLD = -3  # <malloc.h>
_SLACK_BYTES = 96 << 20  # what allocators keep, and the tokenizer's files


@dataclass(frozen=True)
class Limits:
    """How a conversion runs: memory it may have resident (None: any), and whether NaN and infinity pass."""

    max_ram_num_bytes: int | None = None
    allow_nonfinite: bool = False


NO_LIMITS = Limits()


@dataclass(frozen=True)
class Schedule:
    """How many files are written at a time, in blocks of how many bytes."""

    num_workers: int
    block_num_bytes: int


def convert_files(
    target: str | Path,
    plans: Sequence[PlannedFile],
    source: RowSource,
    *,
    identity: Mapping[str, Any],
    complete: Callable[[Path], Mapping[str, Any]],
    manifest: Mapping[str, Any],
    entries: Mapping[str, TensorEntry],
    expected: Mapping[str, str] | None = None,
    limits: Limits = NO_LIMITS,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the planned files and what `complete` adds into `target`, with manifest.json, or nothing. Collective.

    identity: what decides the content, beside the plans: an interrupted attempt with the same identity is continued.
    complete: writes the small files into the directory (rank 0), returns what the manifest says of them. entries: dtype
    and shape of each Hugging Face tensor, completed with their hashes in the manifest. expected: hashes that the
    source's tensors must have.
    Each rank writes every world_size-th file. Raises UserError when `target` exists and is not empty, the memory is
    too little, or weights are not finite; MeditronError when the disk is full.
    """
    ranks = ranks or Alone()
    mine = plans[ranks.rank :: ranks.world_size]
    schedule = plan_memory((t for plan in plans for t in plan.tensors), source, len(mine), limits)
    identity = {
        **identity,
        "version": meditron_train.__version__,
        "files": [[p.name, p.num_bytes] for p in plans],
    }
    with workspace(target, plans, identity, ranks) as work:
        written = _write_all(work, mine, source, schedule, limits, expected, ranks, progress)
        gathered = ranks.gather({name: asdict(file) for name, file in written.items()})
        everything = {name: WrittenFile(**file) for part in gathered for name, file in part.items()}

        def finish() -> None:
            described = {**manifest, **complete(work.directory)}
            hashes = {name: digest for file in everything.values() for name, digest in file.tensors.items()}
            tensors = {name: {**asdict(entry), "sha256": hashes[name]} for name, entry in entries.items()}
            tool = {"name": "meditron-train", "version": meditron_train.__version__}
            publish(work, target, everything, {"tool": tool, **described, "tensors": tensors})

        ranks.on_first(finish)
    for file in everything.values():
        for name, where in file.nonfinite.items():
            _log.warning("%s is not finite: %s", name, where)


def plan_memory(
    tensors: Iterable[PlannedTensor], source: RowSource, num_files: int, limits: Limits
) -> Schedule:
    """As many files at a time as there is memory for, up to two for each core, as they wait for the disk half of the
    time. Raises UserError when there is not enough for one."""
    row_bytes = max(_row_num_bytes(tensor, source) for tensor in tensors)
    base = resident_num_bytes() + _SLACK_BYTES
    most = max(1, min(_MAX_WORKERS, num_files, 2 * (os.cpu_count() or 1)))
    limit = limits.max_ram_num_bytes
    for num_workers, wanted in [
        *((n, _BLOCK_BYTES) for n in range(most, 0, -1)),
        (1, _MIN_BLOCK_BYTES),
    ]:
        block = max(wanted, row_bytes)
        needed = base + num_workers * BLOCKS_IN_FLIGHT * block
        if limit is None or needed <= limit:
            return Schedule(num_workers, block)
    raise UserError(
        f"--max-ram is {format_num_bytes(limit or 0)}, but this conversion needs {format_num_bytes(needed)}: the "
        f"program itself has {format_num_bytes(base)} and blocks of rows take the rest. "
        f"Write --max-ram {math.ceil(needed / 2**20)}MiB or more."
    )


def resident_num_bytes() -> int:
    """Memory of this process that is resident now, mapped files included; 0 where /proc does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _return_freed_blocks() -> None:
    """Have blocks go back to the system when they are freed.

    glibc learns to keep memory of their size in a heap for each thread, which grows as long as a conversion runs.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MIN_BLOCK_BYTES // 4)


def files_identity(directory: Path) -> list[list[Any]]:
    """Name, size and time of change of every file below a directory: another list is another source."""
    found = []
    for parent, _, names in os.walk(directory, followlinks=True):
        for name in names:
            path = Path(parent) / name
            if path.exists():
                status = path.stat()
                found.append([path.relative_to(directory).as_posix(), status.st_size, status.st_mtime_ns])
    return sorted(found)


def _row_num_bytes(tensor: PlannedTensor, source: RowSource) -> int:
    sizes = [source.dtype(piece.source).itemsize for piece in tensor.pieces if piece.source]
    return math.prod(tensor.shape[1:]) * max(tensor.dtype.itemsize, *sizes)


def _write_all(
    work: Workspace,
    plans: Sequence[PlannedFile],
    source: RowSource,
    schedule: Schedule,
    limits: Limits,
    expected: Mapping[str, str] | None,
    ranks: Ranks,
    progress: Progress | None,
) -> dict[str, WrittenFile]:
    total = sum(plan.num_bytes for plan in plans)
    cancelled = threading.Event()

    def advance(name: str, num_bytes: int) -> None:
        if progress is not None:
            progress(name, num_bytes, total)

    def write(plan: PlannedFile) -> WrittenFile:
        if cancelled.is_set():
            raise Cancelled
        ranks.check()
        earlier = work.finished(plan)
        if earlier is not None and (limits.allow_nonfinite or not earlier.nonfinite):
            advance(plan.name, plan.num_bytes)
            return earlier
        written = write_file(
            work.directory / plan.name,
            plan,
            source,
            block_num_bytes=schedule.block_num_bytes,
            allow_nonfinite=limits.allow_nonfinite,
            expected=expected,
            progress=advance,
            cancelled=cancelled,
        )
        work.record(plan.name, written)
        return written

    _return_freed_blocks()
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the workers are the parallelism
    pool = ThreadPoolExecutor(schedule.num_workers, thread_name_prefix="convert")
    try:
        futures: list[Future[WrittenFile]] = [pool.submit(write, plan) for plan in plans]
        wait(futures, return_when=FIRST_EXCEPTION)
        failed = [future for future in futures if future.done() and future.exception() is not None]
        if failed:
            cancelled.set()
            wait(futures)
            raise next(e for f in futures if (e := f.exception()) and not isinstance(e, Cancelled))
        return {plan.name: future.result() for plan, future in zip(plans, futures, strict=True)}
    finally:
        cancelled.set()
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(num_threads)
