"""A directory with files such as a checkpoint has."""

from __future__ import annotations

import random
from pathlib import Path


def fill(directory: Path, num_bytes: int = 1000, seed: int = 0) -> None:
    (directory / "hf").mkdir()
    generator = random.Random(seed)
    (directory / "__0_0.distcp").write_bytes(generator.randbytes(num_bytes))
    (directory / "__1_0.distcp").write_bytes(generator.randbytes(num_bytes))
    (directory / "empty").touch()
    (directory / "hf" / "config.json").write_text("{}")
