"""Causal attention on one GPU, ours against its peers: useful TFLOP/s of forward and of forward + backward.

    python -m benchmarks.gpu.attention [--tokens N] [--heads N] [--kv-heads N] [--head-dim N] [--json FILE]
    python -m benchmarks.gpu.attention --tiny --device cpu

Three batches of the same number of tokens in bf16: one document, and packed documents of log-normal length, as long as
articles (mean 2000) and as abstracts (mean 350). Peers: SDPA with the flash, the memory-efficient and the cuDNN kernel,
called document by document, torch's varlen_attn (FlashAttention-2), and flash-attn and Transformer Engine where they
are installed. `meditron-train` is what `train.attention: auto` chooses on this machine, `our kernels` those of csrc/.
Training rotates q and k: "our kernels with RoPE" do it as they read, the peer with RoPE before it, in a pass of its own
that torch.compile made. Tools take turns in an order that rotates; a tool that refuses or fails says so in the table,
and if it is `meditron-train`, the exit status is 1.

Useful work, for each query head and each pair of a query and a key that it sees: 4 * D FLOPs forward, 10 * D backward;
the rotation counts as none.

Legend: T packed tokens, N query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from meditron_train.files import replace_text
from meditron_train.native import Rotation, packed_attention


@dataclass(frozen=True)
class Work:
    """A batch: q [T, N, D], k and v [T, K, D], and where its documents begin (on CPU and on the device).

    `rotation` is for the tools that turn q and k: by each token's place in its document.
    """

    name: str
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad: torch.Tensor
    cu_seqlens: torch.Tensor
    cu_on_device: torch.Tensor
    rotation: Rotation

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
        grouped = work.q.shape[1] != work.k.shape[1]
        outputs = []
        with sdpa_kernel(backend):
            for document in zip(*(x.split(work.lengths) for x in (work.q, work.k, work.v)), strict=True):
                q, k, v = (x.transpose(0, 1)[None] for x in document)
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
                outputs.append(out[0].transpose(0, 1))
            return torch.cat(outputs)

    return attend


def torch_varlen(work: Work) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest = max(work.lengths)
    # torch 2.11 does not know the word.
    grouped: dict[str, Any] = {"enable_gqa": True} if work.q.shape[1] != work.k.shape[1] else {}
    out = varlen_attn(
        work.q,
        work.k,
        work.v,
        work.cu_on_device,
        work.cu_on_device,
        longest,
        longest,
        window_size=(-1, 0),
        **grouped,
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


def ours_with_rope(work: Work) -> torch.Tensor:
    return packed_attention(work.q, work.k, work.v, work.cu_seqlens, rotation=work.rotation, backend="native")


def rope_before(attend: Attention, *, compiled: bool) -> Attention:
    """A peer that is given q and k turned; `compiled`: by one kernel each, as in other trainers."""

    def turned(work: Work) -> torch.Tensor:
        turn = _turn_compiled() if compiled and work.q.device.type == "cuda" else _turn
        q, k = (turn(x, work.rotation.cos_PC, work.rotation.sin_PC) for x in (work.q, work.k))
        return attend(dataclasses.replace(work, q=q, k=k))

    return turned


def _turn(x_TND: torch.Tensor, cos_TC: torch.Tensor, sin_TC: torch.Tensor) -> torch.Tensor:
    return Rotation(cos_TC, sin_TC).apply(x_TND, None)


@functools.cache
def _turn_compiled() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    return torch.compile(_turn)


OURS, OURS_WITH_ROPE = "meditron-train", "our kernels with RoPE"
PEER_WITH_ROPE = "torch varlen_attn with RoPE"
# Ours first: what is killed keeps what it has measured.
TOOLS: dict[str, Attention] = {
    OURS: ours,
    "our kernels": by_backend("native"),
    OURS_WITH_ROPE: ours_with_rope,
    "torch varlen_attn": torch_varlen,
    PEER_WITH_ROPE: rope_before(torch_varlen, compiled=True),
    "flash-attn varlen": flash_attn_varlen,
    "Transformer Engine": by_backend("transformer_engine"),
    "SDPA flash, by document": sdpa_by_document(SDPBackend.FLASH_ATTENTION),
    "SDPA memory-efficient, by document": sdpa_by_document(SDPBackend.EFFICIENT_ATTENTION),
    "SDPA cuDNN, by document": sdpa_by_document(SDPBackend.CUDNN_ATTENTION),
}
WITH_ROPE = (OURS_WITH_ROPE, PEER_WITH_ROPE)


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
    for leaf in (q, k, v):
        leaf.requires_grad_()
    positions = torch.cat([torch.arange(length) for length in lengths])
    angles = positions[:, None] / 10_000 ** (torch.arange(head_dim // 2) / (head_dim // 2))
    rotation = Rotation(angles.cos().to(device), angles.sin().to(device))
    return Work(name, q, k, v, grad, cu_seqlens, cu_seqlens.to(device), rotation)


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


def check(name: str, work: Work) -> None:
    """Refuses a tool whose numbers are not those of attention; ours is checked by the tests."""
    wanted = rope_before(ours, compiled=False) if name in WITH_ROPE else ours
    with torch.no_grad():
        error = (TOOLS[name](work).float() - wanted(work).float()).abs().max().item()
    if not error < 0.05:
        raise RuntimeError(f"differs from ours by {error:.2g}")


Table = dict[str, dict[str, float | str]]
"""TFLOP/s by "work, pass" and tool, or "no: ..." with the reason."""


def measure(
    works: Iterable[Work], device: str, rounds: int, repeats: int, keep: Callable[[Table], object]
) -> Table:
    """The median round of each tool; `keep` gets the table after each column."""
    table: Table = {}
    for work in works:
        refused: dict[str, str] = {}
        for name in TOOLS:
            with why_not(refused, name):
                check(name, work)
        for pass_name, step in PASSES.items():
            table[f"{work.name}, {pass_name}"] = measure_pass(work, step, device, rounds, repeats, refused)
            keep(table)
    return table


def measure_pass(
    work: Work,
    step: Callable[[Attention, Work], None],
    device: str,
    rounds: int,
    repeats: int,
    refused: dict[str, str],
) -> dict[str, float | str]:
    """A column of the table. A tool that fails takes no further turns in it."""
    failed = dict(refused)
    times: dict[str, list[float]] = {name: [] for name in TOOLS}
    for number in range(rounds):
        shift = number % len(TOOLS)
        for name in [*TOOLS][shift:] + [*TOOLS][:shift]:
            if name not in failed:
                with why_not(failed, name):
                    call = functools.partial(step, TOOLS[name], work)
                    times[name].append(seconds(call, device, repeats))
    flops = work.useful_flops(backward=step is forward_and_backward)
    return {
        name: failed[name] if name in failed else flops / statistics.median(times[name]) / 1e12
        for name in TOOLS
    }


@contextlib.contextmanager
def why_not(reasons: dict[str, str], name: str) -> Iterator[None]:
    """Whatever a tool raises goes to `reasons`; the others are measured all the same."""
    try:
        yield
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        reasons[name] = f"no: {type(error).__name__}: {first_line[:160]}"
    if name in reasons and torch.cuda.is_available():
        torch.cuda.empty_cache()


def as_markdown(table: Table) -> str:
    """A row per tool; in brackets our speed over its speed. Why a tool was left out stands below."""
    lines = ["| useful TFLOP/s | " + " | ".join(table) + " |", "|---" * (len(table) + 1) + "|"]
    reasons: dict[str, None] = {}
    for name in TOOLS:
        cells = []
        for column in table.values():
            speed, our_speed = column[name], column[OURS_WITH_ROPE if name in WITH_ROPE else OURS]
            if isinstance(speed, float) and isinstance(our_speed, float):
                cells.append(f"{speed:.4g} ({our_speed / speed:.2f})")
            elif isinstance(speed, float):
                cells.append(f"{speed:.4g}")
            else:
                cells.append("no")
                reasons[f"- {name}: {speed}"] = None
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *reasons]).rstrip()


def main(arguments: Sequence[str] | None = None) -> int:
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
    parser.add_argument("--json", type=Path, help="also write the table here, after every column")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; write --tiny --device cpu to see whether the benchmark runs")
    tokens = options.tokens or (200 if options.tiny else 16384)
    heads = options.heads or (2 if options.tiny else 32)
    shape = (heads, options.kv_heads or heads, options.head_dim, options.device)
    articles, abstracts = (100, 50) if options.tiny else (2000, 350)
    batches = {"one document": [tokens]}
    for kind, mean in (("articles", articles), ("abstracts", abstracts)):
        lengths = lognormal_lengths(tokens, mean)
        batches[f"{len(lengths)} {kind}"] = lengths
    rounds, repeats = (1, 1) if options.tiny else (options.rounds, options.repeats)

    def keep(table: Table) -> None:
        if options.json:
            replace_text(options.json, json.dumps(table, indent=1))

    works = (make_work(name, lengths, *shape) for name, lengths in batches.items())
    table = measure(works, options.device, rounds, repeats, keep)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(
        f"{tokens} tokens, heads {heads}/{shape[1]}, head size {options.head_dim}, bf16; {name}, torch "
        f"{torch.__version__}, median of {rounds} rounds of {repeats} calls\n"
    )
    print(as_markdown(table))
    return 1 if any(isinstance(column[OURS], str) for column in table.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
