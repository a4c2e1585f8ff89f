"""A run directory as a long run on many ranks leaves it, written without training anything."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

START = 1_760_000_000.0
STEP_S = 4.0
MODEL: dict[str, Any] = {
    "family": "llama", "vocab_size": 32_000, "hidden_size": 8192, "intermediate_size": 28_672, "num_layers": 80,
    "num_heads": 64, "num_kv_heads": 8, "head_dim": 128, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "num_parameters": 68_976_648_192,
}  # fmt: skip
SOURCES = {"pubmed": 0.6, "abstracts": 0.3, "guidelines": 0.1}


def iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def write_run(
    run_dir: Path,
    *,
    num_steps: int = 60,
    total_steps: int | None = None,
    tensor: int = 2,
    pipeline: int = 2,
    world_size: int = 8,
    state: str = "done",
    restarts_at: tuple[int, ...] = (),
    power_w: float | None = None,
    **status: Any,
) -> Path:
    """Write config.yaml, metrics.jsonl, status.json and provenance.jsonl. restarts_at: steps after which it was killed;
    it then had done five more. power_w: what each GPU drew, where that was measured. status: further values of
    status.json."""
    run_dir.mkdir(parents=True, exist_ok=True)
    total_steps = total_steps or num_steps
    (run_dir / "config.yaml").write_text(
        yaml.safe_dump(_config(total_steps, tensor, pipeline), sort_keys=False)
    )
    with open(run_dir / "metrics.jsonl", "w") as file:
        for step in range(1, num_steps + 1):
            pause_s = 600 * sum(at < step for at in restarts_at)
            energy = {} if power_w is None else {"energy_j": power_w * STEP_S * world_size}
            file.write(_metrics_line(step, total_steps, START + step * STEP_S + pause_s, energy))
    layout = {"world_size": world_size, "tensor": tensor, "pipeline": pipeline, "virtual_pipeline": 1, "context": 1,
              "sequence": True}  # fmt: skip
    hosts = [f"node{number:02d}" for number in range(max(1, world_size // 8))]
    facts = {"hosts": hosts, "world_size": world_size, "layout": layout, "launcher": "slurm", "job_id": "4711",
             "steps": total_steps}  # fmt: skip
    starts, provenance = [], []
    for number, step in enumerate((0, *restarts_at)):
        began = START + step * STEP_S + 600 * number
        before = {"last_sign_before": iso(began - 300), "last_step_before": step + 5} if number else {}
        why = "the time limit of the job" if number else "first start"
        starts.append({"time": iso(began), "why": why, **before, **facts})
        provenance.append(_provenance(began, step, layout, hosts, world_size))
    ended = START + num_steps * STEP_S + 600 * len(restarts_at)
    values = {"format": "meditron-train-status/1", "run_id": "0123456789abcdef", "state": state, "step": num_steps,
              "last_checkpoint": None, "cause": None, "reason": None, "exit_code": None, "saving_s": 12.5,
              "validation_s": 30.0, **facts, "pid": 1, "starts": starts, "updated": iso(ended), **status}  # fmt: skip
    (run_dir / "status.json").write_text(json.dumps(values))
    (run_dir / "provenance.jsonl").write_text("".join(json.dumps(record) + "\n" for record in provenance))
    return run_dir


def _config(steps: int, tensor: int, pipeline: int) -> dict[str, Any]:
    train = [{"name": name, "path": f"data/{name}", "weight": weight} for name, weight in SOURCES.items()]
    return {
        "model": {"from": "/models/Llama-2-70b-hf"},
        "data": {"tokenizer": "/models/Llama-2-70b-hf", "train": train,
                 "phases": [{"from_step": steps // 2 or 1, "weights": {"pubmed": 0.2, "guidelines": 0.8}}]},
        "parallel": {"tensor": tensor, "pipeline": pipeline, "sequence": True},
        "train": {"steps": steps, "seq_len": 4096, "global_batch_size": 512, "gpu": "a100-80gb"},
    }  # fmt: skip


def _metrics_line(step: int, total_steps: int, moment: float, more: dict[str, float]) -> str:
    spike = 9.0 if step == 7777 else 0.0
    loss = 1.4 + 0.8 * math.exp(-4 * step / total_steps) + 0.05 * math.sin(37 * step) + spike
    record: dict[str, Any] = {
        "step": step, "time": moment, "tokens": step * 512 * 4096, "loss": loss,
        "lr": 3e-4 * (1 - step / (total_steps + 1)), "grad_norm": 0.4 + 0.1 * math.cos(11 * step) + spike,
        "param_norm": 900 + step / total_steps, "num_loss_tokens": 2_000_000,
        "tokens_per_second": 44_000 + 900 * math.sin(step), "step_time_s": STEP_S,
        "data_time_s": 0.02, "forward_backward_time_s": 3.4, "reduce_time_s": 0.4, "update_time_s": 0.1,
        "mfu": 0.43 + 0.01 * math.sin(step), "num_skipped_steps": int(step > 7777),
        "peak_memory_bytes": 68 * 2**30, **more,
        **{f"source_tokens.{name}": int(step * 512 * 4096 * share) for name, share in SOURCES.items()},
    }  # fmt: skip
    if step % max(1, total_steps // 100) == 0:
        record |= {f"validation_loss.{name}": loss + 0.1 for name in SOURCES}
    return json.dumps(record) + "\n"


def _provenance(began: float, step: int, layout: dict, hosts: list[str], world_size: int) -> dict[str, Any]:
    return {
        "time": iso(began + 20),
        "config_sha256": "ab" * 32,
        "git": {"commit": "c0ffee" + "0" * 34, "modified": False},
        "versions": {"meditron-train": "0.1.0", "torch": "2.10.0"},
        "python": "3.11.9",
        "platform": "Linux",
        "data_fingerprints": {"train": "cd" * 32},
        "launch": {"hosts": hosts, "world_size": world_size, "layout": layout, "resumed_after_step": step,
                   "rank_hosts": [hosts[min(rank // 8, len(hosts) - 1)] for rank in range(world_size)],
                   "device": "NVIDIA A100-SXM4-80GB"},
        "command": ["meditron-train", "train", "configs/meditron-70b.yaml"],
        "working_directory": "/work",
        "model": MODEL,
        "tokens_per_epoch": dict.fromkeys(SOURCES, 40_000_000_000),
    }  # fmt: skip
