from __future__ import annotations

import pytest
import torch

from meditron_train.errors import UserError
from meditron_train.parallel.mesh import choose_device


@pytest.fixture
def see_gpus(monkeypatch):
    def see(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return see


def test_each_local_rank_has_its_gpu(see_gpus):
    see_gpus(4)
    assert [choose_device("auto", rank).index for rank in range(4)] == [0, 1, 2, 3]
    with pytest.raises(UserError, match="local rank 4 has no GPU of its own"):
        choose_device("auto", 4)


def test_a_task_that_is_shown_its_own_gpu_only(see_gpus):
    see_gpus(1)
    assert choose_device("auto", 3, one_gpu_per_task=True) == torch.device("cuda", 0)
    with pytest.raises(UserError, match="local rank 3"):
        choose_device("auto", 3)


def test_without_a_gpu(see_gpus):
    see_gpus(0)
    assert choose_device("auto", 0) == torch.device("cpu")
    with pytest.raises(UserError, match="sees no GPU"):
        choose_device("cuda", 0)
