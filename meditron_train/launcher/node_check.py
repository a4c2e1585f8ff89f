"""Is this node fit to train? What one node finds out by itself, in seconds, before any rank starts.

GPU count and health come from nvidia-smi (a driver tool, so a GPU that torch cannot open is still seen); where there is
none, the node trains on its CPU and only the rest is checked.
"""

from __future__ import annotations

import enum
import hashlib
import importlib.metadata
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import meditron_train

_GIB = 2**30
_LEAST_DISK_GIB = 5
# NCCL's and torch's queues between the processes of a node; gloo needs next to nothing.
_LEAST_SHARED_MEMORY_GIB = {"gpu": 1.0, "cpu": 1 / 16}
_NVIDIA_SMI_TIMEOUT_S = 20
_PACKAGES = ("torch", "megatron-core", "numpy", "safetensors", "transformers")

# nvidia-smi's field → what a value other than a good one means. Fields that a driver does not know are left out.
_HEALTH = {
    "ecc.errors.uncorrected.volatile.total": ("0", "uncorrected memory errors since the driver started"),
    "retired_pages.pending": ("No", "memory pages wait to be retired: the GPU needs a reset"),
    "remapped_rows.pending": ("0", "memory rows wait to be remapped: the GPU needs a reset"),
    "remapped_rows.failure": ("0", "memory rows that cannot be remapped any more"),
    "clocks_throttle_reasons.hw_thermal_slowdown": ("Not Active", "throttled: too hot"),
    "clocks_throttle_reasons.hw_power_brake_slowdown": ("Not Active", "throttled: power brake"),
}
_UNKNOWN = ("", "[N/A]", "N/A", "[Not Supported]", "[Unknown Error]")


