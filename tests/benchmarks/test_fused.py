"""The benchmark of the fused pieces runs and prints a line for each."""

from __future__ import annotations

import torch

from benchmarks import fused


def test_prints_a_line_for_every_piece_size_and_dtype(capsys):
    threads = torch.get_num_threads()
    try:
        fused.main(["--threads", "1", "--repeats", "1", "--tokens", "2"])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert [printed.count(f"| {name} |") for name in ("RMSNorm", "SwiGLU", "cross-entropy")] == [4, 4, 2]
