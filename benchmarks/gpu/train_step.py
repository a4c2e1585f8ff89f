"""The bf16 training step on one GPU against a plain transformers loop: tokens per second, MFU and peak memory.

    python -m benchmarks.gpu.train_step [--batch N] [--seq-len N] [--rounds N] [--steps N] [--json FILE]
    python -m benchmarks.gpu.train_step --tiny --device cpu

A Llama of 1.1 B random weights (the shape of TinyLlama) and a few batches of random tokens, the same for all tools:

- transformers, autocast: fp32 weights, bf16 autocast, torch's fused AdamW. As ours, it keeps fp32 weights.
- transformers, bf16: weights, gradients and optimizer in bf16. Less memory and less work, but small updates are lost.
- meditron-train: bf16 weights with fp32 masters, fp32 gradients, packed documents. One process, no parallelism.

All attend with torch's scaled_dot_product_attention and take the same AdamW steps, clipped to norm 1. The tools take
turns in an order that rotates; in each turn a tool is built anew, takes warm-up steps that are not counted, then the
timed ones, and is thrown away, so that its peak memory is its own. Every step ends with torch.cuda.synchronize.

Legend: B sequences, S tokens per sequence.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.peers import (
    BETAS,
    EPS,
    LR,
    MAX_NORM,
    WEIGHT_DECAY,
    Workload,
    _StateDictSource,
    packed_batch,
)
from meditron_train.checkpoint.hf_config import model_config_from_hf
from meditron_train.config.schema import Config
from meditron_train.parallel import destroy, initialize
from meditron_train.planner.flops import gpu_type, mfu
from meditron_train.train.engine import Engine

BASELINE = "transformers, autocast"
Step = Callable[[int], float]
"""Takes step number n (from 0) and returns its loss."""


@dataclass
class Result:
    """What one tool did in all its turns, warm-up not counted."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_memory_bytes: int = 0
    """The most that torch's allocator gave out; 0 on a CPU."""


def workload(*, tiny: bool, batch: int, seq_len: int, num_batches: int = 4) -> Workload:
    """The 1.1 B-parameter Llama, or a toy."""
    small = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=256)
    normal = dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, vocab_size=32000)
    llama = LlamaConfig(
        **(small if tiny else normal),
        num_attention_heads=4 if tiny else 32,
        num_key_value_heads=2 if tiny else 4,
        max_position_embeddings=seq_len,
        tie_word_embeddings=False,
    )
    generator = torch.Generator().manual_seed(0)
    batches = [
        torch.randint(llama.vocab_size, (batch, seq_len), generator=generator) for _ in range(num_batches)
    ]
    return Workload(llama, batches, "bf16")


