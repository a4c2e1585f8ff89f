"""Where the time of our training step goes: the kernels that take the most, and the share in which the GPU is idle.

    python -m benchmarks.gpu.profile [--model NAME] [--batch N] [--seq-len N] [--steps N] [--json FILE]
    python -m benchmarks.gpu.profile --tiny --device cpu

The step of `train_step` on its documents of log-normal length, recorded by torch.profiler. Busy is the union of all
kernels and copies on the GPU, idle the rest of the time between the first's start and the last's end. Host
synchronizations are the calls of the CUDA runtime that wait (cuda*Synchronize). On a CPU the operators take the place
of kernels. Profiling slows the host down: the idle share is an upper bound, and speeds are `train_step`'s.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.tools import SHORT_DOCUMENTS, TOOLS
from benchmarks.gpu.train_step import (
    add_workload_options,
    check_workload_options,
    chosen_workload,
    random_model,
)
from meditron_train.files import replace_text

ON_DEVICE = {"cuda": {"kernel", "gpu_memcpy", "gpu_memset"}, "cpu": {"cpu_op"}}
"""Categories of a Chrome trace that are work of the device."""


def busy(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def summarize(trace: dict[str, Any], device: str, num_steps: int, *, top: int = 15) -> dict[str, Any]:
    """Figures per step from a Chrome trace of torch.profiler, whose times are in µs."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    work = [event for event in events if event.get("cat") in ON_DEVICE[device]]
    if not work:
        raise RuntimeError(f"the profiler recorded no work on {device}: can it read the device's counters?")
    spans = [(event["ts"], event["ts"] + event["dur"]) for event in work]
    span_us = max(end for _, end in spans) - min(start for start, _ in spans)
    busy_us = busy(spans)
    durations: dict[str, list[float]] = defaultdict(list)
    for event in work:
        durations[event["name"]].append(event["dur"])
    longest = sorted(durations.items(), key=lambda item: -sum(item[1]))[:top]
    waits = [
        event for event in events if event.get("cat") == "cuda_runtime" and "Synchronize" in event["name"]
    ]
    return {
        "steps": num_steps,
        "step_ms": span_us / 1000 / num_steps,
        "idle_share": 1 - busy_us / span_us,
        "launches_per_step": len(work) / num_steps,
        "host_synchronizations_per_step": len(waits) / num_steps,
        "kernels": [
            {
                "name": name,
                "calls_per_step": len(times) / num_steps,
                "ms_per_step": sum(times) / 1000 / num_steps,
                "share_of_busy": sum(times) / busy_us,
            }
            for name, times in longest
        ],
    }


def table(summary: dict[str, Any]) -> str:
    lines = [
        f"{summary['step_ms']:.1f} ms a step, idle {100 * summary['idle_share']:.1f} %, "
        f"{summary['launches_per_step']:.0f} launches and {summary['host_synchronizations_per_step']:.0f} host "
        "synchronizations a step",
        "",
        "| kernel | calls a step | ms a step | share of busy time |",
        "|---|---|---|---|",
    ]
    for kernel in summary["kernels"]:
        name = kernel["name"].replace("|", "/")
        name = name if len(name) <= 80 else name[:77] + "..."
        cells = (
            f"{kernel['calls_per_step']:.0f}",
            f"{kernel['ms_per_step']:.2f}",
            f"{100 * kernel['share_of_busy']:.1f} %",
        )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_workload_options(parser)
    parser.add_argument("--steps", type=int, default=3, help="recorded steps")
    options = parser.parse_args(arguments)
    check_workload_options(parser, options)
    work = chosen_workload(options)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if options.device == "cuda" else [])
    with TOOLS[SHORT_DOCUMENTS](work, random_model(work, options.device), options.device) as step:
        for number in range(options.warm_up):
            step(number)
        with profile(activities=activities) as recorded:
            for number in range(options.steps):
                step(options.warm_up + number)
            if options.device == "cuda":
                torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        found = summarize(json.loads(path.read_text()), options.device, options.steps)
    if options.json:
        replace_text(options.json, json.dumps(found, indent=1))
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
