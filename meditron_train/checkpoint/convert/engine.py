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
from meditron_train.checkpoint.convert.source_files import SourceFiles
from meditron_train.checkpoint.convert.stream import BLOCKS_IN_FLIGHT, Cancelled, WrittenFile, write_file
from meditron_train.checkpoint.convert.workspace import (
    Alone,
    Ranks,
    Workspace,
    publish,
    workspace,
)
from meditron_train.checkpoint.dtypes import dtype_name
from meditron_train.checkpoint.files.stored import Tensors
from meditron_train.checkpoint.hf.directory import read_generation_config
from meditron_train.checkpoint.manifest import TensorEntry
from meditron_train.checkpoint.planned import PlannedFile, PlannedTensor
from meditron_train.checkpoint.tokenizer.beside_model import tokenizer_fingerprint
from meditron_train.config.model_config import ModelConfig
from meditron_train.errors import UserError
from meditron_train.log import get_logger
from meditron_train.units import format_num_bytes

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
    source: Tensors,
    inputs: SourceFiles,
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

    Each rank writes every world_size-th file.

    Args:
        target: directory to create.
        plans: the files.
        source: the tensors that the files are made of.
        inputs: all files that are read, as they were before the first was opened; one that has changed since
            ends the conversion.
        identity: what decides the content, beside the plans: an interrupted attempt with the same identity is
            continued.
        complete: writes the small files into the directory (rank 0) and returns what the manifest says of
            them.
        manifest: further keys of the manifest.
        entries: dtype and shape of each Hugging Face tensor, completed with their hashes in the manifest.
        expected: hashes that the source's tensors must have.
        limits: memory, and whether weights may be NaN or infinite.
        ranks: the processes that share the work; None: this one alone.
        progress: see `Progress`.

    Raises:
        UserError: `target` exists and is not empty, there is too little memory, or weights are not finite.
        MeditronError: the disk is full.
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
            inputs.require_unchanged()
            tool = {"name": "meditron-train", "version": meditron_train.__version__}
            publish(work, target, everything, {"tool": tool, **described, "tensors": tensors})

        ranks.on_first(finish)
    for file in everything.values():
        for name, where in file.nonfinite.items():
            _log.warning("%s is not finite: %s", name, where)


def plan_memory(
    tensors: Iterable[PlannedTensor], source: Tensors, num_files: int, limits: Limits
) -> Schedule:
    """As many files at a time as memory allows, up to two for each core, as they wait for the disk half of the time.

    Raises:
        UserError: there is not enough memory for one.
    """
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
        f"Write --max-ram {math.ceil(needed / 2**20)}MiB or more"
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


def _row_num_bytes(tensor: PlannedTensor, source: Tensors) -> int:
    sizes = [source.dtype(piece.source).itemsize for piece in tensor.pieces if piece.source]
    return math.prod(tensor.shape[1:]) * max(tensor.dtype.itemsize, *sizes)


def _write_all(
    work: Workspace,
    plans: Sequence[PlannedFile],
    source: Tensors,
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
        path = work.directory / plan.name
        path.parent.mkdir(exist_ok=True)
        written = write_file(
            path,
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


def describe_conversion(
    directory: Path, model: ModelConfig, cast: torch.dtype | None, **source: Any
) -> dict[str, Any]:
    """What a converted directory's manifest says beside its hashes: source, cast and model."""
    return {
        "source": {"directory": directory.resolve().name, **source},
        "cast": None if cast is None else dtype_name(cast),
        "model": model.model_dump(mode="json"),
    }


def describe_hf_files(directory: Path) -> dict[str, Any]:
    """What a converted directory's manifest says of the files beside the weights, once they are written."""
    return {"tokenizer": tokenizer_fingerprint(directory), "generation": read_generation_config(directory)}
