"""What must be so before any test of this directory starts ranks, and the fixtures of whole runs."""

from __future__ import annotations

import os

# Ranks are forked from a server that has imported torch and megatron-core, and a process that has used CUDA cannot
# be forked. Nothing that is imported initializes it, but `torch.cuda.is_available()` asks the CUDA runtime by default,
# which starts the driver. With this variable it asks NVML instead. The server inherits it.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

from tests.train.conftest import corpus, hf_dir, write_config

__all__ = ["corpus", "hf_dir", "write_config"]
