"""Logging: one logger tree, stderr for people, one file per rank for the record.

stdout is never used, so that commands with `--json` can own it.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

ROOT_NAME = "meditron_train"


def get_logger(name: str) -> logging.Logger:
    """The logger of a module: pass `__name__`. Always a child of "meditron_train"."""
    if name == ROOT_NAME or name.startswith(ROOT_NAME + "."):
        return logging.getLogger(name)
    return logging.getLogger(f"{ROOT_NAME}.{name}")


def setup_logging(rank: int = 0, run_dir: Path | None = None) -> None:
    """Send messages to stderr (all of rank 0, warnings of the others) and, with `run_dir`, to
    `run_dir/logs/rank_00000.log`. Calling it again replaces what the previous call set up."""
    root = logging.getLogger(ROOT_NAME)
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(logging.INFO)
    root.propagate = False
    prefix = "" if rank == 0 else f"[rank {rank}] "
    formatter = logging.Formatter(f"%(asctime)s {prefix}%(levelname)s %(message)s", "%H:%M:%S")
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    console.setFormatter(formatter)
    root.addHandler(console)
    if run_dir is not None:
        log_file = run_dir / "logs" / f"rank_{rank:05d}.log"
        log_file.parent.mkdir(parents=True, exist_ok=True)
        record = logging.FileHandler(log_file, encoding="utf-8")
        record.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root.addHandler(record)
