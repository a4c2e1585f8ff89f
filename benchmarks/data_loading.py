"""Packing and loading against megatron-core, an exact best-fit in Python, and memcpy.

    python -m benchmarks.data_loading [--tiny] [--rounds N] [--json FILE]

Everything runs in this one process on one thread, in turns. Rates are per second of CPU time, of the fastest round
and of the median one; a ratio compares the fastest rounds. Files are in a temporary directory and in the page
cache. Bandwidth counts bytes read and bytes written: a token of two bytes becomes 13 (three int32 and a bool), a
copied byte counts twice.
"""

from __future__ import annotations

import argparse
import bisect
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import cycle, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch

from meditron_train.data.index_file import bin_path, idx_path, write_index
from meditron_train.data.indexed import IndexedDataset
from meditron_train.data.loader import StepLoader
from meditron_train.data.packed import BYTES_PER_TOKEN, PackedDataset
from meditron_train.data.packing.batch_schedule import BatchSchedule
from meditron_train.data.sources import Source
from meditron_train.native import packing

SEQ_LEN, VOCAB_SIZE = 4096, 32_000
MICRO_BATCH_SIZE, MICRO_BATCHES = 4, 16
READ_BYTES = 2  # of a stored token
COPY_BYTES = 1 << 18  # at once, into a buffer that stays in the cache as the loader's do


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    documents: int = 10_000_000
    """For packing and the sample index."""
    bisect_documents: int = 100_000
    """For the exact best-fit in Python."""
    short_documents: int = 1_000_000
    """In the file of abstracts, of 340 tokens on average."""
    long_documents: int = 40_000
    """In the file of papers, of 8,000 tokens on average."""
    steps: int = 100
    """Of 64 samples, in one timing of the loader."""
    items: int = 300
    """Of megatron-core's dataset, in one timing."""
    items_with_reset: int = 3


TINY = Size(20_000, 2_000, 20_000, 2_500, 1, 5, 1)


@dataclass(frozen=True)
class Case:
    """One row: `run` does `units` of something. Ratios are to the row named `baseline`."""

    table: str
    name: str
    run: Callable[[], object]
    units: float
    baseline: str | None = None


def megatron() -> SimpleNamespace:
    """What is used of megatron-core's datasets."""
    import_module("meditron_train.mcore")  # first: it makes megatron.core importable without a GPU
    rooms = ("helpers", "gpt_dataset", "indexed_dataset", "utils")
    helpers, gpt, indexed, utils = (import_module(f"megatron.core.datasets.{room}") for room in rooms)
    return SimpleNamespace(
        build_sample_idx=helpers.build_sample_idx,
        GPTDataset=gpt.GPTDataset,
        GPTDatasetConfig=gpt.GPTDatasetConfig,
        IndexedDataset=indexed.IndexedDataset,
        Split=utils.Split,
    )


def log_normal(generator: np.random.Generator, mean: float, sigma: float, count: int) -> np.ndarray:
    lengths = generator.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(lengths, 1, 16 * SEQ_LEN).astype(np.int64)


def exact_best_fit(lengths: Sequence[int], capacity: int) -> int:
    """Bins of best-fit decreasing, one document at a time, with a sorted list of free spaces."""
    space: list[int] = []
    for length in sorted(lengths, reverse=True):
        place = bisect.bisect_left(space, length)
        left = capacity if place == len(space) else space.pop(place)
        bisect.insort(space, left - length)
    return len(space)


def packing_cases(size: Size) -> list[Case]:
    generator = np.random.default_rng(0)
    lengths = np.minimum(log_normal(generator, 340, 0.8, size.documents), SEQ_LEN)
    few = lengths[: size.bisect_documents]
    ours = len(packing.pack_best_fit(few, SEQ_LEN, num_threads=1)[1]) - 1
    exact = exact_best_fit(few.tolist(), SEQ_LEN)
    assert ours == exact, f"{ours} bins instead of {exact}"
    peer = "bisect in Python, exact"
    table = "best-fit decreasing, M documents"
    return [
        Case(table, peer, lambda: exact_best_fit(few.tolist(), SEQ_LEN), len(few) / 1e6),
        Case(
            table,
            "pack_best_fit",
            lambda: packing.pack_best_fit(lengths, SEQ_LEN, num_threads=1),
            len(lengths) / 1e6,
            peer,
        ),
    ]


