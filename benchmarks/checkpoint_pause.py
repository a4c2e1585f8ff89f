"""How long training pauses for a checkpoint: saved synchronously, and saved in the background.

    python -m benchmarks.checkpoint_pause [--size tiny|100m] [--ranks N] [--rounds N] [--dir DIR] [--json FILE]

The pause is everything the training threads do for a checkpoint: copying or sharing the state, starting the writers,
and, when the files are written, publishing. A round is one checkpoint saved at once, then one in the background with
training steps meanwhile; the pauses are of the slowest rank. Steps taken while the writers run show what they cost.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SHAPES = {
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=256),
    "100m": dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=8, vocab_size=32000),
}
SEQ_LEN = {"tiny": 32, "100m": 64}


def make_plan(size: str, precision: str, directory: Path, world_size: int) -> Any:
    """A run's plan without its data: what saving needs to know."""
    from tokenizers import Tokenizer, models

    from meditron_train.checkpoint.hf.config import model_config_from_hf
    from meditron_train.config.schema import Config
    from meditron_train.train.setup import Plan

    tokenizer = directory / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")).save(str(tokenizer / "tokenizer.json"))
    shape = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SHAPES[size]}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512}
    shape |= {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu"}
    config = Config.model_validate(
        {
            "model": {"init": "random", "hf_config": shape},
            "data": {"tokenizer": str(tokenizer), "train": [{"name": "none", "path": "none"}]},
            "train": {"precision": precision, "seq_len": SEQ_LEN[size], "device": "cpu"},
            "checkpoint": {"keep_last": 1},
        }
    )
    return Plan(
        config=config,
        model=model_config_from_hf(shape),
        num_new_tokens=0,
        layout=config.parallel.layout(world_size),
        train_data=SimpleNamespace(fingerprint_until=lambda num_samples: "none"),  # type: ignore[arg-type]
        validation_data={},
        validation_tasks=(),
    )


def measure_rank(
    rank: int, world_size: int, port: int, options: argparse.Namespace, directory: Path, results: Any
) -> None:
    """One rank of the measurement; rank 0 puts {mode: [seconds]} into `results`."""
    import torch

    from meditron_train.checkpoint.weight_sources import RandomSource
    from meditron_train.parallel import destroy, initialize
    from meditron_train.report.status import RunStatus
    from meditron_train.train.dry_run import invented_batch
    from meditron_train.train.engine import Engine
    from meditron_train.train.guard.step import StepGuard
    from meditron_train.train.progress import Progress
    from meditron_train.train.saving.run_checkpoints import RunCheckpoints

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    plan = make_plan(options.size, options.precision, directory / str(rank), world_size)
    mesh = initialize(plan.layout, rank=rank, local_rank=rank, device="cpu")
    status = RunStatus(directory, enabled=False)
    checkpoints = {
        mode: RunCheckpoints(_with_mode(plan, mode), mesh, directory / "checkpoints", status)
        for mode in ("sync", "async")
    }
    engine = Engine(plan.config, plan.model, mesh, RandomSource(plan.model, 1))
    guard = StepGuard(engine, plan.config.resilience, ["host"] * world_size, ())
    batch = invented_batch(SEQ_LEN[options.size], 1, plan.model.vocab_size)
    step, times = 0, {"sync": [], "async": [], "step": [], "step while writing": []}  # type: ignore[var-annotated]

    def train() -> float:
        start = time.monotonic()
        guard.take_step(1, [batch], 1e-4, seconds_waited_for_data=0.0, is_saved=False)
        return time.monotonic() - start

    def slowest(seconds: float) -> float:
        return mesh.max_over_ranks([seconds])[0]

    for round_number in range(options.rounds + 1):  # the first one warms up: plans, queues, page cache
        measured: dict[str, float] = {}
        times_of_steps = [slowest(train()) for _ in range(3)]
        while_writing = []
        for mode, saver in checkpoints.items():
            step += 1
            start = time.monotonic()
            saver.save(engine, Progress(step=step))
            pause = time.monotonic() - start
            while saver.is_writing:
                while_writing.append(slowest(train()))
                start = time.monotonic()
                saver.finish(wait=False)
                pause += time.monotonic() - start
            measured[mode] = slowest(pause)
        if round_number:
            for mode, seconds in measured.items():
                times[mode].append(seconds)
            times["step"] += times_of_steps
            times["step while writing"] += while_writing
    for saver in checkpoints.values():
        saver.close()
    if rank == 0:
        files = (directory / "checkpoints").glob("step_*/*")
        results.put(
            {"times": times, "num_bytes": sum(file.stat().st_size for file in files if file.is_file())}
        )
    destroy()


def _with_mode(plan: Any, mode: str) -> Any:
    settings = plan.config.checkpoint.model_copy(update={"async_save": mode == "async"})
    return replace(plan, config=plan.config.model_copy(update={"checkpoint": settings}))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--ranks", type=int, default=2, help="data-parallel ranks")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="where to write (default: a temporary directory, removed)")
    parser.add_argument("--json", type=Path, help="also write every time here")
    options = parser.parse_args(arguments)

    directory = Path(tempfile.mkdtemp(prefix="checkpoint-pause-", dir=options.dir))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    try:
        ranks = []
        for rank in range(options.ranks):
            (directory / str(rank)).mkdir()
            ranks.append(
                context.Process(
                    target=measure_rank, args=(rank, options.ranks, port, options, directory, results)
                )
            )
            ranks[-1].start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit(f"ranks ended with {[process.exitcode for process in ranks]}")
        found = results.get()
    finally:
        shutil.rmtree(directory)
    times = found["times"]
    median = {name: statistics.median(seconds) if seconds else 0.0 for name, seconds in times.items()}
    print(
        f"{options.size} model, {options.precision}, {options.ranks} data-parallel ranks, {options.rounds} rounds, "
        f"{found['num_bytes'] / 1e6:.1f} MB\n\n| | median pause, s | least | most |\n|---|---|---|---|"
    )
    for mode, name in (("sync", "saved at once"), ("async", "saved in the background")):
        print(f"| {name} | {median[mode]:.3f} | {min(times[mode]):.3f} | {max(times[mode]):.3f} |")
    print(
        f"\nratio of the medians {median['async'] / median['sync']:.3f}; a step takes {median['step']:.3f} s, "
        f"{median['step while writing']:.3f} s while the writers run"
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
