"""The fused pieces of the CPU against torch's own: forward and backward, milliseconds by the wall and by CPU time.

    python -m benchmarks.fused [--threads 2] [--repeats 15] [--tokens 2048]

Both take turns in this process on the same tensors; the fastest of the repeats counts, and of CPU time the least, which
other work on the machine disturbs less. torch's side is what a plain
model runs: `F.rms_norm`, `F.silu(gate) * up` on halves of one tensor, and `F.cross_entropy` on fp32 logits.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from meditron_train.native import rms_norm, softmax_gradient_, softmax_statistics, swiglu

EPS = 1e-5
SIZES = {"56 M": (512, 1408, 32000), "Llama-2-7B": (4096, 11008, 32000)}  # hidden, feed-forward, vocabulary
Step = Callable[[], object]


def norms(num_tokens: int, width: int, dtype: torch.dtype) -> tuple[Step, Step]:
    x, grad = torch.randn(2, num_tokens, width).to(dtype)
    x.requires_grad_()
    weight = torch.ones(width, dtype=dtype, requires_grad=True)
    return (
        lambda: torch.autograd.grad(rms_norm(x, weight, EPS), (x, weight), grad),
        lambda: torch.autograd.grad(F.rms_norm(x, weight.shape, weight, EPS), (x, weight), grad),
    )


def gates(num_tokens: int, width: int, dtype: torch.dtype) -> tuple[Step, Step]:
    x = torch.randn(num_tokens, 2 * width).to(dtype).requires_grad_()
    grad = torch.randn(num_tokens, width).to(dtype)

    def theirs() -> None:
        gate, up = x.chunk(2, dim=-1)
        torch.autograd.grad(F.silu(gate) * up, x, grad)

    return lambda: torch.autograd.grad(swiglu(x), x, grad), theirs


def losses(num_tokens: int, width: int, dtype: torch.dtype) -> tuple[Step, Step]:
    x = torch.randn(num_tokens, width).to(dtype).requires_grad_()
    work = x.detach().clone()  # overwritten again and again: the time does not depend on the values
    labels, grad = torch.randint(width, (num_tokens,)), torch.ones(num_tokens)

    def ours() -> None:
        largest, total, _label = softmax_statistics(work, labels, width).unbind()
        softmax_gradient_(work, labels, largest, grad / total, grad, width)

    return ours, lambda: torch.autograd.grad(F.cross_entropy(x.float(), labels, reduction="sum"), x)


def fastest(steps: Sequence[Step], repeats: int) -> list[tuple[float, float]]:
    """Least milliseconds (wall, CPU) of each, taking turns; the first turn warms up."""
    wall, cpu = ([float("inf")] * len(steps) for _ in range(2))
    for turn in range(repeats + 1):
        for i, step in enumerate(steps):
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            step()
            if turn:
                wall[i] = min(wall[i], 1000 * (time.perf_counter() - wall_start))
                cpu[i] = min(cpu[i], 1000 * (time.process_time() - cpu_start))
    return list(zip(wall, cpu, strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{options.tokens} tokens, {options.threads} threads, torch {torch.__version__}\n")
    print("| piece | width | dtype | torch, ms | ours, ms | ratio | torch, CPU-ms | ours, CPU-ms | ratio |")
    print("|---" * 9 + "|")
    for hidden, feed_forward, vocabulary in SIZES.values():
        pieces = [("RMSNorm", norms, hidden), ("SwiGLU", gates, feed_forward)]
        if hidden == SIZES["56 M"][0]:  # both have the same vocabulary
            pieces.append(("cross-entropy", losses, vocabulary))
        for name, make, width in pieces:
            for dtype in (torch.float32, torch.bfloat16):
                ours, theirs = fastest(make(options.tokens, width, dtype), options.repeats)
                pairs = zip(theirs, ours, strict=True)
                figures = " | ".join(f"{a:.2f} | {b:.2f} | {a / b:.2f}" for a, b in pairs)
                print(f"| {name} | {width} | {str(dtype).removeprefix('torch.')} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
