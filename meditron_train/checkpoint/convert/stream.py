"""The conversion engine: files made of pieces of other tensors, written front to back in blocks of a few MiB.

What a file will hold is planned from names, shapes and dtypes alone. Writing one then reads rows of the source, casts
and hashes them and appends them, so that memory depends on the size of a block and never on a tensor or the model.
"""

from __future__ import annotations

import hashlib
import math
import queue
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from meditron_train.checkpoint.files.direct_file import DirectFile
from meditron_train.checkpoint.files.stored import Tensors, byte_view
from meditron_train.checkpoint.planned import PlannedFile, PlannedTensor
from meditron_train.errors import UserError

_QUEUED_BLOCKS = 2  # read ahead of the writer
# Those queued, and one each at the reader, in its cast, at the writer and in the file's buffer.
BLOCKS_IN_FLIGHT = _QUEUED_BLOCKS + 4

Progress = Callable[[str, int], None]
_T = TypeVar("_T")


@dataclass(frozen=True)
class WrittenFile:
    """What is known of a file once it is written.

    Attributes:
        tensors: Hugging Face name -> SHA-256 of the tensor's bytes in C order.
        nonfinite: Hugging Face name -> where the first NaN or infinity is, of the tensors that have one.
    """

    num_bytes: int
    sha256: str
    tensors: Mapping[str, str]
    nonfinite: Mapping[str, str] = field(default_factory=dict)


class Cancelled(Exception):
    """Another thread or rank has failed; what this one does has become pointless."""


@dataclass(frozen=True)
class Block:
    """Consecutive rows of one tensor.

    Attributes:
        raw: as stored in the source.
        data: cast.
        row: number of the first row within its Hugging Face tensor.
    """

    tensor: PlannedTensor
    raw: torch.Tensor
    data: torch.Tensor
    hf_name: str | None
    row: int
    is_last: bool


