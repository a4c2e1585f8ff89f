"""What is installed, built and reachable on this machine, what is in use, and what fixes the rest.

The facts come from the rooms that know them; only the wording is made here.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meditron_train.errors import MeditronError

_GIB = 2**30
_LEAST_DISK_GIB = 5
_LEAST_SHARED_MEMORY_GIB = 1
_LEAST_PYTHON = (3, 11)
_LEAST_TORCH = (2, 10)


@dataclass(frozen=True)
class Finding:
    """One line of the report. `remedy` is a command or a sentence; empty when nothing is to be done."""

    name: str
    found: bool
    in_use: bool
    detail: str
    remedy: str = ""
    required: bool = False

    @property
    def blocks_training(self) -> bool:
        return self.required and not self.in_use


def examine() -> list[Finding]:
    """All findings for this machine; runs would be written here, in the working directory."""
    return [
        _python(),
        _torch(),
        *_devices(),
        _megatron_core(),
        *_cpp_core(),
        _saving(),
        _apex(),
        _transformer_engine(),
        *_attention(),
        _slurm(),
        _launcher(),
        _host_name(),
        _space(
            "disk",
            Path.cwd(),
            _LEAST_DISK_GIB,
            "free some, or set logging.run_dir to another disk",
        ),
        _space(
            "/dev/shm",
            Path("/dev/shm"),
            _LEAST_SHARED_MEMORY_GIB,
            "in a container: docker run --ipc=host, or --shm-size=8g",
        ),
    ]


def _python() -> Finding:
    good = sys.version_info[:2] >= _LEAST_PYTHON
    return Finding(
        "python",
        True,
        good,
        f"{platform.python_version()} ({sys.executable})",
        "" if good else "install Python 3.11 or newer",
        required=True,
    )


def _torch() -> Finding:
    remedy = "pip install 'torch>=2.10'"
    torch, trouble = _import("torch")
    if torch is None:
        return Finding("torch", False, False, trouble, remedy, required=True)
    version = str(torch.__version__)
    good = _version_tuple(version) >= _LEAST_TORCH
    return Finding("torch", True, good, version, "" if good else remedy, required=True)


def _devices() -> list[Finding]:
    """CUDA and the two communication backends."""
    torch, trouble = _import("torch")
    if torch is None:
        return [Finding(name, False, False, trouble) for name in ("cuda", "nccl", "gloo")]
    distributed = torch.distributed
    available = torch.cuda.is_available()
    if available:
        names = sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
        cuda = Finding(
            "cuda", True, True, f"{torch.version.cuda}, {torch.cuda.device_count()} x {', '.join(names)}"
        )
    elif torch.version.cuda is None:
        has_driver = shutil.which("nvidia-smi") is not None
        cuda = Finding(
            "cuda",
            False,
            False,
            "this torch is built without CUDA; we train on the CPU",
            "install the CUDA build: https://pytorch.org/get-started/locally/" if has_driver else "",
        )
    else:
        cuda = Finding(
            "cuda",
            True,
            False,
            f"torch has CUDA {torch.version.cuda} but sees no GPU; we train on the CPU",
            "run nvidia-smi: it shows whether the driver works; look at CUDA_VISIBLE_DEVICES too",
        )
    has_nccl = distributed.is_available() and distributed.is_nccl_available()
    has_gloo = distributed.is_available() and distributed.is_gloo_available()
    unused = "" if available else "; used with GPUs only"
    return [
        cuda,
        Finding(
            "nccl",
            has_nccl,
            has_nccl and available,
            ("in torch" if has_nccl else "not in this torch") + unused,
            "" if has_nccl or not available else "install the CUDA build of torch",
            required=available,
        ),
        Finding(
            "gloo",
            has_gloo,
            has_gloo,
            "communication on the CPU" if has_gloo else "not in this torch",
            "" if has_gloo else "pip install --force-reinstall torch",
            required=not available,
        ),
    ]


def _megatron_core() -> Finding:
    from meditron_train.errors import UserError

    name = "megatron-core"
    remedy = "pip install 'megatron-core>=0.16,<0.17'"
    version = _installed_version(name)
    if version is None:
        return Finding(name, False, False, "not installed", remedy, required=True)
    try:
        mcore, trouble = _import("meditron_train.mcore")
    except UserError as error:  # a version that was not tested with us
        return Finding(name, True, False, str(error), remedy, required=True)
    if mcore is None:
        return Finding(name, True, False, f"{version} cannot be imported: {trouble}", remedy, required=True)
    return Finding(name, True, True, version, required=True)


def _saving() -> Finding:
    """What saving a checkpoint imports, part of it only in the process that writes."""
    from meditron_train.errors import UserError

    name, remedy = "saving checkpoints", "fix the import that is named here"
    for module in ("psutil", "torch.distributed.checkpoint", "meditron_train.train.saving.run_checkpoints"):
        try:
            _, trouble = _import(module)
        except UserError as error:  # of megatron-core, which has a line of its own
            trouble = str(error)
        if trouble:
            if module == "psutil":
                remedy = "pip install psutil"
            return Finding(name, False, False, f"{module}: {trouble}", remedy, required=True)
    return Finding(name, True, True, "all that it needs can be imported", required=True)


def _cpp_core() -> list[Finding]:
    """The two compiled modules."""
    packing, trouble = _import("meditron_train.native._packing")
    core = Finding(
        "C++ core",
        packing is not None,
        packing is not None,
        "packed data loading" if packing is not None else trouble,
        "" if packing is not None else "in the source directory: pip install -e . (needs a C++17 compiler)",
        required=True,
    )
    if packing is None or _import("torch")[0] is None:
        return [core]
    operators, trouble = _import("meditron_train.native.operators")
    trouble = trouble or operators.LOAD_ERROR or ""
    with_cuda = not trouble and operators.built_with_cuda()
    return [
        core,
        Finding(
            "C++ operators",
            not trouble,
            not trouble,
            trouble or f"fused attention; on this processor: {', '.join(operators.instruction_sets())}",
            "in the source directory: pip install -e . (attention is PyTorch's until then)"
            if trouble
            else "",
        ),
        Finding(
            "C++ operators, CUDA part",
            with_cuda,
            with_cuda and _import("torch")[0].cuda.is_available(),
            "built" if with_cuda else "not built",
            ""
            if with_cuda
            else "for a GPU: with nvcc on PATH and a CUDA build of torch, pip install -e . again",
        ),
    ]


def _attention() -> list[Finding]:
    """Who can compute attention here, for bf16 heads of 128, and who does under `train.attention: auto`."""
    torch, _ = _import("torch")
    backends, _ = _import("meditron_train.native.backends")
    if torch is None or backends is None:
        return []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def why_not(backend: Any) -> str | None:
        try:
            return backends.why_not(backend, device, torch.bfloat16, 128)
        except (MeditronError, torch.OutOfMemoryError) as error:
            return str(error).partition("\n")[0]

    reasons = {name: why_not(backend) for name, backend in backends.BACKENDS.items()}
    chosen = next(name for name, reason in reasons.items() if reason is None)
    findings = []
    for name, reason in reasons.items():
        detail = reason or ("used" if name == chosen else f"could be used; {chosen} comes first")
        findings.append(
            Finding(f"attention: {name}", reason is None, name == chosen, f"on {device.type}: {detail}")
        )
    return findings


def _apex() -> Finding:
    """NVIDIA's apex brings amp_C; the package of that name on PyPI is a web toolkit."""
    name, fallback = (
        "apex",
        "not needed: our Adam runs on torch's fused kernel, our RMSNorm on our own kernel",
    )
    if importlib.util.find_spec("apex") is None:
        return Finding(name, False, False, fallback)
    if importlib.util.find_spec("amp_C") is None or importlib.util.find_spec("apex.optimizers") is None:
        impostor = "the installed package apex is not NVIDIA's, and programs that probe for apex trip over it"
        return Finding(name, True, False, impostor, "pip uninstall apex")
    if importlib.util.find_spec("transformer_engine") is not None:
        return Finding(name, True, False, f"NVIDIA's; megatron-core prefers Transformer Engine; {fallback}")
    return Finding(
        name, True, True, f"NVIDIA's; megatron-core scales gradients with it; otherwise {fallback}"
    )