def sample_index_cases(size: Size) -> list[Case]:
    generator = np.random.default_rng(1)
    lengths = log_normal(generator, 1000, 0.9, size.documents)
    documents = np.arange(len(lengths))
    sizes, num_tokens = lengths.astype(np.int32), int(lengths.sum())
    shuffled = generator.permutation(len(lengths)).astype(np.int32)
    in_order = packing.shuffle_documents(lengths, documents, 1)[1]
    random_state = np.random.RandomState(1)
    build_sample_idx = megatron().build_sample_idx

    def theirs(order: np.ndarray) -> object:
        return build_sample_idx(sizes, order, SEQ_LEN, 1, num_tokens, True, 1)

    def theirs_with_shuffle() -> object:
        order = documents.astype(np.int32)
        random_state.shuffle(order)
        return theirs(order)

    def cut(in_order: np.ndarray) -> object:
        return packing.concat_index(in_order, SEQ_LEN, num_threads=1)

    def ours_with_shuffle() -> object:
        return cut(packing.shuffle_documents(lengths, documents, 1)[1])

    alone, both = "sample index of shuffled documents, M documents", "shuffle and sample index, M documents"
    units = len(lengths) / 1e6
    return [
        Case(alone, "megatron-core", lambda: theirs(shuffled), units),
        Case(alone, "concat_index", lambda: cut(in_order), units, "megatron-core"),
        Case(both, "megatron-core", theirs_with_shuffle, units),
        Case(both, "shuffle_documents + concat_index", ours_with_shuffle, units, "megatron-core"),
    ]


def write_dataset(prefix: Path, lengths: np.ndarray) -> Path:
    generator = np.random.default_rng(2)
    generator.integers(0, VOCAB_SIZE, int(lengths.sum()), dtype=np.uint16).tofile(bin_path(prefix))
    write_index(idx_path(prefix), np.dtype("<u2"), lengths.astype(np.int32))
    return prefix


METHODS: tuple[Literal["concat", "best_fit"], ...] = ("concat", "best_fit")


