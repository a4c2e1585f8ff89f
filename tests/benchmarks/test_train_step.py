"""The benchmark runs, and what it compares computes the same thing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="Hugging Face Trainer needs it")


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_tools_take_the_same_steps(tmp_path: Path, precision: str) -> None:
    result_file = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.train_step", "--tiny", "--precision", precision]
    command += ["--rounds", "2", "--steps", "2", "--json", str(result_file)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr
    result = json.loads(result_file.read_text())
    tools = ["plain torch loop", "Hugging Face Trainer", "meditron-train"]
    losses = {name: [step["loss"] for step in result["steps"][name]] for name in tools}
    for name in tools:
        assert len(losses[name]) == 4
        # fp32: the same sums in another order; bf16: autocast and bf16 weights round at different places.
        assert losses[name] == pytest.approx(losses[tools[0]], rel=1e-5 if precision == "fp32" else 2e-3)
        assert set(result["speeds"][name]) == {"wall_best", "wall_quartile", "cpu_best", "cpu_quartile"}
        assert f"| {name} | " in run.stdout
