"""The device and the versions behind a figure: `python -m benchmarks.gpu.machine cuda|cpu` prints them as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys

import torch

from meditron_train import __version__
from meditron_train.native import operators

PACKAGES = ("transformers", "megatron-core", "triton", "flash-attn", "transformer-engine")


def describe(device: str) -> dict[str, str]:
    """Names and versions, as texts; packages that are missing say so."""
    on_gpu = device == "cuda"
    processor = platform.processor() or platform.machine()
    found = {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU ({processor}), toy sizes",
        "meditron-train": __version__,
        "our CUDA kernels": "built" if operators.built_with_cuda() else "not built",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA of torch": str(torch.version.cuda),
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


if __name__ == "__main__":
    if sys.argv[1] == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; --tiny runs everything with toy sizes on a CPU")
    print(json.dumps(describe(sys.argv[1])))
