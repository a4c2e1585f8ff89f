"""Conversion of a synthetic Llama in both directions, against `cp -r` of the same directory: seconds and peak memory.

    python -m benchmarks.convert [--model tiny|7b|70b] [--directory DIR] [--tools NAME,…] [--json FILE]
    python -m benchmarks.convert --dry --model 70b --directory /dev/shm

Creates the model in DIR, measures, and deletes everything it made. Each command is a process of its own, started with
a cold source: all is synced and the source's pages are evicted (posix_fadvise). Time includes fsync of what was
written; peak memory is the kernel's ru_maxrss of the process, mapped pages included.

`--dry` is about memory only: the source is a sparse file of holes, and every file that was written is emptied at once.
All bytes go through the conversions, both ways, but a model of any size needs only a few GB of DIR.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
MODELS = {
    name: dict(zip(_SIZES, sizes, strict=True))
    for name, sizes in {
        "tiny": (1000, 64, 172, 4, 8, 2),
        "7b": (32000, 4096, 11008, 32, 32, 32),
        "70b": (32000, 8192, 28672, 80, 64, 8),
    }.items()
}
OURS = (sys.executable, "-m", "meditron_train", "convert")
MODEL_PROGRAM = (sys.executable, "-m", "benchmarks.convert_model")
TRANSFORMERS = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="bfloat16").save_pretrained(sys.argv[2], max_shard_size="5GB")
"""


@dataclass(frozen=True)
class Measurement:
    """One run of one tool. num_bytes: of the directory that was read."""

    tool: str
    wall_s: float
    cpu_s: float
    peak_num_bytes: int
    num_bytes: int


def measure(tool: str, command: Sequence[str], source: Path, target: Path, *, syncs: bool) -> Measurement:
    """Run a command that makes `target` from `source`, cold, and remove nothing. `syncs`: it does so itself."""
    evict(source)
    start = time.perf_counter()
    process = subprocess.Popen([*command, str(source), str(target)])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{tool} failed with exit code {process.returncode}")
    if not syncs:
        sync(target)
    wall_s = time.perf_counter() - start
    cpu_s = usage.ru_utime + usage.ru_stime
    return Measurement(tool, wall_s, cpu_s, usage.ru_maxrss * 1024, directory_size(source))


def evict(directory: Path) -> None:
    """Drop the pages of all files below a directory from the cache; they are synced first, as dirty ones stay."""
    os.sync()
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sync(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def directory_size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def create(model: str, directory: Path, *options: str) -> None:
    """In a process of its own: a parent that has imported torch would show in its children's ru_maxrss."""
    subprocess.run([*MODEL_PROGRAM, "create", model, str(directory), *options], check=True)


def compare(model: str, work: Path, tools: Sequence[str]) -> list[Measurement]:
    """All tools, one after the other; what each wrote is removed before the next."""
    hf, checkpoint, target = work / "hf", work / "checkpoint", work / "target"
    create(model, hf)
    results = []

    def take(tool: str, command: Sequence[str], source: Path, *, syncs: bool, keep: bool = False) -> None:
        results.append(measure(tool, command, source, target, syncs=syncs))
        print(row(results[-1]), file=sys.stderr, flush=True)
        if keep:
            target.rename(checkpoint)
        else:
            shutil.rmtree(target)

    runs: dict[str, Callable[[], None]] = {
        "cp-hf": lambda: take("cp -r (HF)", ["cp", "-r"], hf, syncs=False),
        "to": lambda: take(
            "hf-to-megatron --max-ram 2GiB",
            [*OURS, "hf-to-megatron", "--max-ram", "2GiB"],
            hf,
            syncs=True,
            keep=True,
        ),
        "cp-checkpoint": lambda: take("cp -r (sharded)", ["cp", "-r"], checkpoint, syncs=False),
        "from": lambda: take(
            "megatron-to-hf --max-ram 2GiB",
            [*OURS, "megatron-to-hf", "--max-ram", "2GiB"],
            checkpoint,
            syncs=True,
        ),
        "transformers": lambda: take(
            "transformers from_pretrained + save_pretrained",
            [sys.executable, "-c", TRANSFORMERS],
            hf,
            syncs=False,
        ),
    }
    for tool in tools:
        runs[tool]()
    return results


def compare_dry(model: str, work: Path) -> list[Measurement]:
    hf, checkpoint, target = work / "hf", work / "checkpoint", work / "target"
    create(model, hf, "--sparse")
    results = []
    for action, source, made in (("to-sharded", hf, checkpoint), ("to-hf", checkpoint, target)):
        command = [*MODEL_PROGRAM, action]
        results.append(measure(f"{action}, dry, --max-ram 2GiB", command, source, made, syncs=True))
        print(row(results[-1]), file=sys.stderr, flush=True)
    return results


def row(result: Measurement) -> str:
    return (
        f"| {result.tool} | {result.wall_s:.1f} | {result.num_bytes / result.wall_s / 1e6:.0f} | {result.cpu_s:.1f} "
        f"| {result.peak_num_bytes / 2**30:.2f} |"
    )


def table(results: Sequence[Measurement]) -> str:
    head = "| | wall s | MB/s | CPU s | peak memory GiB |\n|---|---|---|---|---|"
    return "\n".join([head, *map(row, results)])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="7b")
    parser.add_argument("--directory", type=Path, default=Path("."), help="where there is room for 3 copies")
    parser.add_argument("--tools", default="cp-hf,to,cp-checkpoint,from,transformers")
    parser.add_argument("--dry", action="store_true", help="holes for a source, output not kept")
    parser.add_argument("--json", type=Path, help="also write the measurements here")
    options = parser.parse_args(arguments)
    work = options.directory / f"benchmark-convert-{os.getpid()}"
    work.mkdir(parents=True)
    try:
        if options.dry:
            results = compare_dry(options.model, work)
        else:
            results = compare(options.model, work, options.tools.split(","))
    finally:
        shutil.rmtree(work)
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1))


if __name__ == "__main__":
    main()
