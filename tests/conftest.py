"""One thread per process in every test: ranks share the machine, and sums must not depend on its cores.

With `pytest -n 2 --dist loadgroup` the tests of a file run one after the other, as they share what is made once for the
file. Those that train are long and share little: each goes to the next free process.
"""

from __future__ import annotations

import os

import pytest

from meditron_train.tokenizer import bounded

bounded.IDLE_S = 600.0  # so that the next file of tests need not import transformers again

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

EACH_ALONE = ("tests/train/",)
GROUPS = {  # what is compiled once for several files
    "tests/native/test_cuda_attention.py": "emulator",
    "tests/native/test_cuda_sm90.py": "emulator",
    "tests/native/test_cuda_synchronization.py": "emulator",
}


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        file = item.nodeid.partition("::")[0]
        if not file.startswith(EACH_ALONE):
            item.add_marker(pytest.mark.xdist_group(GROUPS.get(file, file)))