class Loader:
    """A dataset of one file. What it reads moves on from call to call, so that no cache holds it."""

    def __init__(self, prefix: Path, method: Literal["concat", "best_fit"]) -> None:
        dataset = IndexedDataset(prefix)
        source = Source("source", dataset, np.arange(dataset.num_documents))
        self.dataset = PackedDataset(
            [source], [(0, [1])], packing=method, seq_len=SEQ_LEN, seed=1, vocab_size=VOCAB_SIZE
        )
        schedule = BatchSchedule(MICRO_BATCH_SIZE * MICRO_BATCHES)
        self.steps = StepLoader(self.dataset, schedule, MICRO_BATCH_SIZE, prefetch=0)
        self.bytes = dataset.token_bytes
        for mapped in (dataset.token_bytes, dataset.index_bytes):
            mapped[::4096].max()  # every page is mapped now: that is paid once, not by the batch
        samples = np.arange(self.dataset.samples_per_epoch // 8 * 8).reshape(-1, 1, 8)
        plans = [self.dataset.job(numbers).arguments for numbers in samples[:2000]]
        self._plans = cycle([(*plan[:5], *plans[0][5:]) for plan in plans])  # all into the same arrays
        self._at = cycle(range(0, len(self.bytes) - COPY_BYTES, COPY_BYTES))

    def take(self, count: int) -> None:
        """Steps of 16 micro-batches of 4 samples, gathered in the caller's thread."""
        for _ in range(count):
            next(self.steps)

    def gather(self, num_samples: int) -> None:
        """The C++ part of `take` alone, 8 samples at a time: no planning, no tensors."""
        for plan in islice(self._plans, num_samples // 8):
            packing.gather(*plan)

    def copy(self, num_bytes: int) -> None:
        buffer = np.empty(COPY_BYTES, dtype=np.uint8)
        for at in islice(self._at, num_bytes // COPY_BYTES):
            buffer[:] = self.bytes[at : at + COPY_BYTES]


def loading_cases(size: Size, directory: Path) -> list[Case]:
    generator = np.random.default_rng(3)
    files = {
        "abstracts": log_normal(generator, 340, 0.8, size.short_documents),
        "papers": log_normal(generator, 8000, 0.6, size.long_documents),
    }
    num_samples = size.steps * MICRO_BATCHES * MICRO_BATCH_SIZE
    num_tokens = num_samples * SEQ_LEN
    cases = []
    for name, lengths in files.items():
        prefix = write_dataset(directory / name, lengths)
        table = f"packed batches of {name}, M tokens"
        for reset, items in ((False, size.items), (True, size.items_with_reset)):
            peer = MegatronItems(prefix, len(lengths), reset)
            what = "megatron-core GPTDataset" + (", masks and positions reset" if reset else "")
            cases.append(Case(table, what, partial(peer.take, items), items * SEQ_LEN / 1e6))
        copied = num_tokens * READ_BYTES
        bandwidth = f"bandwidth on {name}, GB read and written"
        loaders = {method: Loader(prefix, method) for method in METHODS}
        memcpy = Case(
            bandwidth,
            "memcpy",
            partial(loaders["concat"].copy, copied),
            2 * copied / 1e9,
        )
        cases.append(memcpy)
        for method, loader in loaders.items():
            cases += [
                Case(table, f"our loader, {method}", partial(loader.take, size.steps), num_tokens / 1e6,
                     "megatron-core GPTDataset, masks and positions reset"),
                Case(bandwidth, f"our loader, {method}", partial(loader.gather, num_samples),
                     num_tokens * (READ_BYTES + BYTES_PER_TOKEN) / 1e9, "memcpy"),
            ]  # fmt: skip
    return cases


class MegatronItems:
    """Samples of megatron-core's GPT dataset, one after the other."""

    def __init__(self, prefix: Path, num_documents: int, reset: bool) -> None:
        datasets = megatron()
        config = datasets.GPTDatasetConfig(
            random_seed=1,
            sequence_length=SEQ_LEN,
            blend=([str(prefix)], None),
            split="1,0,0",
            path_to_cache=str(prefix.parent / "megatron-cache"),
            reset_position_ids=reset,
            reset_attention_mask=reset,
            eod_mask_loss=reset,
            create_attention_mask=reset,
            tokenizer=SimpleNamespace(eod=0, vocab_size=VOCAB_SIZE, unique_identifiers={"class": "none"}),
        )
        documents = np.arange(num_documents, dtype=np.int32)
        dataset = datasets.IndexedDataset(str(prefix))
        self.dataset = datasets.GPTDataset(
            dataset, str(prefix), documents, None, datasets.Split.train, config
        )
        self._next = 0

    def take(self, count: int) -> None:
        for _ in range(count):
            self.dataset[self._next % len(self.dataset)]
            self._next += 1


def measure(cases: Sequence[Case], rounds: int) -> list[list[float]]:
    """CPU seconds of each case: one round to warm up, then `rounds` rounds in turns."""
    times: list[list[float]] = [[] for _ in cases]
    for round_number in range(rounds + 1):
        for case, seconds in zip(cases, times, strict=True):
            start = time.process_time()
            case.run()
            elapsed = max(time.process_time() - start, 1e-9)
            if round_number > 0:
                seconds.append(elapsed)
    return times


def results(cases: Sequence[Case], times: list[list[float]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for case, seconds in zip(cases, times, strict=True):
        best = case.units / min(seconds)
        row = {"table": case.table, "name": case.name, "best": best}
        rows.append(row | {"median": case.units / statistics.median(seconds), "baseline": case.baseline})
    best_of = {(row["table"], row["name"]): row["best"] for row in rows}
    for row in rows:
        baseline = row["baseline"]
        row["ratio"] = row["best"] / best_of[row["table"], baseline] if baseline else None
    return rows


def tables(rows: Sequence[dict]) -> str:
    lines: list[str] = []
    for table in dict.fromkeys(row["table"] for row in rows):
        head = f"\n| {table} per CPU-second | fastest | median | ratio to |\n|---|---|---|---|"
        lines.append(head)
        for row in rows:
            if row["table"] == table:
                ratio = f"{row['ratio']:.2f} {row['baseline']}" if row["ratio"] else ""
                lines.append(f"| {row['name']} | {row['best']:.4g} | {row['median']:.4g} | {ratio} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="small sizes: does it run at all?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write every rate here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    size = TINY if options.tiny else Size()
    with tempfile.TemporaryDirectory() as directory:
        cases = [*packing_cases(size), *sample_index_cases(size), *loading_cases(size, Path(directory))]
        rows = results(cases, measure(cases, options.rounds))
    print(
        f"{size}, seq_len {SEQ_LEN}, {options.rounds} rounds, one thread; numpy {np.__version__}, "
        f"{platform.processor() or platform.machine()}"
    )
    print(tables(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
