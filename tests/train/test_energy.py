from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from meditron_train.train.energy import EnergyCounter

GPU = torch.device("cuda", 0)


class Counter(SimpleNamespace):
    """NVML with one GPU, whose counter is in millijoules."""

    def __init__(self) -> None:
        super().__init__(millijoules=5_000_000, is_lost=False)

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        assert uuid == "GPU-1234"
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        assert handle == "handle"
        if self.is_lost:
            raise RuntimeError("GPU is lost")
        return self.millijoules


@pytest.fixture
def nvml(monkeypatch):
    counter = Counter()
    monkeypatch.setitem(sys.modules, "pynvml", counter)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    return counter


def test_joules_since_the_last_reading(nvml):
    counter = EnergyCounter(GPU)
    assert counter.read() == 0.0
    nvml.millijoules += 2_500
    assert counter.read() == 2.5
    nvml.millijoules = 0  # the driver was loaded again
    assert counter.read() == 0.0
    nvml.millijoules = 1_000
    assert counter.read() == 1.0


def test_what_cannot_be_read_ends_no_training(nvml, monkeypatch):
    counter = EnergyCounter(GPU)
    nvml.is_lost = True
    assert counter.read() is None and counter.read() is None
    assert EnergyCounter(GPU).read() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert EnergyCounter(GPU).read() is None
    assert EnergyCounter(torch.device("cpu")).read() is None
