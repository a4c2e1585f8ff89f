"""Builds the C++ core. Everything else about the package is in pyproject.toml.

MEDITRON_CUDA=auto (default) builds CUDA code where there is some to build, 0 never, 1 fails when it cannot.
"""

from __future__ import annotations

import os
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

ROOT = Path(__file__).parent


def sources(folder: str, pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / folder).glob(pattern))


def report_cuda() -> None:
    """Say what happens to CUDA code. There is none in csrc/ yet, so nothing can be built from it."""
    wish = os.environ.get("MEDITRON_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"MEDITRON_CUDA={wish!r} is not one of auto, 0, 1.")
    if wish == "1":
        raise SystemExit("MEDITRON_CUDA=1 asks for CUDA code, but csrc/ has no .cu file: use auto or 0.")
    reason = "switched off by MEDITRON_CUDA=0" if wish == "0" else "csrc/ has no .cu file"
    print(f"meditron-train: the C++ core is built for the CPU; CUDA part not built ({reason}).")


report_cuda()
# No -march=native: the wheel must run on every x86-64 and arm64 processor, not only on the one that built it.
packing = Pybind11Extension(
    "meditron_train.native._packing",
    sources("packing", "*.cpp"),
    depends=sources("packing", "*.h"),
    cxx_std=17,
    extra_compile_args=["-O3", "-Wall", "-Wextra"],
)
ParallelCompile("MEDITRON_BUILD_JOBS", default=2).install()
setup(ext_modules=[packing], cmdclass={"build_ext": build_ext})
