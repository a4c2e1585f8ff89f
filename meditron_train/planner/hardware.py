"""What accelerators and nodes can do: the table that plans are made from, and how a user extends it.

Sources: NVIDIA's data sheets of the A100 40GB and 80GB SXM (DA-10031), H100 SXM (2023) and H200 SXM (2024): dense
peaks, HBM bandwidth, NVLink per direction, board power. A node has eight GPUs and, unless a file says otherwise, one
network adapter for each GPU (DGX A100: 200 Gb/s, DGX H100: 400 Gb/s).

The efficiencies are shares of the peaks that large operations reach; they are not data-sheet values. They were chosen
once so that the published runs of docs/guides/planning.md are met (`tests/benchmarks/test_planning.py`), close to what
SimuMax (Moore Threads) publishes of single kernels: 0.70 to 0.75 for large matrix products on an A100, three quarters
of the HBM bandwidth on an A100 PCIe and two thirds on a B200, 9 us of latency and 23 us of fixed cost for an all-gather
on a B200. `plan --calibrate RUN` scales all to a run's own speed.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from meditron_train.config.yaml_file import read_yaml
from meditron_train.errors import UserError

_GIB = 2**30
_MOST = 1e30  # more than any value of a table like this


@dataclass(frozen=True)
class Hardware:
    """One kind of accelerator in its node. Speeds in FLOP/s and bytes/s; links count one direction.

    Attributes:
        memory_bytes: what the driver reports, a little less than the name says.
        network_bytes_per_second: of a whole node.
        latency_s: what a collective takes for each of its members before it moves its bytes.
    """

    name: str
    memory_bytes: int
    bf16_flops: float
    fp32_flops: float
    memory_bytes_per_second: float
    nvlink_bytes_per_second: float
    network_bytes_per_second: float
    power_w: float
    gpus_per_node: int = 8
    matmul_efficiency: float = 0.7
    attention_efficiency: float = 0.45
    link_efficiency: float = 0.75
    memory_efficiency: float = 0.7
    latency_s: float = 10e-6

    def flops(self, precision: str) -> float:
        """Dense peak. fp32 is that of the CUDA cores: torch does not use TF32 by default."""
        return self.bf16_flops if precision == "bf16" else self.fp32_flops


HARDWARE: dict[str, Hardware] = {
    hardware.name: hardware
    for hardware in (
        Hardware("a100-40gb", round(39.4 * _GIB), 312e12, 19.5e12, 1.555e12, 300e9, 8 * 25e9, 400),
        Hardware("a100-80gb", round(79.1 * _GIB), 312e12, 19.5e12, 2.04e12, 300e9, 8 * 25e9, 400),
        Hardware("h100-80gb", round(79.1 * _GIB), 989e12, 67e12, 3.35e12, 450e9, 8 * 50e9, 700),
        Hardware("h200-141gb", round(139.8 * _GIB), 989e12, 67e12, 4.8e12, 450e9, 8 * 50e9, 700),
        # A rank of a common CPU: to be calibrated by a run, as no data sheet says it.
        Hardware("cpu", 16 * _GIB, 1e11, 1e11, 2e10, 5e9, 1e9, 100),
    )
}

_KEYS = {field.name for field in fields(Hardware)} - {"name"}


def find_hardware(name: str, extension: Path | None = None) -> Hardware:
    """The accelerator of that name.

    Args:
        name: known, or in `extension`.
        extension: a YAML file of further ones, see `read_hardware`.

    Raises:
        UserError: the name is unknown; names the nearest known one.
    """
    known = {**HARDWARE, **(read_hardware(extension) if extension else {})}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UserError(
        f"the GPU {name!r} is unknown.{hint} Known are {', '.join(known)}; add one in a YAML file and give it with "
        "--hardware (docs/guides/planning.md)"
    )


def read_hardware(path: Path) -> dict[str, Hardware]:
    """A YAML file of `NAME: {like: KNOWN_NAME, key: value, …}`: a known accelerator with some values replaced.

    Raises:
        UserError: the file is something else, a key is unknown, or a value is not a positive number.
    """
    content = read_yaml(path, example="my-a100: {like: a100-80gb, power_w: 300}")
    found: dict[str, Hardware] = {}
    for name, values in content.items():
        found[str(name)] = _one(path, str(name), values, {**HARDWARE, **found})
    return found


def _one(path: Path, name: str, values: Any, known: dict[str, Hardware]) -> Hardware:
    if not isinstance(values, dict) or str(values.get("like")) not in known:
        raise UserError(f"{path}: {name} needs `like:` with one of {', '.join(known)}")
    changes = {key: value for key, value in values.items() if key != "like"}
    for key, value in changes.items():
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, n=1)
            raise UserError(f"{path}: {name}.{key} is unknown{f'; did you mean {near[0]}?' if near else ''}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _MOST:
            raise UserError(f"{path}: {name}.{key} is {value!r}; it must be a positive number")
    for key in ("memory_bytes", "gpus_per_node"):
        if key in changes:
            changes[key] = int(changes[key])
    return replace(known[values["like"]], name=name, **changes)
