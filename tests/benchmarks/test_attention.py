"""The attention benchmark runs, and its peers compute the same thing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import attention


@pytest.mark.parametrize(
    "case", attention.cases(300), ids=lambda case: f"{case.shape}, {case.documents}, {case.dtype}"
)
def test_peers_compute_the_same(case):
    tensors = attention.inputs(case)
    results = {peer: attention.PEERS[peer](case, *tensors[:3]) for peer in attention.peers_of(case)}
    tolerance = 1e-4 if case.dtype == "fp32" else 3e-2
    for result in results.values():
        torch.testing.assert_close(result, results[attention.OURS], rtol=tolerance, atol=tolerance)


def test_useful_flops_count_pairs_of_one_document():
    case = attention.Case("8/2 heads, D 64", "two", "fp32", (3, 1))
    assert case.flops == 14 * 64 * 8 * (1 + 2 + 3 + 1)
    assert sum(attention.log_normal_lengths(4096)) == 4096


@pytest.mark.long
def test_it_runs(tmp_path: Path) -> None:
    result_file = tmp_path / "result.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.attention",
        "--tiny",
        "--rounds",
        "1",
        "--json",
        str(result_file),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr
    results = json.loads(result_file.read_text())["results"]
    assert [result["case"]["dtype"] for result in results] == ["fp32", "bf16"]
    assert all(value > 0 for result in results for value in result["seconds"].values())
    assert "| 8/2 heads, D 64 | log-normal | bf16 | " in run.stdout
