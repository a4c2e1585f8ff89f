"""One thread per process in every test: ranks share the machine, and sums must not depend on its cores.

With `pytest -n 2` the tests of a file run one after the other, as they share what is made once for the file. Those that
train are long and share little: each goes to the next free process.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from meditron_train.tokenizer import bounded

bounded.IDLE_S = 600.0  # so that the next file of tests need not import transformers again

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

EACH_ALONE = "tests/train/"
GROUPS = {
    "tests/native/test_cuda_attention.py": "emulator",  # which is compiled once for several files
    "tests/native/test_cuda_sm90.py": "emulator",
    "tests/native/test_cuda_synchronization.py": "emulator",
    "tests/flows/publish/": "published run",
}


def group_of(nodeid: str) -> str:
    """The name of the group that a test belongs to."""
    if nodeid.startswith(EACH_ALONE):
        return nodeid
    return next((GROUPS[prefix] for prefix in GROUPS if nodeid.startswith(prefix)), nodeid.partition("::")[0])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A group stays in one process. (`--dist loadgroup` of xdist 3.8 groups nothing with pytest 9.2.)"""
    if config.getvalue("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Groups(config, log)