def blocks_of(tensor: PlannedTensor, source: Tensors, block_num_bytes: int) -> Iterator[Block]:
    """The tensor in blocks of at most `block_num_bytes` (or one row), cast to its dtype."""
    row_shape = tensor.shape[1:]
    row_elements = math.prod(row_shape)
    done: dict[str | None, int] = {}
    num_pieces = len(tensor.pieces)
    for number, piece in enumerate(tensor.pieces):
        source_size = source.dtype(piece.source).itemsize if piece.source else 0
        row_bytes = max(1, row_elements * max(source_size, tensor.dtype.itemsize))
        height = max(1, block_num_bytes // row_bytes)
        for start in range(0, max(1, piece.num_rows), height):
            num_rows = min(height, piece.num_rows - start)
            if piece.source is None:
                raw = torch.zeros(num_rows, *row_shape, dtype=tensor.dtype)
            else:
                first = piece.start + start
                raw = source.read(piece.source, rows=(first, first + num_rows))
            row = done.get(piece.hf_name, 0)
            done[piece.hf_name] = row + num_rows
            is_last = number == num_pieces - 1 and start + height >= piece.num_rows
            yield Block(tensor, raw, raw.to(tensor.dtype), piece.hf_name, row, is_last)


def write_file(
    path: Path,
    plan: PlannedFile,
    source: Tensors,
    *,
    block_num_bytes: int,
    allow_nonfinite: bool = False,
    expected: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    cancelled: threading.Event | None = None,
) -> WrittenFile:
    """Write and sync one planned file. A helper thread reads and hashes tensors ahead of the writer.

    Args:
        path: the file to create.
        plan: its tensors.
        source: where their rows are read.
        block_num_bytes: size of the blocks that are read at a time.
        allow_nonfinite: accept NaN and infinity.
        expected: Hugging Face name -> SHA-256 of its bytes in the source, as the source's manifest has it.
        progress: called with a tensor's name and the bytes just written of it.
        cancelled: set by the caller to stop early.

    Raises:
        UserError: a value is NaN or infinite (unless allowed), or the source is damaged or not as expected.
        OSError: the disk is full.
        Cancelled: soon after the event is set.
    """
    look = _Inspection(allow_nonfinite, expected or {})
    whole, num_written = hashlib.sha256(), 0

    def read() -> Iterator[Block]:
        for tensor in plan.tensors:
            for block in blocks_of(tensor, source, block_num_bytes):
                look.add(block)
                yield block
            look.end(tensor)

    with DirectFile(path) as file:

        def append(data: bytes | memoryview) -> None:
            nonlocal num_written
            view = memoryview(data)
            whole.update(view)
            file.append(view)
            num_written += len(view)

        crc = 0
        starts = True
        for block in _ahead(read()):
            if cancelled is not None and cancelled.is_set():
                raise Cancelled
            if starts:
                append(block.tensor.before)
                crc = 0
            view = byte_view(block.data)
            append(view)
            if block.tensor.after is not None:
                crc = zlib.crc32(view, crc)
            if progress is not None:
                progress(block.tensor.name, len(view))
            starts = block.is_last
            if block.is_last and block.tensor.after is not None:
                append(block.tensor.after(crc))
        if num_written != plan.num_bytes:
            raise AssertionError(f"{path} has {num_written} bytes, planned were {plan.num_bytes}")
        file.sync()
    return WrittenFile(num_written, whole.hexdigest(), look.digests(), look.nonfinite)


class _Inspection:
    """What is seen of the tensors on their way: hashes, and values that are not finite."""

    def __init__(self, allow_nonfinite: bool, expected: Mapping[str, str]) -> None:
        self.nonfinite: dict[str, str] = {}
        self._allow_nonfinite = allow_nonfinite
        self._expected = expected
        self._digests: dict[str, Any] = {}
        self._raw_digests: dict[str, Any] = {}  # of tensors that are cast and expected

    def add(self, block: Block) -> None:
        name = block.hf_name
        if name is None:
            return
        self._digests.setdefault(name, hashlib.sha256()).update(byte_view(block.data))
        if name in self._expected and block.raw is not block.data:
            self._raw_digests.setdefault(name, hashlib.sha256()).update(byte_view(block.raw))
        if name not in self.nonfinite and (index := first_nonfinite(block.data)) is not None:
            where = index_text(block, index)
            if not self._allow_nonfinite:
                raise nonfinite_error({name: where})
            self.nonfinite[name] = where

    def end(self, tensor: PlannedTensor) -> None:
        """All of the tensor has been seen."""
        for name in {piece.hf_name for piece in tensor.pieces if piece.hf_name in self._expected}:
            assert name is not None
            found = self._raw_digests.get(name, self._digests[name]).hexdigest()
            if found != self._expected[name]:
                raise UserError(
                    f"{name} has changed since the checkpoint was written: its SHA-256 is {found[:12]}… instead of "
                    f"{self._expected[name][:12]}…, as the manifest has it. Use another copy of the checkpoint"
                )

    def digests(self) -> dict[str, str]:
        return {name: digest.hexdigest() for name, digest in self._digests.items()}


def first_nonfinite(tensor: torch.Tensor) -> int | None:
    """Flat index of the first NaN or infinity, None when all values are finite (or integers)."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return None
    low, high = torch.aminmax(tensor)  # both are NaN where any value is; many times faster than isfinite
    if math.isfinite(low) and math.isfinite(high):
        return None
    return int(torch.isfinite(tensor.reshape(-1)).logical_not().to(torch.uint8).argmax())


def index_text(block: Block, index: int) -> str:
    """ "nan at [3, 7]" for a flat index into a block."""
    width = max(1, math.prod(block.data.shape[1:]))
    rest = (
        torch.unravel_index(torch.tensor(index % width), block.data.shape[1:]) if block.data.dim() > 1 else ()
    )
    return (
        f"{block.data.reshape(-1)[index].item()} at {[block.row + index // width, *(int(i) for i in rest)]}"
    )


def nonfinite_error(places: Mapping[str, str]) -> UserError:
    """The error for weights that hold NaN or infinity: tensor -> first place."""
    found = ", ".join(f"{name} ({where})" for name, where in places.items())
    return UserError(
        f"the weights are not finite: {found}. A model with such weights computes nothing sensible, and a cast to a "
        "smaller dtype can make them. Find out where they come from, or convert all the same with --allow-nonfinite"
    )


def _ahead(items: Iterator[_T]) -> Iterator[_T]:
    """The items, produced by another thread a few ahead of the consumer, to whom its exception is passed on."""
    waiting: queue.Queue[tuple[bool, Any]] = queue.Queue(_QUEUED_BLOCKS)
    stopped = threading.Event()

    def put(entry: tuple[bool, Any]) -> bool:
        while not stopped.is_set():
            try:
                waiting.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put((True, item)):
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=produce, name="reader", daemon=True)
    thread.start()
    try:
        while True:
            is_item, value = waiting.get()
            if is_item:
                yield value
            elif value is None:
                return
            else:
                raise value
    finally:
        stopped.set()
        thread.join()
