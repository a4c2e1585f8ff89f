from __future__ import annotations

import threading
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from meditron_train.data.batch_schedule import BatchSchedule
from meditron_train.data.loader import StepLoader
from meditron_train.data.packed import PackedBatch, PackedDataset, build_train_dataset
from meditron_train.errors import UserError
from tests.data.test_packed import section, write

RAMP = BatchSchedule(8, SimpleNamespace(start=4, increment=4, samples=8))


@pytest.fixture
def dataset(tmp_path: Path) -> PackedDataset:
    lengths = np.random.default_rng(0).integers(1, 60, 80).tolist()
    return build_train_dataset(section([{"path": write(tmp_path / "a", lengths)}]), 32)


def take(loader: StepLoader, count: int) -> list[tuple[int, list[PackedBatch]]]:
    with loader:
        return list(islice(loader, count))


def tokens(batches: list[PackedBatch]) -> list[list[int]]:
    return [batch.tokens_T.tolist() for batch in batches]


@pytest.mark.parametrize("num_prefetch_steps", [0, 2])
def test_all_layouts_take_the_same_samples(dataset: PackedDataset, num_prefetch_steps: int) -> None:
    for dp_size in (1, 2, 4):
        ranks = [
            take(StepLoader(dataset, RAMP, 1, rank, dp_size, num_prefetch_steps=num_prefetch_steps), 5)
            for rank in range(dp_size)
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
    assert loader.sample_numbers(3) == [[18, 19], [22, 23]]
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
    def fail(numbers: list[int]) -> PackedBatch:
        if 8 in numbers:
            raise UserError("sample 8")
        return microbatch(numbers)

    microbatch = dataset.microbatch
    monkeypatch.setattr(dataset, "microbatch", fail)
    with StepLoader(dataset, BatchSchedule(4), 1) as loader:
        assert [next(loader)[0], next(loader)[0]] == [1, 2]
        with pytest.raises(UserError, match="sample 8"):
            next(loader)
        with pytest.raises(StopIteration):
            next(loader)


def test_close_ends_the_thread(dataset: PackedDataset) -> None:
    before = threading.active_count()
    loader = StepLoader(dataset, BatchSchedule(4), 1)
    next(loader)
    assert threading.active_count() == before + 1
    loader.close()
    loader.close()
    assert threading.active_count() == before
    assert list(loader) == []


def test_bad_values(dataset: PackedDataset) -> None:
    with pytest.raises(UserError, match=r"4 samples .* 2 data-parallel ranks in micro-batches of 4"):
        StepLoader(dataset, RAMP, 4, 0, 2)
    for arguments in ((0, 0, 1), (1, 1, 1), (1, -1, 1), (1, 0, 1, 0), (1, 0, 1, 1, -1)):
        with pytest.raises(ValueError, match="do not describe"):
            StepLoader(dataset, BatchSchedule(8), *arguments)