class ProblemKind(enum.StrEnum):
    """What is wrong, as data: nodes' problems are compared by it, never by their words."""

    DRIVER = "driver"
    GPU = "gpu"
    GPU_COUNT = "gpu_count"
    COMPUTE = "compute"
    SHARED_MEMORY = "shared_memory"
    MISSING_FILE = "missing_file"
    """A file that the configuration names."""
    DISK_SPACE = "disk_space"
    NOT_WRITABLE = "not_writable"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `text` is for people; `subject` tells things of one kind apart (a GPU's index)."""

    kind: ProblemKind
    text: str
    subject: str = ""

    def is_like(self, other: Problem) -> bool:
        """Whether two nodes have the same problem, whatever words and numbers each has for it."""
        return (self.kind, self.subject) == (other.kind, other.subject)


@dataclass(frozen=True)
class NodeFacts:
    """What a node reports to the others. Problems alone make it unfit; the rest is for comparing nodes.

    Attributes:
        problems: what is wrong with the node itself.
        file_problems: what is wrong with the run's files as the node sees them: they may be the same on all nodes.
        gpu: name of its GPUs, or None on a CPU node.
        matmul_tflops: dense matrix products of the slowest GPU (bf16), or of one process on the CPU (fp32).
        local_bandwidth_gb_s: all-reduce over the node's GPUs, bus bandwidth in GB/s; None below two GPUs.
        versions: what must be the same everywhere: Python, packages, driver, and the hash of our own code.
    """

    node: str
    num_gpus: int = 0
    gpu: str | None = None
    matmul_tflops: float | None = None
    local_bandwidth_gb_s: float | None = None
    free_disk_gib: float = 0.0
    shared_memory_gib: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    file_problems: tuple[Problem, ...] = ()

    @property
    def all_problems(self) -> tuple[Problem, ...]:
        return self.problems + self.file_problems

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> NodeFacts:
        tuples = {
            name: tuple(
                Problem(ProblemKind(one["kind"]), one["text"], one["subject"]) for one in values[name]
            )
            for name in ("problems", "file_problems")
        }
        return cls(**{**values, **tuples})


def examine_node(node: str, run_dir: Path, *, num_ranks: int, missing_files: Sequence[str] = ()) -> NodeFacts:
    """Examine this node for a run of `num_ranks` ranks on it that writes to `run_dir`."""
    problems: list[Problem] = []
    file_problems = [Problem(ProblemKind.MISSING_FILE, text) for text in missing_files]
    gpus, driver = gpu_health(problems)
    if gpus and len(gpus) < num_ranks:
        text = f"{num_ranks} ranks are to run here, but there are {len(gpus)} GPUs"
        problems.append(Problem(ProblemKind.GPU_COUNT, text))
    free_disk_gib = _free_gib(run_dir, file_problems)
    shared_memory_gib = shutil.disk_usage("/dev/shm").free / _GIB
    least = _LEAST_SHARED_MEMORY_GIB["gpu" if gpus else "cpu"]
    if shared_memory_gib < least:
        text = f"{shared_memory_gib * 1024:.0f} MiB of /dev/shm are free, {least * 1024:.0f} are needed"
        problems.append(Problem(ProblemKind.SHARED_MEMORY, text))
    matmul_tflops, local_bandwidth_gb_s = None, None
    try:
        matmul_tflops, local_bandwidth_gb_s = measure_speed(len(gpus))
    except Exception as error:  # whatever a broken GPU or driver raises
        text = f"a matrix product failed: {(str(error) or type(error).__name__).splitlines()[0]}"
        problems.append(Problem(ProblemKind.COMPUTE, text))
    return NodeFacts(
        node=node,
        num_gpus=len(gpus),
        gpu=gpus[0] if gpus else None,
        matmul_tflops=matmul_tflops,
        local_bandwidth_gb_s=local_bandwidth_gb_s,
        free_disk_gib=free_disk_gib,
        shared_memory_gib=shared_memory_gib,
        versions={**package_versions(), **({"driver": driver} if driver else {}), "our code": code_hash()},
        problems=tuple(problems),
        file_problems=tuple(file_problems),
    )


def gpu_health(problems: list[Problem]) -> tuple[list[str], str | None]:
    """(names of the GPUs, driver version); what is wrong with one is added to `problems`.

    No GPU and no problem where there is no nvidia-smi.
    """
    if shutil.which("nvidia-smi") is None:
        return [], None
    known = _known_fields()
    fields = ["index", "name", "driver_version", *(name for name in _HEALTH if name in known)]
    try:
        text = _nvidia_smi(f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stdout", None) or str(error)
        problems.append(Problem(ProblemKind.DRIVER, f"nvidia-smi failed: {output.strip().splitlines()[0]}"))
        return [], None
    names, driver = [], None
    for line in text.splitlines():
        values = dict(zip(fields, (value.strip() for value in line.split(",")), strict=False))
        if "name" not in values:
            continue
        names.append(values["name"])
        driver = values.get("driver_version")
        for key, (good, meaning) in _HEALTH.items():
            value = values.get(key, "")
            if value not in (good, *_UNKNOWN):
                text = f"GPU {values['index']}: {meaning} ({key} = {value})"
                problems.append(Problem(ProblemKind.GPU, text, f"{values['index']} {key}"))
    if not names:
        problems.append(Problem(ProblemKind.DRIVER, "nvidia-smi is here but lists no GPU"))
    return names, driver


def _known_fields() -> set[str]:
    try:
        text = _nvidia_smi("--help-query-gpu")
    except (OSError, subprocess.SubprocessError):
        return set()
    return {name for name in _HEALTH if f'"{name}"' in text}


def _nvidia_smi(*arguments: str) -> str:
    return subprocess.run(
        ["nvidia-smi", *arguments], capture_output=True, text=True, check=True, timeout=_NVIDIA_SMI_TIMEOUT_S
    ).stdout


def measure_speed(num_gpus: int) -> tuple[float, float | None]:
    """(TFLOP/s of a dense matrix product on the slowest GPU or the CPU, GB/s of an all-reduce over the GPUs).

    One process drives all GPUs of the node, so that a GPU that hangs costs this check its time limit and no more.
    """
    import torch

    if num_gpus == 0:
        return _matmul_tflops(torch.device("cpu"), size=512, dtype=torch.float32, repeats=4), None
    slowest = min(
        _matmul_tflops(torch.device("cuda", i), size=8192, dtype=torch.bfloat16, repeats=20)
        for i in range(num_gpus)
    )
    return slowest, _local_bandwidth_gb_s(num_gpus) if num_gpus > 1 else None


def _matmul_tflops(device: Any, *, size: int, dtype: Any, repeats: int) -> float:
    import torch

    a = torch.randn(size, size, dtype=dtype, device=device)
    product = a @ a  # warm-up: libraries load, clocks rise
    _synchronize(device)
    start = time.monotonic()
    for _ in range(repeats):
        product = a @ a
    _synchronize(device)
    seconds = time.monotonic() - start
    if not bool(torch.isfinite(product).all()):
        raise RuntimeError(f"a matrix product on {device} is not finite")
    return 2 * size**3 * repeats / seconds / 1e12


def _local_bandwidth_gb_s(num_gpus: int, num_bytes: int = 2**28, repeats: int = 10) -> float:
    """Bus bandwidth 2(n-1)/n · bytes/s, as nccl-tests counts it."""
    import torch
    from torch.cuda import nccl

    buffers = [torch.ones(num_bytes // 4, device=torch.device("cuda", i)) for i in range(num_gpus)]
    nccl.all_reduce(buffers)
    for buffer in buffers:
        _synchronize(buffer.device)
        if float(buffer[0]) != num_gpus:
            raise RuntimeError(
                f"the all-reduce over {num_gpus} GPUs gave {float(buffer[0])} on {buffer.device}"
            )
    start = time.monotonic()
    for _ in range(repeats):
        nccl.all_reduce(buffers)
    for buffer in buffers:
        _synchronize(buffer.device)
    return 2 * (num_gpus - 1) / num_gpus * num_bytes * repeats / (time.monotonic() - start) / 1e9


def _synchronize(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def package_versions() -> dict[str, str]:
    """Versions that must be the same on all nodes, "missing" where a package is not installed."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "missing"
    return versions


def code_hash() -> str:
    """Hash of every file of our package, compiled parts included, as this node sees them."""
    root = Path(meditron_train.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.suffix in (".py", ".so", ".yaml") and path.is_file():
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _free_gib(run_dir: Path, problems: list[Problem]) -> float:
    """Free space where `run_dir` is or will be made; a test file proves that this node may write there."""
    path = run_dir
    try:
        while not path.exists() and path != path.parent:
            path = path.parent
        free_gib = shutil.disk_usage(path).free / _GIB
        if free_gib < _LEAST_DISK_GIB:
            text = f"less than {_LEAST_DISK_GIB} GiB of disk are free at {run_dir}"
            problems.append(Problem(ProblemKind.DISK_SPACE, text))
        # A name of its own: a job that another job's pre-flight meets on this node must not lose its probe to it.
        with tempfile.NamedTemporaryFile("w", prefix=f".preflight-{platform.node()}-", dir=path) as probe:
            probe.write("can this node write here?\n")
    except OSError as error:
        problems.append(Problem(ProblemKind.NOT_WRITABLE, f"cannot write to {path}: {error.strerror}"))
        return 0.0
    return free_gib
