"""The energy that this rank's GPU has used, by the counter that NVIDIA's driver keeps (NVML)."""

from __future__ import annotations

from typing import Any

import torch

from meditron_train.log import get_logger

_log = get_logger(__name__)


class EnergyCounter:
    """Joules since the last reading. Without a GPU, the package nvidia-ml-py or such a counter (before Volta): none.

    The counter is the whole board's: what other programs on it use counts as well.
    """

    def __init__(self, device: torch.device) -> None:
        self._nvml: Any = None
        if device.type != "cuda":
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self._last_mj = pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
            self._nvml = pynvml
        except (ImportError, AttributeError) as error:
            _log.info("the energy of the GPU is not measured: %s (pip install nvidia-ml-py)", error)
        except Exception as error:  # NVML's own: no permission, no such counter, another driver
            _log.info("the energy of the GPU is not measured: %s", error)

    def read(self) -> float | None:
        """Joules since the last reading or the start; None where nothing counts them."""
        if self._nvml is None:
            return None
        try:
            now_mj = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except Exception as error:  # as above; a GPU may also be lost
            _log.warning("the energy of the GPU is not measured any more: %s", error)
            self._nvml = None
            return None
        used_mj, self._last_mj = now_mj - self._last_mj, now_mj
        return max(0, used_mj) / 1000  # a driver that is loaded again counts from 0
