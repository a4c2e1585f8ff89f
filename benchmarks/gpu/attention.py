"""Causal attention on one GPU, ours against its peers: useful TFLOP/s of forward and of forward + backward.

    python -m benchmarks.gpu.attention [--tokens N] [--heads N] [--kv-heads N] [--head-dim N] [--json FILE]
    python -m benchmarks.gpu.attention --tiny --device cpu

Three batches of the same number of tokens in bf16: one document, and packed documents of log-normal length, as long as
articles (mean 2000) and as abstracts (mean 350). Peers: SDPA with the flash, the memory-efficient and the cuDNN kernel,
called document by document, torch's varlen_attn (FlashAttention-2), and flash-attn and Transformer Engine where they
are installed. `meditron-train` is what `train.attention: auto` chooses on this machine, `our kernels` those of csrc/.
Tools take turns in an order that rotates; a tool that refuses says so in the table.

Useful work, for each query head and each pair of a query and a key that it sees: 4 * D FLOPs forward, 10 * D backward.

Legend: T packed tokens, N query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from meditron_train.errors import UserError
from meditron_train.native import packed_attention


@dataclass(frozen=True)
class Work:
    """A batch: q [T, N, D], k and v [T, K, D], and where its documents begin (on CPU and on the device)."""

    name: str
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad: torch.Tensor
    cu_seqlens: torch.Tensor
    cu_on_device: torch.Tensor

    @property
    def lengths(self) -> list[int]:
        return self.cu_seqlens.diff().tolist()

    def useful_flops(self, *, backward: bool) -> int:
        pairs = sum(n * (n + 1) // 2 for n in self.lengths)
        return (14 if backward else 4) * pairs * self.q.shape[1] * self.q.shape[2]


Attention = Callable[[Work], torch.Tensor]


def ours(work: Work) -> torch.Tensor:
    return packed_attention(work.q, work.k, work.v, work.cu_seqlens)


def sdpa_by_document(backend: SDPBackend) -> Attention:
    def attend(work: Work) -> torch.Tensor:
        documents = zip(*(x.split(work.lengths) for x in (work.q, work.k, work.v)), strict=True)
        with sdpa_kernel(backend):
            return torch.cat(
                [
                    F.scaled_dot_product_attention(
                        *(x.transpose(0, 1)[None] for x in document),
                        is_causal=True,
                        enable_gqa=work.q.shape[1] != work.k.shape[1],
                    )[0].transpose(0, 1)
                    for document in documents
                ]
            )

    return attend


def torch_varlen(work: Work) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest = max(work.lengths)
    grouped = work.q.shape[1] != work.k.shape[1]
    out = varlen_attn(
        work.q,
        work.k,
        work.v,
        work.cu_on_device,
        work.cu_on_device,
        longest,
        longest,
        window_size=(-1, 0),
        enable_gqa=grouped,
    )
    assert isinstance(out, torch.Tensor)
    return out


def flash_attn_varlen(work: Work) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    cu, longest = work.cu_on_device, max(work.lengths)
    return flash_attn_varlen_func(work.q, work.k, work.v, cu, cu, longest, longest, causal=True)


def by_backend(name: str) -> Attention:
    """One of what `ours` chooses among."""

    def attend(work: Work) -> torch.Tensor:
        return packed_attention(work.q, work.k, work.v, work.cu_seqlens, backend=name)

    return attend


TOOLS: dict[str, Attention] = {
    "SDPA flash, by document": sdpa_by_document(SDPBackend.FLASH_ATTENTION),
    "SDPA memory-efficient, by document": sdpa_by_document(SDPBackend.EFFICIENT_ATTENTION),
    "SDPA cuDNN, by document": sdpa_by_document(SDPBackend.CUDNN_ATTENTION),
    "torch varlen_attn": torch_varlen,
    "flash-attn varlen": flash_attn_varlen,
    "Transformer Engine": by_backend("transformer_engine"),
    "our kernels": by_backend("native"),
    "meditron-train": ours,
}


def lognormal_lengths(num_tokens: int, mean: float = 350, sigma: float = 0.8) -> list[int]:
    """Lengths that add up to num_tokens; the last one is cut."""
    draw = random.Random(0)
    mu = torch.tensor(mean).log().item() - sigma**2 / 2
    lengths: list[int] = []
    while sum(lengths) < num_tokens:
        length = max(1, round(draw.lognormvariate(mu, sigma)))
        lengths.append(min(length, num_tokens - sum(lengths)))
    return lengths


def make_work(
    name: str, lengths: Sequence[int], heads: int, kv_heads: int, head_dim: int, device: str
) -> Work:
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(sum(lengths), count, head_dim) for count in (heads, kv_heads, kv_heads, heads)]
    q, k, v, grad = (
        torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for shape in shapes
    )
    cu_seqlens = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    return Work(name, *leaves, grad, cu_seqlens, cu_seqlens.to(device))


def seconds(step: Callable[[], object], device: str, repeats: int) -> float:
    """Of one call, on average over `repeats` after a warm-up."""
    step()
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        return (time.perf_counter() - start) / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000 / repeats


def forward(attend: Attention, work: Work) -> None:
    with torch.no_grad():
        attend(work)


def forward_and_backward(attend: Attention, work: Work) -> None:
    torch.autograd.grad(attend(work), (work.q, work.k, work.v), work.grad)


PASSES = {"forward": forward, "forward + backward": forward_and_backward}


def check(attend: Attention, work: Work) -> None:
    """Refuses a tool whose numbers are not those of attention; ours is checked by the tests."""
    with torch.no_grad():
        error = (attend(work).float() - ours(work).float()).abs().max().item()
    if not error < 0.05:
        raise RuntimeError(f"differs from ours by {error:.2g}")


def measure(
    works: Sequence[Work], device: str, rounds: int, repeats: int
) -> dict[str, dict[str, float | str]]:
    """TFLOP/s of the median round by "work, pass" and tool, or why a tool was left out."""
    table: dict[str, dict[str, float | str]] = {}
    for work in works:
        refused: dict[str, str] = {}
        for name, attend in TOOLS.items():
            try:
                check(attend, work)
            except (RuntimeError, ImportError, NotImplementedError, TypeError, UserError) as error:
                refused[name] = f"no: {str(error).splitlines()[0][:160]}"
        names = [name for name in TOOLS if name not in refused]
        for pass_name, step in PASSES.items():
            times: dict[str, list[float]] = {name: [] for name in names}
            for number in range(rounds):
                for name in [*names[number % len(names) :], *names[: number % len(names)]]:
                    call = functools.partial(step, TOOLS[name], work)
                    times[name].append(seconds(call, device, repeats))
            flops = work.useful_flops(backward=step is forward_and_backward)
            speeds = {name: flops / statistics.median(values) / 1e12 for name, values in times.items()}
            table[f"{work.name}, {pass_name}"] = {**refused, **speeds}
    return table


def as_markdown(table: dict[str, dict[str, float | str]]) -> str:
    """A row per tool; in brackets our speed over its speed. Why a tool was left out stands below."""
    lines = ["| useful TFLOP/s | " + " | ".join(table) + " |", "|---" * (len(table) + 1) + "|"]
    refused: dict[str, str] = {}
    for name in TOOLS:
        cells = []
        for column in table.values():
            speed, our_speed = column[name], column["meditron-train"]
            if isinstance(speed, float) and isinstance(our_speed, float):
                cells.append(f"{speed:.4g} ({our_speed / speed:.2f})")
            else:
                cells.append("no")
                refused[name] = str(speed)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"- {name}: {reason}" for name, reason in refused.items())]).rstrip()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a toy: does it run at all?")
    parser.add_argument("--tokens", type=int, help="default 16384, with --tiny 200")
    parser.add_argument("--heads", type=int, help="default 32, with --tiny 2")
    parser.add_argument("--kv-heads", type=int, help="default: as many as heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=20, help="calls timed together")
    parser.add_argument("--json", type=Path, help="also write the table here")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; write --tiny --device cpu to see whether the benchmark runs")
    tokens = options.tokens or (200 if options.tiny else 16384)
    heads = options.heads or (2 if options.tiny else 32)
    shape = (heads, options.kv_heads or heads, options.head_dim, options.device)
    works = [make_work("one document", [tokens], *shape)]
    for kind, mean in (
        ("articles", 100 if options.tiny else 2000),
        ("abstracts", 50 if options.tiny else 350),
    ):
        lengths = lognormal_lengths(tokens, mean)
        works.append(make_work(f"{len(lengths)} {kind}", lengths, *shape))
    rounds, repeats = (1, 1) if options.tiny else (options.rounds, options.repeats)
    table = measure(works, options.device, rounds, repeats)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(
        f"{tokens} tokens, heads {heads}/{shape[1]}, head size {options.head_dim}, bf16; {name}, torch "
        f"{torch.__version__}, median of {rounds} rounds of {repeats} calls\n"
    )
    print(as_markdown(table))
    if options.json:
        options.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
