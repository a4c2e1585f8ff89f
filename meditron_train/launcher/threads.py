"""How the threads of torch wait for each other on a CPU."""

from __future__ import annotations

from collections.abc import MutableMapping

POLICY = "OMP_WAIT_POLICY"


def wait_without_spinning(environment: MutableMapping[str, str]) -> None:
    """Let OpenMP's threads sleep while they wait, unless the environment says otherwise; before torch is imported.

    By default they spin, and where other processes (ranks, other people's jobs) want the same cores, a thread that
    spins keeps the one that it waits for from running. docs/evidence/journal.md has the measurements.
    """
    environment.setdefault(POLICY, "passive")
