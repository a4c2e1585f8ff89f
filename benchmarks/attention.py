"""Packed attention on the CPU, forward and backward, against PyTorch's scaled_dot_product_attention.

    python -m benchmarks.attention [--tiny] [--threads N] [--rounds N] [--json FILE]

4,096 packed tokens, as one document or as documents of log-normal length. Only useful pairs are counted: a query with
a key of its own document that is not after it. A pair costs 14·D FLOPs (4·D forward, 10·D backward). Peers take turns
in one process; memory is what a step adds to the resident size of a process of its own, at its highest point.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from meditron_train.native import operators, packed_attention

OURS, BY_DOCUMENT, DENSE = "meditron-train", "SDPA by document", "SDPA, dense mask"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = {"32/32 heads, D 128": (32, 32, 128), "8/2 heads, D 64": (8, 2, 64)}


@dataclass(frozen=True)
class Case:
    """One row of the table; lengths of the documents in tokens."""

    shape: str
    documents: str
    dtype: str
    lengths: tuple[int, ...]

    @property
    def flops(self) -> int:
        """Useful FLOPs of forward and backward."""
        num_heads, _, head_dim = SHAPES[self.shape]
        return 14 * head_dim * num_heads * sum(n * (n + 1) // 2 for n in self.lengths)


def log_normal_lengths(num_tokens: int) -> tuple[int, ...]:
    """Lengths like those of abstracts: median 160, sigma 0.8, so a mean of about 220; the last one is cut."""
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while sum(lengths) < num_tokens:
        length = int(torch.exp(5.08 + 0.8 * torch.randn(1, generator=generator)).clamp(8, 2048))
        lengths.append(min(length, num_tokens - sum(lengths)))
    return tuple(lengths)


def cases(num_tokens: int) -> list[Case]:
    packings = {"one document": (num_tokens,), "log-normal": log_normal_lengths(num_tokens)}
    return [
        Case(shape, name, dtype, lengths)
        for shape in SHAPES
        for name, lengths in packings.items()
        for dtype in DTYPES
    ]


def inputs(case: Case) -> list[torch.Tensor]:
    """q, k, v that want gradients, and the gradient of the output."""
    num_heads, num_kv_heads, head_dim = SHAPES[case.shape]
    generator = torch.Generator().manual_seed(1)
    heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    tensors = [
        torch.randn(sum(case.lengths), n, head_dim, generator=generator).to(DTYPES[case.dtype]) for n in heads
    ]
    return [*(tensor.requires_grad_() for tensor in tensors[:3]), tensors[3]]


def ours(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    cu_seqlens = torch.tensor([0, *case.lengths]).cumsum(0)
    return packed_attention(q, k, v, cu_seqlens, backend="native")


def by_document(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The fast form: split, not slices. For one document it is plain is_causal."""
    parts = zip(q.split(case.lengths), k.split(case.lengths), v.split(case.lengths), strict=True)
    return torch.cat([_sdpa(*part, is_causal=True) for part in parts])


def dense_mask(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    document = torch.repeat_interleave(torch.arange(len(case.lengths)), torch.tensor(case.lengths))
    place = torch.arange(len(document))
    mask = (document[:, None] == document[None]) & (place[:, None] >= place[None])
    return _sdpa(q, k, v, attn_mask=mask)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **how: Any) -> torch.Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **how)[0].transpose(
        0, 1
    )


PEERS: dict[str, Callable[..., torch.Tensor]] = {OURS: ours, BY_DOCUMENT: by_document, DENSE: dense_mask}


def peers_of(case: Case) -> list[str]:
    return [OURS, BY_DOCUMENT] if len(case.lengths) == 1 else list(PEERS)


def step(case: Case, peer: str, tensors: list[torch.Tensor]) -> None:
    *qkv, grad = tensors
    torch.autograd.grad(PEERS[peer](case, *qkv), qkv, grad)


def measure(case: Case, rounds: int) -> dict[str, float]:
    """Seconds of the fastest forward and backward, by peer; the first round is dropped."""
    tensors = inputs(case)
    seconds: dict[str, list[float]] = {peer: [] for peer in peers_of(case)}
    for round_number in range(rounds + 1):
        for peer in seconds:
            if peer == DENSE and round_number > 2:  # it takes up to thirty times as long as the others
                continue
            start = time.perf_counter()
            step(case, peer, tensors)
            if round_number:
                seconds[peer].append(time.perf_counter() - start)
    return {peer: min(times) for peer, times in seconds.items()}