def _transformer_engine() -> Finding:
    """Of use on a GPU only, so nothing is advised without one."""
    name, fallback = "transformer-engine", "matrix products, norms and attention are torch's and ours"
    if importlib.util.find_spec("transformer_engine") is None:
        torch, _ = _import("torch")
        has_gpu = torch is not None and torch.cuda.is_available()
        remedy = (
            "optional, faster gradient norms: pip install --no-build-isolation 'transformer-engine[pytorch]'"
        )
        return Finding(name, False, False, f"not installed; {fallback}", remedy if has_gpu else "")
    module, trouble = _import("transformer_engine.pytorch")
    version = _installed_version(name) or "unknown version"
    if module is None:
        broken = f"{version} cannot be imported ({trouble}); {fallback}"
        return Finding(name, True, False, broken, "pip uninstall transformer-engine, or reinstall it")
    return Finding(name, True, True, f"{version}; megatron-core scales gradients with it; {fallback}")


def _slurm() -> Finding:
    from meditron_train.launcher.environment import slurm_tools

    tools = slurm_tools()
    present = {name: where for name, where in tools.items() if where}
    if not present:
        return Finding("slurm", False, False, "no sbatch, srun or sinfo on PATH; torchrun works without it")
    missing = [name for name in tools if name not in present]
    return Finding(
        "slurm",
        not missing,
        not missing,
        ", ".join(present.values()) + (f"; missing: {', '.join(missing)}" if missing else ""),
        "install Slurm's client commands, or load the cluster's slurm module" if missing else "",
    )


