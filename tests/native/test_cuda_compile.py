"""The extension with its CUDA part: every kernel compiles with nvcc without warnings and keeps nothing in local memory,
and the one library that results works where there is no GPU, no driver and no CUDA in torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURES = {"sm_80", "sm_90a"}
COMPILED = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
LOCAL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        shutil.which("nvcc") is None,
        reason="there is no nvcc on the PATH: CUDA sources are not compiled here",
    ),
]


@dataclass(frozen=True)
class Build:
    """What the compilers said, and what they made."""

    log: str
    library: Path


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Build:
    """setup.py's own build, as `MEDITRON_CUDA=1 pip install .` runs it, into a temporary folder."""
    folder = tmp_path_factory.mktemp("cuda")
    environment = {
        **os.environ,
        "MEDITRON_CUDA": "1",
        "MEDITRON_CUDA_ARCHS": "80;90a",
        "MEDITRON_WERROR": "1",
        "NVCC_APPEND_FLAGS": "-Xptxas -v -Werror all-warnings",
    }
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        str(folder),
        "--build-temp",
        str(folder / "temp"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return Build(done.stdout + done.stderr, folder / "meditron_train/native/_operators.abi3.so")


@pytest.mark.timeout(1200)
def test_no_kernel_spills(build):
    kernels = COMPILED.findall(build.log)
    local = [tuple(map(int, found)) for found in LOCAL.findall(build.log)]
    assert kernels and len(kernels) == len(local)
    assert [kernel for kernel, numbers in zip(kernels, local, strict=True) if numbers != (0, 0, 0)] == []
    assert {architecture for _, architecture in kernels} == ARCHITECTURES
    # One that two files compile, for different GPUs, may be missing on some: the linker keeps one.
    assert sorted(set(kernels)) == sorted(kernels)
    # ptxas says so where it waits for each product of a warpgroup, or puts in a fence that is missing.
    assert not re.search(r"\(C75\d\d\)|serialized", build.log)


def test_needs_no_cuda_library(build):
    """The CUDA runtime is inside, the driver is looked up at run time."""
    needed = subprocess.run(
        ["readelf", "-d", str(build.library)], capture_output=True, text=True, check=True
    ).stdout
    libraries = re.findall(r"NEEDED.*\[(.*)\]", needed)
    assert "libtorch_cpu.so" in libraries
    assert not [name for name in libraries if "cuda" in name or "cudart" in name]


def test_works_without_a_gpu(build):
    script = f"""
import torch
torch.ops.load_library({str(build.library)!r})
operators = torch.ops.meditron
q, k, v = torch.randn(3, 10, 2, 64)
cu_seqlens = torch.tensor([0, 4, 10])
out, _ = operators.packed_attention(q, k, v, cu_seqlens, cu_seqlens, None, None, None, None, 0.125, 0, None)
torch.testing.assert_close(out[0], v[0])  # the first token sees itself alone
print(operators.built_with_cuda())
"""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