def extra_memory(case: Case, peer: str) -> int:
    """Bytes beyond the inputs at the highest point of one step; to be run in a fresh process (Linux)."""
    small = Case(case.shape, case.documents, case.dtype, (16, 16))
    step(small, peer, inputs(small))  # loads what is loaded at first use
    tensors = inputs(case)
    Path("/proc/self/clear_refs").write_text("5")  # the highest point so far is now
    before = _status_bytes("VmRSS")
    step(case, peer, tensors)
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(field + ":")))


def extra_memory_elsewhere(case: Case, peer: str, threads: int) -> int:
    command = [sys.executable, "-m", "benchmarks.attention", "--threads", str(threads)]
    command += ["--memory-of", json.dumps(asdict(case)), "--peer", peer]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


PEAK_SOURCE = """
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>
typedef float Vec __attribute__((vector_size(64)));
static void work(double* seconds) {
    Vec x[12], a, b;
    for (int i = 0; i < 12; ++i) for (int j = 0; j < 16; ++j) x[i][j] = i + j;
    for (int j = 0; j < 16; ++j) a[j] = 0.999f, b[j] = 1e-4f;
    const auto start = std::chrono::steady_clock::now();
    for (int n = 0; n < 20000000; ++n)
#pragma GCC unroll 12
        for (int i = 0; i < 12; ++i) x[i] = x[i] * a + b;
    for (int i = 0; i < 12; ++i) asm volatile("" : : "m"(x[i]));
    *seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}
int main(int, char** argv) {
    const int threads = std::atoi(argv[1]);
    double best = 0;
    for (int round = 0; round < 5; ++round) {
        std::vector<double> seconds(threads);
        std::vector<std::thread> pool;
        for (double& s : seconds) pool.emplace_back(work, &s);
        for (std::thread& t : pool) t.join();
        double rate = 0;
        for (double s : seconds) rate += 20000000.0 * 12 * 16 * 2 / s;
        if (rate > best) best = rate;
    }
    std::printf("%f", best);
}
"""


def fma_peak(threads: int) -> float | None:
    """FLOP/s of independent fp32 fused multiply-adds in registers on all threads; None without g++."""
    if shutil.which("g++") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "peak.cpp", Path(folder) / "peak"
        source.write_text(PEAK_SOURCE)
        flags = [
            "-O3",
            "-march=native",
            "-mprefer-vector-width=512",
            "-ffp-contract=fast",
            "-pthread",
            "-Wno-psabi",
        ]
        subprocess.run(["g++", *flags, "-o", str(program), str(source)], check=True)
        return float(
            subprocess.run([str(program), str(threads)], check=True, capture_output=True, text=True).stdout
        )


def table(results: list[dict], peak: float | None) -> str:
    """Markdown: useful GFLOP/s of ours, its share of the peak, and how many times the peers' time and memory."""
    head = [
        "heads",
        "documents",
        "dtype",
        "GFLOP/s",
        "of FMA peak",
        "× SDPA by document",
        "× SDPA, dense mask",
    ]
    head += ["extra MB", "SDPA's MB"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for result in results:
        case, seconds, memory = result["case"], result["seconds"], result["memory"]
        rate = case["flops"] / seconds[OURS]
        share = "–" if peak is None else f"{rate / peak:.2f}"
        ratios = [
            f"{seconds[peer] / seconds[OURS]:.1f}" if peer in seconds else "–"
            for peer in (BY_DOCUMENT, DENSE)
        ]
        mb = [f"{memory[peer] / 1e6:.0f}" if peer in memory else "–" for peer in (OURS, BY_DOCUMENT)]
        cells = [case["shape"], case["documents"], case["dtype"], f"{rate / 1e9:.0f}", share, *ratios, *mb]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="two cases of 128 tokens: does it run at all?")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write all numbers here")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # how extra_memory_elsewhere calls back
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.memory_of:
        fields = json.loads(options.memory_of)
        print(extra_memory(Case(**{**fields, "lengths": tuple(fields["lengths"])}), options.peer))
        return
    peak = fma_peak(options.threads)
    results = []
    for case in cases(128)[-2:] if options.tiny else cases(4096):
        seconds = measure(case, options.rounds)
        memory = {peer: extra_memory_elsewhere(case, peer, options.threads) for peer in (OURS, BY_DOCUMENT)}
        results.append({"case": {**asdict(case), "flops": case.flops}, "seconds": seconds, "memory": memory})
    peak_text = "unknown (no g++)" if peak is None else f"{peak / 1e9:.0f} GFLOP/s"
    print(
        f"{options.threads} threads, {operators.instruction_sets()[0]}, fp32 FMA peak {peak_text}; best of "
        f"{options.rounds} rounds; torch {torch.__version__}, {platform.processor() or platform.machine()}\n"
    )
    print(table(results, peak))
    if options.json:
        options.json.write_text(json.dumps({"peak": peak, "results": results}, indent=1))


if __name__ == "__main__":
    main()
