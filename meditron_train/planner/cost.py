"""What a run costs: time, GPU-hours, energy and CO2.

energy [kWh] = GPU-hours x power of a GPU [kW] x PUE; CO2 [kg] = energy x carbon intensity of the grid [kg/kWh]. The
power is the board's limit: an upper bound, as Chen et al. 2023 (arXiv 2311.16079, section 5) count it. The PUE (power
usage effectiveness) is what the data center draws over what its computers draw.
"""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_PUE = 1.2
DEFAULT_CARBON_KG_PER_KWH = 0.4


@dataclass(frozen=True)
class RunCost:
    """Of a whole run on `num_gpus` GPUs."""

    seconds: float
    num_gpus: int
    power_w: float
    pue: float = DEFAULT_PUE
    carbon_kg_per_kwh: float = DEFAULT_CARBON_KG_PER_KWH

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.num_gpus / 3600

    @property
    def energy_kwh(self) -> float:
        return self.gpu_hours * self.power_w / 1000 * self.pue

    @property
    def co2_kg(self) -> float:
        return self.energy_kwh * self.carbon_kg_per_kwh
