"""The bf16 training step on one GPU against plain transformers loops: tokens per second, MFU and peak memory.

    python -m benchmarks.gpu.train_step [--model NAME] [--batch N] [--seq-len N] [--rounds N] [--steps N] [--json FILE]
    python -m benchmarks.gpu.train_step --tiny --device cpu

Models of random weights: `tinyllama`, its 1.1 B parameters, or `llama2-7b`, as many layers of Llama-2-7B as fit beside
its embeddings. A few batches of random tokens, the same for all tools (benchmarks/gpu/tools.py).

The peers attend with torch's scaled_dot_product_attention, we with what `train.attention: auto` chooses. All take the
same AdamW steps, clipped to norm 1. The tools take turns in an order that rotates; in each turn a tool is rebuilt,
takes warm-up steps that are not counted, then the timed ones, and is thrown away, so that its peak memory is its own.
Every step ends with torch.cuda.synchronize. A tool that fails says so in its row; if it is ours, the exit status is 1.

MFU is given twice (meditron_train/planner/flops.py): 6·N, and with causal attention. Peak memory is the most that
torch's allocator gave out, beside what `meditron-train plan` counts for it without its allowance.

Legend: B sequences, S tokens per sequence.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.tools import BASELINE, OURS, SHORT_DOCUMENTS, TOOLS
from benchmarks.peers import Workload, engine_config
from meditron_train.checkpoint.hf.config import model_config_from_hf
from meditron_train.files import replace_text
from meditron_train.planner.flops import Convention, gpu_type, model_flops_per_token
from meditron_train.planner.hardware import HARDWARE
from meditron_train.planner.memory import MemoryEstimate, estimate_stages

SHARE_OF_MEMORY = 0.7
"""That our plan may take: the peers need more than we do."""

TINYLLAMA = dict(
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    vocab_size=32000,
    num_attention_heads=32,
    num_key_value_heads=4,
)
LLAMA2_7B = dict(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    vocab_size=32000,
    num_attention_heads=32,
    num_key_value_heads=32,
)
TOY = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    vocab_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@dataclass
class Result:
    """What one tool did in all its turns, warm-up not counted."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_memory_bytes: int = 0
    """The most that torch's allocator gave out; 0 on a CPU."""
    failure: str = ""
    """Why it stopped; what was measured before stays."""


def workload(shape: dict[str, int], *, batch: int, seq_len: int, num_batches: int = 4) -> Workload:
    """A Llama of that shape and its batches."""
    llama = LlamaConfig(**shape, max_position_embeddings=seq_len, tie_word_embeddings=False)
    generator = torch.Generator().manual_seed(0)
    batches = [
        torch.randint(llama.vocab_size, (batch, seq_len), generator=generator) for _ in range(num_batches)
    ]
    return Workload(llama, batches, "bf16")


def planned_memory(work: Workload, device: str) -> MemoryEstimate:
    """What our planner says of our own step."""
    config = engine_config(work, device)
    model = model_config_from_hf(work.llama.to_dict())
    return estimate_stages(config, model, config.parallel.layout(1), on_gpu=device == "cuda")[0]


def as_many_layers_as_fit(shape: dict[str, int], memory_bytes: int, *, batch: int, seq_len: int) -> Workload:
    """The workload of the most layers whose plan takes at most SHARE_OF_MEMORY of the memory, one at least."""
    for num_layers in range(shape["num_hidden_layers"], 1, -1):
        work = workload({**shape, "num_hidden_layers": num_layers}, batch=batch, seq_len=seq_len)
        if planned_memory(work, "cuda").total <= SHARE_OF_MEMORY * memory_bytes:
            return work
    return workload({**shape, "num_hidden_layers": 1}, batch=batch, seq_len=seq_len)