@contextlib.contextmanager
def transformers_loop(
    work: Workload, model: LlamaForCausalLM, device: str, *, dtype: torch.dtype
) -> Iterator[Step]:
    """LlamaForCausalLM and torch's fused AdamW in the fewest lines; fp32 weights go with bf16 autocast."""
    model = copy.deepcopy(model).to(device, dtype).train()
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True)

    def step(number: int) -> float:
        tokens_BS = work.batches[number % len(work.batches)].to(device, non_blocking=True)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.float32):
            loss = model(input_ids=tokens_BS, labels=tokens_BS, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    yield step


@contextlib.contextmanager
def our_engine(work: Workload, model: LlamaForCausalLM, device: str) -> Iterator[Step]:
    """meditron-train's own step; each sequence is a document."""
    num_sequences, seq_len = work.batches[0].shape
    optimizer = {
        "lr": LR,
        "betas": BETAS,
        "eps": EPS,
        "weight_decay": WEIGHT_DECAY,
        "clip_grad": MAX_NORM,
    }
    config = Config.model_validate(
        {
            "model": {"init": "random", "hf_config": work.llama.to_dict()},
            "data": {"tokenizer": "none", "train": [{"name": "none", "path": "none"}]},
            "optimizer": optimizer,
            "train": {
                "precision": work.precision,
                "seq_len": seq_len,
                "micro_batch_size": num_sequences,
                "global_batch_size": num_sequences,
                "device": device,
            },
        }
    )
    mesh = initialize(config.parallel.layout(1), rank=0, local_rank=0, device=device)
    try:
        engine = Engine(
            config, model_config_from_hf(work.llama.to_dict()), mesh, _StateDictSource(model.state_dict())
        )

        def step(number: int) -> float:
            batch = packed_batch(work.batches[number % len(work.batches)])
            return engine.train_step([batch], LR).loss

        yield step
    finally:
        destroy()


@contextlib.contextmanager
def tool(name: str, work: Workload, model: LlamaForCausalLM, device: str) -> Iterator[Step]:
    """Build the tool of that name, and leave nothing of it behind."""
    if name == "meditron-train":
        built = our_engine(work, model, device)
    else:
        dtype = torch.float32 if name == BASELINE else torch.bfloat16
        built = transformers_loop(work, model, device, dtype=dtype)
    with built as step:
        yield step


TOOLS = (BASELINE, "transformers, bf16", "meditron-train")


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
    with tool(name, work, model, device) as step:
        for number in range(warm_up + steps):
            start = time.perf_counter()
            loss = step(number)
            if on_gpu:
                torch.cuda.synchronize()
            if number >= warm_up:
                result.seconds.append(time.perf_counter() - start)
                result.losses.append(loss)
    del step
    if on_gpu:
        peak = torch.cuda.max_memory_allocated() - held_before
        result.peak_memory_bytes = max(result.peak_memory_bytes, peak)
    gc.collect()  # engine and optimizer refer to each other
    if on_gpu:
        torch.cuda.empty_cache()


def measure(
    work: Workload, model: LlamaForCausalLM, device: str, *, rounds: int, warm_up: int, steps: int
) -> dict[str, Result]:
    """Results by tool; the order of the tools rotates from round to round."""
    results = {name: Result() for name in TOOLS}
    for round_number in range(rounds):
        shift = round_number % len(TOOLS)
        for name in [*TOOLS[shift:], *TOOLS[:shift]]:
            take_turn(results[name], name, work, model, device, warm_up=warm_up, steps=steps)
    return results


def table(results: dict[str, Result], work: Workload, gpu: str | None) -> str:
    """Markdown, a row per tool; in brackets the ratio to the plain loop with fp32 weights."""
    model_config = model_config_from_hf(work.llama.to_dict())
    medians = {
        name: work.tokens_per_step / statistics.median(result.seconds) for name, result in results.items()
    }
    lines = [
        "| | tokens/s, median step | fastest step | MFU (6·N) of the median | peak memory | last loss |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        fastest = work.tokens_per_step / min(result.seconds)
        share = mfu(
            model_config,
            work.batches[0].shape[1],
            tokens_per_second=medians[name],
            num_gpus=1,
            gpu=gpu,
            precision="bf16",
        )
        memory = f"{result.peak_memory_bytes / 2**30:.1f} GiB" if result.peak_memory_bytes else "not measured"
        cells = [
            f"{medians[name]:.0f} ({medians[name] / medians[BASELINE]:.2f})",
            f"{fastest:.0f}",
            "peak unknown" if share is None else f"{100 * share:.1f} %",
            memory,
            f"{result.losses[-1]:.4f}",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a toy model: does it run at all?")
    parser.add_argument("--batch", type=int, help="sequences a step (default 8, with --tiny 2)")
    parser.add_argument("--seq-len", type=int, help="tokens a sequence (default 2048, with --tiny 32)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=5, help="steps of a turn before the timed ones")
    parser.add_argument("--steps", type=int, default=10, help="timed steps a turn")
    parser.add_argument("--json", type=Path, help="also write every step time and loss here")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; write --tiny --device cpu to see whether the benchmark runs")
    if options.device == "cpu" and not options.tiny:
        parser.error("a billion parameters are too many for a CPU; write --tiny --device cpu")

    work = workload(
        tiny=options.tiny,
        batch=options.batch or (2 if options.tiny else 8),
        seq_len=options.seq_len or (32 if options.tiny else 2048),
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(work.llama)
    results = measure(
        work, model, options.device, rounds=options.rounds, warm_up=options.warm_up, steps=options.steps
    )
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"Llama of {num_parameters / 1e6:.0f} M parameters, {work.batches[0].shape[0]} x "
        f"{work.batches[0].shape[1]} tokens a step, bf16, {options.rounds} rounds of {options.steps} steps; "
        f"{name}, torch {torch.__version__}, transformers {transformers.__version__}\n"
    )
    print(table(results, work, gpu_type(name)))
    if options.json:
        options.json.write_text(
            json.dumps({tool: vars(result) for tool, result in results.items()}, indent=1)
        )


if __name__ == "__main__":
    main()
