"""The training step of one process on the CPU, against a plain transformers loop and Hugging Face Trainer.

    python -m benchmarks.train_step [--tiny] [--precision fp32|bf16] [--rounds N] [--steps N] [--json FILE]

All tools run in this one process on the same model, batches and threads. They take turns, a few steps each, in an
order that rotates, so that a machine whose speed drifts treats them alike. Numbers are tokens per second of the
fastest step and of the lower quartile of step times, by the clock on the wall and by CPU time; the losses show that
all compute the same thing.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.peers import PEERS, StepTime, Workload, step_options

BASELINE, OURS = "plain torch loop", "meditron-train"


def workload(*, tiny: bool, precision: str, num_batches: int = 8) -> tuple[Workload, LlamaForCausalLM]:
    """A 56 M-parameter Llama with grouped-query attention and 4 x 512 tokens, or a toy for a smoke test."""
    small = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=256)
    normal = dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, vocab_size=32000)
    llama = LlamaConfig(
        **(small if tiny else normal),
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    generator = torch.Generator().manual_seed(0)
    shape = (4, 32 if tiny else 512)
    batches = [torch.randint(llama.vocab_size, shape, generator=generator) for _ in range(num_batches)]
    torch.manual_seed(0)
    return Workload(llama, batches, precision), LlamaForCausalLM(llama)


def measure(
    work: Workload, model: LlamaForCausalLM, *, rounds: int, steps: int, names: Sequence[str] = tuple(PEERS)
) -> dict[str, list[StepTime]]:
    """Step times by tool: one round to warm up, which is dropped, then `rounds` rounds in rotating order.

    The first step of every round is dropped too: caches hold another tool's data then, and Trainer sets up.
    """
    runs = {name: PEERS[name](work, model) for name in names}
    times: dict[str, list[StepTime]] = {name: [] for name in names}
    for round_number in range(rounds + 1):
        shift = round_number % len(names)
        for name in [*names[shift:], *names[:shift]]:
            measured = runs[name](steps + 1)
            if round_number > 0:
                times[name] += measured[1:]
    return times


def tokens_per_second(times: list[StepTime], tokens_per_step: int) -> dict[str, float]:
    """The four speeds of the table: best and lower quartile of the step times, wall and CPU."""
    speeds = {}
    for clock in ("wall", "cpu"):
        seconds = [getattr(step, f"{clock}_s") for step in times]
        quartile = (
            statistics.quantiles(seconds, n=4, method="inclusive")[0] if len(seconds) > 1 else seconds[0]
        )
        speeds[f"{clock}_best"] = tokens_per_step / min(seconds)
        speeds[f"{clock}_quartile"] = tokens_per_step / quartile
    return speeds


def table(speeds: dict[str, dict[str, float]], losses: dict[str, float]) -> str:
    """Markdown: tokens per second and, in brackets, the ratio to the plain loop."""
    columns = ("wall_best", "wall_quartile", "cpu_best", "cpu_quartile")
    head = ("tokens/s, fastest step", "lower quartile", "tokens per CPU-second, fastest", "lower quartile")
    lines = ["| | " + " | ".join(head) + " | last loss |", "|---" * (len(columns) + 2) + "|"]
    for name, speed in speeds.items():
        cells = [
            f"{speed[column]:.0f} ({speed[column] / speeds[BASELINE][column]:.2f})" for column in columns
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {losses[name]:.5f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    options = step_options(__doc__).parse_args(arguments)

    torch.set_num_threads(options.threads)
    work, model = workload(tiny=options.tiny, precision=options.precision)
    times = measure(work, model, rounds=options.rounds, steps=options.steps)
    speeds = {name: tokens_per_second(steps, work.tokens_per_step) for name, steps in times.items()}
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"Llama of {num_parameters / 1e6:.1f} M parameters, {work.batches[0].shape[0]} x "
        f"{work.batches[0].shape[1]} tokens a step, {options.precision}, {options.threads} threads, "
        f"{options.rounds} rounds of {options.steps} steps; torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {platform.processor() or platform.machine()}\n"
    )
    print(table(speeds, {name: steps[-1].loss for name, steps in times.items()}))
    if options.json:
        steps_by_name = {name: [vars(step) for step in steps] for name, steps in times.items()}
        options.json.write_text(json.dumps({"speeds": speeds, "steps": steps_by_name}, indent=1))


if __name__ == "__main__":
    main()
