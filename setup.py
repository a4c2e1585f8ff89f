"""Builds the C++/CUDA core. Everything else about the package is in pyproject.toml.

Two extensions: `_packing` (pybind11: data loading) and `_operators` (torch operators through LibTorch's stable ABI,
so that one binary serves every torch from 2.10 on). Environment variables:

MEDITRON_CUDA        auto (default): CUDA code is built where nvcc is found and the installed torch is a CUDA
                     build; 0: never; 1: always, an error without nvcc.
MEDITRON_CUDA_ARCHS  for nvcc, default "80;90a;90+PTX".
MEDITRON_BUILD_JOBS  compilers at a time, default 2.
MEDITRON_WERROR      1: warnings are errors (continuous integration).
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
WARNINGS = ["-Wall", "-Wextra"] + (["-Werror"] if os.environ.get("MEDITRON_WERROR") == "1" else [])
TORCH_TARGET = "0x020a000000000000"  # 2.10: the oldest torch whose stable ABI has all that ops.cpp uses

# No -march=native: the wheel must run on every processor of its architecture. Files that are compiled for one
# instruction set say so in a line of their own; csrc/cpu/instruction_sets.h looks which of them the processor has.
COMPILE_WITH = re.compile(r"^// compile with: (.*)$", re.MULTILINE)


def sources(folder: str, pattern: str = "*.cpp") -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / folder).glob(pattern))


def torch_folder() -> Path | None:
    """The torch of the environment that is installed into, also from pip's isolated build environment."""
    for place in [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *sys.path]:
        folder = Path(place) / "torch"
        if (folder / "include/torch/csrc/stable/library.h").is_file():
            return folder
    return None


def wants_cuda(torch: Path | None) -> bool:
    """Decide by MEDITRON_CUDA, and say why."""
    wish = os.environ.get("MEDITRON_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"MEDITRON_CUDA={wish!r} is not one of auto, 0, 1.")
    has_nvcc = shutil.which("nvcc") is not None
    if wish == "1" and not has_nvcc:
        raise SystemExit(
            "MEDITRON_CUDA=1 asks for CUDA code, but nvcc is not on PATH: install the CUDA toolkit, or use auto or 0."
        )
    torch_version = (torch / "version.py").read_text() if torch else ""
    cuda_torch = re.search(r"^cuda\b.*= '", torch_version, re.MULTILINE) is not None
    wanted = wish == "1" or (wish == "auto" and has_nvcc and cuda_torch)
    reason = {
        "0": "switched off by MEDITRON_CUDA=0",
        "1": "asked for by MEDITRON_CUDA=1",
        "auto": f"nvcc {'found' if has_nvcc else 'not found'}, torch {'with' if cuda_torch else 'without'} CUDA",
    }[wish]
    print(f"meditron-train: CUDA code is {'' if wanted else 'not '}built ({reason}).")
    return wanted


def nvcc_flags(source: str) -> list[str]:
    """Kernels of sm90_*.cu use what only 90a has, and are compiled for nothing else."""
    archs = os.environ.get("MEDITRON_CUDA_ARCHS", "80;90a;90+PTX").replace(",", ";").split(";")
    if os.path.basename(source).startswith("sm90_"):
        archs = ["90a"]
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-cudart=static", "-Xcompiler", "-fPIC"]
    for arch in archs:
        number = arch.removesuffix("+PTX")
        code = f"compute_{number}" if arch.endswith("+PTX") else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


def static_cudart() -> str:
    """The folder of libcudart_static.a; nvcc may be a wrapper elsewhere, so it is asked."""
    plan = subprocess.run(
        ["nvcc", "--dryrun", "-cudart=static", "x.cu"], capture_output=True, text=True
    ).stderr
    for folder in re.findall(r'-L"?([^"\s]+)', plan):
        if (Path(folder) / "libcudart_static.a").is_file():
            return folder
    raise SystemExit("nvcc does not say where libcudart_static.a is: is the CUDA toolkit complete?")


class BuildCore(build_ext):
    """Gives each file its own compiler flags, and .cu files to nvcc."""

    def build_extensions(self) -> None:
        compile_one = self.compiler._compile

        def compile_file(obj, source, extension, cc_args, extra_postargs, pp_opts):  # type: ignore[no-untyped-def]
            if source.endswith(".cu"):
                self.spawn(["nvcc", *nvcc_flags(source), *pp_opts, "-c", source, "-o", obj])
                return
            if own_flags := COMPILE_WITH.search(Path(source).read_text()):
                extra_postargs = [*extra_postargs, *own_flags[1].split()]
            compile_one(obj, source, extension, cc_args, extra_postargs, pp_opts)

        self.compiler.src_extensions.append(".cu")
        self.compiler._compile = compile_file
        super().build_extensions()

    def get_export_symbols(self, extension: Extension) -> list[str]:
        return []  # `_operators` is loaded by torch, not imported: it has no PyInit function


def operators(torch: Path, with_cuda: bool) -> Extension:
    x86 = platform.machine() in ("x86_64", "AMD64")
    files = [*sources("attention"), *sources("attention/cpu"), *sources("fused")]
    cpu = [path for path in files if x86 or not Path(path).name.startswith("avx")]
    cuda = sources("cuda", "**/*.cu") if with_cuda else []
    return Extension(
        "meditron_train.native._operators",
        [*cpu, *cuda],
        depends=[*sources("", "**/*.h"), *sources("cuda", "**/*.*h")],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)]
        + ([("MEDITRON_WITH_CUDA", "1")] if cuda else []),
        # -isystem: torch's headers are not clean under our warnings.
        extra_compile_args=[
            "-std=c++17",
            "-O2",
            "-g0",
            "-fvisibility=hidden",
            *WARNINGS,
            "-isystem",
            str(torch / "include"),
        ],
        library_dirs=[str(torch / "lib")] + ([static_cudart()] if cuda else []),
        # No rpath: torch is always loaded first, and the loader finds its library by name.
        libraries=["torch_cpu", "c10"] + (["cudart_static", "dl", "rt", "pthread"] if cuda else []),
        language="c++",
        py_limited_api=True,
    )


class ShipFiles(build_py):
    """A wheel brings presets and launch scripts; a clone has them beside the package."""

    def run(self) -> None:
        super().run()
        for name in () if self.editable_mode else ("configs", "launch"):
            target = Path(self.build_lib, "meditron_train", "shipped", name)
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / name, target)


torch = torch_folder()
packing = Pybind11Extension(
    "meditron_train.native._packing",
    sources("packing"),
    depends=sources("packing", "*.h"),
    cxx_std=17,
    extra_compile_args=["-O3", *WARNINGS],
)
ParallelCompile("MEDITRON_BUILD_JOBS", default=2).install()
setup(
    ext_modules=[packing] + ([operators(torch, wants_cuda(torch))] if torch else []),
    cmdclass={"build_ext": BuildCore, "build_py": ShipFiles},
    # Where the environment has no torch yet, pip fetches one to build with before this file is run again.
    setup_requires=[] if torch else ["torch>=2.10"],
)
