"""Every CUDA source compiles with nvcc, without warnings, and no kernel keeps anything in local memory."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from tests.native.emulated import CSRC

NVCC = shutil.which("nvcc")
# By the first part of a source's name: which architectures it has kernels for.
ARCHITECTURES = {"sm80": ("80", "90a"), "sm90": ("90a",)}
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
COMPILED = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
LOCAL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc on the PATH: CUDA sources are not compiled here")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles_without_spills(source, tmp_path):
    architectures = ARCHITECTURES.get(source.name.split("_")[0])
    targets = [
        part
        for name in architectures or ARCHITECTURES["sm80"]
        for part in ("-gencode", f"arch=compute_{name},code=sm_{name}")
    ]
    command = [str(NVCC), "-std=c++17", "-O3", "-Werror", "all-warnings", "--threads", "2", *targets]
    done = subprocess.run(
        [*command, "-Xptxas", "-v", "-c", str(source), "-o", str(tmp_path / "object.o")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    kernels = COMPILED.findall(done.stderr)
    local = [tuple(map(int, found)) for found in LOCAL.findall(done.stderr)]
    assert len(kernels) == len(local)
    assert [kernel for kernel, numbers in zip(kernels, local, strict=True) if numbers != (0, 0, 0)] == []
    # ptxas says so where it waits for each product of a warpgroup, or puts in a fence that is missing.
    assert not re.search(r"\(C75\d\d\)|serialized", done.stderr), done.stderr
    assert {architecture for _, architecture in kernels} == {f"sm_{name}" for name in architectures or ()}
