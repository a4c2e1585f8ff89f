from __future__ import annotations

import os
import subprocess
import sys

import pytest

from meditron_train.launcher.threads import wait_without_spinning
from tests.long import mostly_long


def test_a_choice_is_kept():
    environment = {"OMP_WAIT_POLICY": "active"}
    wait_without_spinning(environment)
    assert environment == {"OMP_WAIT_POLICY": "active"}


@pytest.mark.parametrize("chosen", mostly_long([None, "active"], None))
def test_train_sets_it_before_torch_is_imported(tmp_path, chosen):
    """An import hook looks at what the environment says when torch comes."""
    program = """
import builtins, os, sys
original = builtins.__import__
def look(name, *rest, **more):
    if name == "torch":
        print(os.environ.get("OMP_WAIT_POLICY"), flush=True)
        os._exit(0)
    return original(name, *rest, **more)
builtins.__import__ = look
from meditron_train.cli.main import main
sys.argv = ["meditron-train", "train", sys.argv[1]]
main()
"""
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {{from: {tmp_path}}}\ndata: {{tokenizer: {tmp_path}, train: [{{name: a, path: {tmp_path}/a}}]}}\n"
        f"logging: {{run_dir: {tmp_path}/run}}\n"
        "train: {epochs: 1}\n"  # a length that only the data tell: nothing is checked before the imports
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if chosen is None else {"OMP_WAIT_POLICY": chosen}
    done = subprocess.run(
        [sys.executable, "-c", program, config], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.stdout == f"{chosen or 'passive'}\n", done.stderr