def _launcher() -> Finding:
    from meditron_train.errors import UserError
    from meditron_train.launcher.environment import detect_launcher

    try:
        found = detect_launcher()
    except UserError as error:
        return Finding("launcher", True, False, str(error), "unset these variables", required=True)
    return Finding(
        "launcher", True, True, f"{found.kind}: rank {found.rank} of {found.world_size}", required=True
    )


def _host_name() -> Finding:
    """torchrun meets under this name; where it is unknown, it waits without a word before it starts any rank."""
    name = socket.getfqdn()
    try:
        socket.getaddrinfo(name, None)
    except (OSError, UnicodeError) as error:
        remedy = "torchrun would wait for ever: train --processes N, or torchrun --local-addr 127.0.0.1"
        return Finding("host name", True, False, f"{name} cannot be resolved ({error})", remedy)
    return Finding("host name", True, True, name)


def _space(name: str, path: Path, least_gib: int, remedy: str) -> Finding:
    """Free space; too little is a warning, since how much a run needs depends on the run."""
    try:
        free_gib = shutil.disk_usage(path).free / _GIB
        writable = os.access(path, os.W_OK)
    except OSError as error:
        return Finding(name, False, False, str(error), remedy)
    enough = writable and free_gib >= least_gib
    detail = f"{free_gib:.1f} GiB free in {path}" + ("" if writable else ", not writable")
    return Finding(name, True, enough, detail, "" if enough else remedy)


def _import(name: str) -> tuple[Any, str]:
    """The module and "", or None and why it cannot be imported. UserErrors (a version we refuse) pass."""
    from meditron_train.errors import UserError

    try:
        return importlib.import_module(name), ""
    except UserError:
        raise
    except ModuleNotFoundError as error:
        return None, "not installed" if error.name == name else str(error)
    except Exception as error:  # a broken binary may raise anything, and saying so is this command's job
        return None, f"{type(error).__name__}: {error}"


def _installed_version(distribution: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _version_tuple(version: str) -> tuple[int, int]:
    """Major and minor number; a pre-release such as 2.14.0a0 or 2.6a0 counts as its release."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