def random_model(work: Workload, device: str) -> LlamaForCausalLM:
    """On the CPU in bf16, which every tool can represent; the numbers are drawn on the device, which is faster."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(work.llama).to(torch.bfloat16)
    return model.cpu()


def take_turn(
    result: Result,
    name: str,
    work: Workload,
    model: LlamaForCausalLM,
    device: str,
    *,
    warm_up: int,
    steps: int,
) -> None:
    """Build, warm up, time `steps` steps into `result`, throw away."""
    on_gpu = device == "cuda"
    if on_gpu:
        held_before = torch.cuda.memory_allocated()  # cuBLAS's workspace of the tools before
        torch.cuda.reset_peak_memory_stats()
    try:
        with TOOLS[name](work, model, device) as step:
            for number in range(warm_up + steps):
                start = time.perf_counter()
                loss = step(number)
                if on_gpu:
                    torch.cuda.synchronize()
                if number >= warm_up:
                    result.seconds.append(time.perf_counter() - start)
                    result.losses.append(loss)
    except Exception as error:  # whatever a peer raises: the others are measured all the same
        traceback.print_exc()
        result.failure = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"
    step = None  # type: ignore[assignment]  # after a failure too: it holds the model
    if on_gpu:
        peak = torch.cuda.max_memory_allocated() - held_before
        result.peak_memory_bytes = max(result.peak_memory_bytes, peak)
    gc.collect()  # engine and optimizer refer to each other
    if on_gpu:
        torch.cuda.empty_cache()


def summary(work: Workload, results: dict[str, Result], device: str, gpu: str | None) -> dict[str, Any]:
    """Everything that is known by now, for JSON."""
    model = model_config_from_hf(work.llama.to_dict())
    num_sequences, seq_len = work.batches[0].shape
    conventions: tuple[Convention, ...] = ("parameters", "causal_attention")
    flops = {name: model_flops_per_token(model, seq_len, name) for name in conventions}
    peak_flops = None if gpu in (None, "cpu") else HARDWARE[gpu].flops("bf16")
    plan = planned_memory(work, device)
    tools: dict[str, Any] = {}
    for name, result in results.items():
        tools[name] = asdict(result)
        if result.seconds:
            speed = work.tokens_per_step / statistics.median(result.seconds)
            tools[name]["tokens_per_s"] = speed
            if peak_flops:
                tools[name]["mfu"] = {key: speed * each / peak_flops for key, each in flops.items()}
    return {
        "layers": model.num_layers,
        "parameters": model.num_parameters,
        "sequences": num_sequences,
        "seq_len": seq_len,
        "model_flops_per_token": flops,
        "peak_flops": peak_flops,
        "plan_counted_bytes": plan.counted,
        "plan_total_bytes": plan.total,
        "tools": tools,
    }


def table(summary: dict[str, Any]) -> str:
    """Markdown, a row per tool; in brackets the ratio to the plain loop with fp32 weights."""
    tools = summary["tools"]
    base = tools[BASELINE].get("tokens_per_s") if BASELINE in tools else None
    tokens = summary["sequences"] * summary["seq_len"]
    lines = [
        "| | tokens/s, median step | fastest step | MFU, 6·N | MFU, causal attention | peak memory | last loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, tool in tools.items():
        if not tool["seconds"]:
            reason = f"failed: {tool['failure']}" if tool["failure"] else "not run"
            lines.append(f"| {name} | {reason} | | | | | |")
            continue
        speed, peak = tool["tokens_per_s"], tool["peak_memory_bytes"]
        ratio = f" ({speed / base:.2f})" if base else ""
        shares = [f"{100 * share:.1f} %" for share in tool.get("mfu", {}).values()] or ["peak unknown"] * 2
        memory = f"{peak / 2**30:.1f} GiB" if peak else "not measured"
        if peak and name in (OURS, SHORT_DOCUMENTS):
            memory += f" ({peak / summary['plan_counted_bytes']:.3f} of the plan)"
        cells = [f"{speed:.0f}{ratio}", f"{tokens / min(tool['seconds']):.0f}", *shares, memory]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {tool['losses'][-1]:.4f} |")
    return "\n".join(lines)


def chosen_workload(options: argparse.Namespace) -> Workload:
    batch = options.batch or (2 if options.tiny else 8)
    seq_len = options.seq_len or (32 if options.tiny else 2048)
    if options.tiny:
        return workload(TOY, batch=batch, seq_len=seq_len)
    if options.model == "llama2-7b":
        memory_bytes = torch.cuda.get_device_properties(0).total_memory
        return as_many_layers_as_fit(LLAMA2_7B, memory_bytes, batch=batch, seq_len=seq_len)
    return workload(TINYLLAMA, batch=batch, seq_len=seq_len)


def add_workload_options(parser: argparse.ArgumentParser) -> None:
    """What this and `profile` are told alike."""
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a toy model: does it run at all?")
    parser.add_argument("--model", choices=("tinyllama", "llama2-7b"), default="tinyllama")
    parser.add_argument("--batch", type=int, help="sequences a step (default 8, with --tiny 2)")
    parser.add_argument("--seq-len", type=int, help="tokens a sequence (default 2048, with --tiny 32)")
    parser.add_argument("--warm-up", type=int, default=5, help="steps of a turn before those that count")
    parser.add_argument("--json", type=Path, help="also write the result here, after every turn")


def check_workload_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; write --tiny --device cpu to see whether the benchmark runs")
    if options.device == "cpu" and not options.tiny:
        parser.error("a billion parameters are too many for a CPU; write --tiny --device cpu")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_workload_options(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="timed steps a turn")
    options = parser.parse_args(arguments)
    check_workload_options(parser, options)

    work = chosen_workload(options)
    model = random_model(work, options.device)
    device_name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    results = {name: Result() for name in TOOLS}
    names = list(TOOLS)
    for round_number in range(options.rounds):
        shift = round_number % len(names)
        for name in [*names[shift:], *names[:shift]]:
            take_turn(
                results[name], name, work, model, options.device, warm_up=options.warm_up, steps=options.steps
            )
            found = summary(work, results, options.device, gpu_type(device_name))
            if options.json:
                replace_text(options.json, json.dumps(found, indent=1))
    print(
        f"Llama of {found['parameters'] / 1e6:.0f} M parameters in {found['layers']} layers, "
        f"{found['sequences']} x {found['seq_len']} tokens a step, bf16, {options.rounds} rounds of "
        f"{options.steps} steps; {device_name}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}\n"
    )
    print(table(found))
    return 1 if results[OURS].failure or results[SHORT_DOCUMENTS].failure else 0


if __name__ == "__main__":
    sys.exit(main())
