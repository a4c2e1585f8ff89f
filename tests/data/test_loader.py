from __future__ import annotations

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from meditron_train.config.training import BatchRamp
from meditron_train.data.index_file import bin_path
from meditron_train.data.indexed import IndexedDataset
from meditron_train.data.loader import StepLoader
from meditron_train.data.packed import GatherJob, PackedBatch, PackedDataset, build_train_dataset
from meditron_train.data.packing.batch_schedule import BatchSchedule
from meditron_train.data.sources import Source
from meditron_train.errors import UserError
from tests.data.test_packed import section, write
from tests.long import mostly_long

RAMP = BatchSchedule(8, BatchRamp(start=4, increment=4, samples=8))


@pytest.fixture
def dataset(tmp_path: Path) -> PackedDataset:
    lengths = np.random.default_rng(0).integers(1, 60, 80).tolist()
    return build_train_dataset(section([{"path": write(tmp_path / "a", lengths)}]), 32, None)


def take(loader: StepLoader, count: int) -> list[tuple[int, list[PackedBatch]]]:
    with loader:
        return list(islice(loader, count))


def tokens(batches: list[PackedBatch]) -> list[list[int]]:
    return [batch.tokens_T.tolist() for batch in batches]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_all_layouts_take_the_same_samples(dataset: PackedDataset, prefetch: int) -> None:
    for dp_size in (1, 2, 4):
        ranks = [
            take(StepLoader(dataset, RAMP, 1, rank, dp_size, prefetch=prefetch), 5) for rank in range(dp_size)
        ]
        for number in range(5):
            step = number + 1
            assert {rank[number][0] for rank in ranks} == {step}
            first = RAMP.samples_before(step)
            found = [
                ranks[rank][number][1][micro_batch].tokens_T.tolist()
                for micro_batch in range(RAMP.batch_size(step) // dp_size)
                for rank in range(dp_size)
            ]
            expected = [dataset.microbatch([first + i]) for i in range(RAMP.batch_size(step))]
            assert found == tokens(expected)


def test_micro_batch_size_cuts_the_same_samples(dataset: PackedDataset) -> None:
    loader = StepLoader(dataset, BatchSchedule(8), 2, dp_rank=1, dp_size=2, start_step=3)
    with loader:
        step, batches = next(loader)
    assert step == 3
    assert loader.sample_numbers(3).tolist() == [[18, 19], [22, 23]]
    assert tokens(batches) == tokens([dataset.microbatch(numbers) for numbers in loader.sample_numbers(3)])


def test_resuming_equals_going_on(dataset: PackedDataset) -> None:
    whole = take(StepLoader(dataset, RAMP, 2, 0, 2), 8)
    resumed = take(StepLoader(dataset, RAMP, 2, 0, 2, start_step=5), 4)
    for (step, batches), (resumed_step, resumed_batches) in zip(whole[4:], resumed, strict=True):
        assert step == resumed_step
        for batch, resumed_batch in zip(batches, resumed_batches, strict=True):
            for name in ("tokens_T", "labels_T", "loss_mask_T", "positions_T", "cu_seqlens"):
                assert torch.equal(getattr(batch, name), getattr(resumed_batch, name))


def test_error_while_preparing_is_raised(dataset: PackedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(numbers: np.ndarray, **options: bool) -> GatherJob:
        if 8 in numbers:
            raise UserError("sample 8")
        return job(numbers, **options)

    job = dataset.job
    monkeypatch.setattr(dataset, "job", fail)
    with StepLoader(dataset, BatchSchedule(4), 1) as loader:
        assert [next(loader)[0], next(loader)[0]] == [1, 2]
        with pytest.raises(UserError, match="sample 8"):
            next(loader)
        with pytest.raises(StopIteration):
            next(loader)


def test_a_bad_token_is_raised_by_its_step(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [32] * 40)
    content = np.fromfile(bin_path(prefix), dtype=np.uint16)
    content[32 * 11 + 7] = 60_000  # of document 11
    content.tofile(bin_path(prefix))
    source = Source("a", IndexedDataset(prefix), np.arange(40))
    dataset = PackedDataset([source], [(0, [1])], packing="best_fit", seq_len=32, seed=1, vocab_size=300)
    bad = next(number for number in range(40) if dataset.segments(number)[0].document == 11)
    for prefetch in (0, 1, 3):
        with StepLoader(dataset, BatchSchedule(4), 2, prefetch=prefetch) as loader:
            assert [next(loader)[0] for _ in range(bad // 4)] == [*range(1, bad // 4 + 1)]
            with pytest.raises(
                UserError, match=r"document 11 of data source 'a' .* token id 60000, .* 0\.\.299"
            ):
                next(loader)
            with pytest.raises(StopIteration):
                next(loader)


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux shows them")
def test_threads_end_with_the_loader(dataset: PackedDataset) -> None:
    before = num_threads()
    loader = StepLoader(dataset, BatchSchedule(4), 1)
    next(loader)
    assert num_threads() > before
    loader.close()
    loader.close()
    assert num_threads() == before
    assert list(loader) == []
    dropped = StepLoader(dataset, BatchSchedule(4), 1)
    next(dropped)
    del dropped
    assert num_threads() == before


def test_batches_outlive_the_loader_and_are_not_written_again(dataset: PackedDataset) -> None:
    expected = take(StepLoader(dataset, BatchSchedule(4), 2, prefetch=0), 12)
    copies = [(step, [batch.tokens_T.clone() for batch in batches]) for step, batches in expected]
    kept = take(StepLoader(dataset, BatchSchedule(4), 2, prefetch=3), 12)
    for (step, batches), (same_step, same) in zip(copies, kept, strict=True):
        assert step == same_step
        assert all(torch.equal(a, b.tokens_T) for a, b in zip(batches, same, strict=True))


def test_a_forked_child_neither_hangs_nor_gets_batches(dataset: PackedDataset) -> None:
    loader = StepLoader(dataset, BatchSchedule(4), 1)
    next(loader)
    child = os.fork()
    if child == 0:  # no assertion may leave the child by way of pytest
        code = 1
        try:
            next(loader)
        except RuntimeError as error:
            code = 0 if "forked child" in str(error) else 2
        loader.close()
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert next(loader)[0] == 2
    loader.close()


@pytest.mark.parametrize(
    "end",
    mostly_long(["", "raise SystemExit(0)", "import os; os.fork() or sys.exit(0)"], ""),
)
def test_the_interpreter_ends_with_a_loader_at_work(tmp_path: Path, end: str) -> None:
    prefix = write(tmp_path / "a", [500] * 400)
    program = f"""
import sys
import numpy as np
from meditron_train.data.packing.batch_schedule import BatchSchedule
from meditron_train.data.indexed import IndexedDataset
from meditron_train.data.index_file import bin_path
from meditron_train.data.indexed import IndexedDataset
from meditron_train.data.loader import StepLoader
from meditron_train.data.packed import PackedDataset
from meditron_train.data.sources import Source
source = Source("a", IndexedDataset({str(prefix)!r}), np.arange(400))
dataset = PackedDataset([source], [(0, [1])], packing="concat", seq_len=256, seed=1)
loader = StepLoader(dataset, BatchSchedule(512), 8, prefetch=4)
print(next(loader)[0], flush=True)
{end}
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
