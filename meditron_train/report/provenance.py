"""Where the numbers of a run came from: one record per start in RUN_DIR/provenance.jsonl."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import meditron_train
from meditron_train.report.json_lines import encode_line

PROVENANCE_NAME = "provenance.jsonl"

_PACKAGES = (
    *(
        "torch",
        "megatron-core",
        "numpy",
        "transformers",
        "tokenizers",
        "sentencepiece",
        "safetensors",
        "pydantic",
    ),
    *("wandb", "tensorboard", "transformer-engine", "flash-attn", "apex", "triton", "nvidia-nccl-cu12"),
)


def collect_provenance(
    config: Mapping[str, Any], data_fingerprints: Mapping[str, str], launch: Mapping[str, Any]
) -> dict[str, Any]:
    """What a run was started with: hash of the resolved config, git commit, versions, data, launcher and
    hosts.

    `launch` is recorded as it is (launcher kind, hosts, world size ...); hosts default to this machine.
    """
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "config_sha256": config_hash(config),
        "git": _git_state(Path(meditron_train.__file__).resolve().parent),
        "versions": {"meditron-train": meditron_train.__version__, **_package_versions()},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "data_fingerprints": dict(data_fingerprints),
        "launch": {"hosts": [socket.gethostname()], **launch},
        "command": sys.argv,
        "working_directory": os.getcwd(),
    }


def append_provenance(run_dir: Path, record: Mapping[str, Any]) -> None:
    """Append `record` as one line of strict JSON. A torn line that a kill left is ended first."""
    path = Path(run_dir) / PROVENANCE_NAME
    with open(path, "ab+", buffering=0) as file:
        torn = False
        if file.seek(0, os.SEEK_END) > 0:
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        file.write((b"\n" if torn else b"") + encode_line(record).encode() + b"\n")
        os.fsync(file.fileno())


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of the config's canonical JSON: the order of keys does not matter, every value does."""
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _package_versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # optional, and a missing key shows its absence
    return versions


def _git_state(directory: Path) -> dict[str, Any] | None:
    """Commit and whether tracked files differ from it; None when the package does not run from a git
    checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(directory), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        # A virtual environment may lie inside another repository.
        git("ls-files", "--error-unmatch", "__init__.py")
        return {"commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
