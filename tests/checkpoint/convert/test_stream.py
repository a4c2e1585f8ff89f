"""The engine: blocks of any size give the same bytes, hashes and findings; its threads end with it."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest
import torch

from meditron_train.checkpoint.convert.engine import Limits, plan_memory, resident_num_bytes
from meditron_train.checkpoint.convert.stream import Cancelled, first_nonfinite, write_file
from meditron_train.checkpoint.planned import PlannedFile, PlannedTensor
from meditron_train.checkpoint.tensor_map import Piece
from tests.checkpoint.planned import MemorySource
from tests.refusal import refused

A, B = torch.randn(6, 5), torch.randn(4, 5)
SOURCE = MemorySource({"a": A, "b": B})
JOINT = PlannedTensor(
    "joint",
    torch.bfloat16,
    (12, 5),
    (
        Piece("a", 0, 3, "A"), Piece("b", 0, 2, "B"), Piece("a", 3, 3, "A"), Piece("b", 2, 2, "B"),
        Piece(None, 0, 2, None),
    ),
    before=b"head",
    after=lambda crc: crc.to_bytes(4, "little"),
)  # fmt: skip
PLAN = PlannedFile("f", (JOINT,), 4 + 12 * 5 * 2 + 4)
WANT = torch.cat([A[:3], B[:2], A[3:], B[2:], torch.zeros(2, 5)]).bfloat16()


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("block_num_bytes", [1, 20, 45, 1000])
def test_blocks_of_any_size(tmp_path: Path, block_num_bytes: int) -> None:
    written = write_file(tmp_path / "f", PLAN, SOURCE, block_num_bytes=block_num_bytes)
    found = (tmp_path / "f").read_bytes()
    assert found[4:-4] == raw(WANT) and found[:4] == b"head"
    assert (written.num_bytes, written.sha256) == (len(found), hashlib.sha256(found).hexdigest())
    assert written.tensors == {
        name: hashlib.sha256(raw(tensor.bfloat16())).hexdigest() for name, tensor in (("A", A), ("B", B))
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    spoilt = B.to(dtype, copy=True)
    spoilt[3, 1] = value
    source = MemorySource({"a": A.to(dtype), "b": spoilt})
    plan = PlannedFile("f", (PlannedTensor("joint", dtype, (12, 5), JOINT.pieces),), 12 * 5 * dtype.itemsize)
    for block in (1, 1000):
        with refused("not finite", f"B ({value} at [3, 1])", "--allow-nonfinite"):
            write_file(tmp_path / "f", plan, source, block_num_bytes=block)
    written = write_file(tmp_path / "f", plan, source, block_num_bytes=20, allow_nonfinite=True)
    assert written.nonfinite == {"B": f"{value} at [3, 1]"}
    assert first_nonfinite(torch.zeros(3, dtype=torch.int32)) is first_nonfinite(A) is None


def test_a_cast_that_overflows_is_not_finite(tmp_path: Path) -> None:
    source = MemorySource({"a": A * 0 + 1e6, "b": B})
    plan = PlannedFile("f", (PlannedTensor("t", torch.float16, (6, 5), (Piece("a", 0, 6, "A"),)),), 60)
    with refused("A (inf at [0, 0])", "a cast to a smaller dtype"):
        write_file(tmp_path / "f", plan, source, block_num_bytes=100)


def test_the_source_must_have_the_expected_hashes(tmp_path: Path) -> None:
    right = {name: hashlib.sha256(raw(tensor)).hexdigest() for name, tensor in (("A", A), ("B", B))}
    write_file(tmp_path / "f", PLAN, SOURCE, block_num_bytes=20, expected=right)  # before the cast
    with refused("B has changed since"):
        write_file(tmp_path / "f", PLAN, SOURCE, block_num_bytes=20, expected={**right, "B": "0" * 64})


def test_errors_of_the_reader_and_cancelling_end_its_thread(tmp_path: Path) -> None:
    class Broken(MemorySource):
        def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
            if name == "b":
                raise OSError("the cable was pulled")
            return super().read(name, rows)

    with pytest.raises(OSError, match="cable"):
        write_file(tmp_path / "f", PLAN, Broken(SOURCE.tensors), block_num_bytes=20)
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(Cancelled):
        write_file(tmp_path / "f", PLAN, SOURCE, block_num_bytes=1, cancelled=cancelled)
    assert not [thread for thread in threading.enumerate() if thread.name == "reader"]


def test_memory_is_planned() -> None:
    limits = {
        None: 8 << 20,
        4 << 30: 8 << 20,
        resident_num_bytes() + (110 << 20): 1 << 20,
    }
    for limit, block in limits.items():
        found = plan_memory([JOINT], SOURCE, 100, Limits(limit))
        assert found.block_num_bytes == block
    assert plan_memory([JOINT], SOURCE, 1, Limits()).num_workers == 1
    with refused("--max-ram is 10.00 MiB", "needs", "Write --max-ram", "MiB or more"):
        plan_memory([JOINT], SOURCE, 1, Limits(10 << 20))
    wide = PlannedTensor("wide", torch.float32, (2, 1 << 28), (Piece("a", 0, 2, "A"),))
    with refused("Write --max-ram"):
        plan_memory([wide], SOURCE, 1, Limits(4 << 30))
