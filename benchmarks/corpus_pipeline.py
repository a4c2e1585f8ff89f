"""The corpus pipeline: MinHash beside datatrove's own, cost per document as a corpus grows, workers, a projection.

    python -m benchmarks.corpus_pipeline [--documents 10000 30000 100000] [--mean-words 250] [--no-filters]
        [--workers] [--json FILE] [--plot FILE.svg]

Documents are generated: log-normal lengths of 250 words on average, at least 60, invented words among common English
ones, one in ten a near-copy of an earlier one. Rates are per second of CPU time, as the machine may be busy; peers run
in turns in this process on the same documents. --no-filters leaves out what looks at single documents, so that a
million of them fit into less than an hour. --workers compares builds with 1 and 2 workers by the clock: only on an
idle machine.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature

from meditron_train.corpus.declaration import Corpus, MinHash
from meditron_train.corpus.pipeline import build as build_module
from meditron_train.corpus.pipeline import execute
from meditron_train.corpus.pipeline.build import build
from meditron_train.corpus.pipeline.near import BoundedSignature, connected, minhash_config
from meditron_train.corpus.pipeline.words import SpacedWords

PAPER_DOCUMENTS, PAPER_TOKENS, CHARS_PER_TOKEN = 21_100_000, 46.7e9, 4.3
PROJECTED_WORKERS = 100
MEAN_WORDS, _SIGMA = 250, 0.5
_COMMON = "the of and to in a is that for with was on as by were be are at from this have or not".split()


def texts(count: int, mean_words: int = MEAN_WORDS, seed: int = 0) -> Iterator[str]:
    """Invented documents; every tenth is an earlier one with two words changed."""
    rng = random.Random(seed)
    syllables = [consonant + vowel for consonant in "bcdfglmnprstvz" for vowel in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(2, 5))) for _ in range(40_000)]
    earlier: list[list[str]] = []
    for number in range(count):
        if number % 10 == 9 and earlier:
            text = list(rng.choice(earlier))
            for _ in range(2):
                text[rng.randrange(len(text))] = rng.choice(words)
        else:
            length = max(60, int(rng.lognormvariate(math.log(mean_words) - _SIGMA**2 / 2, _SIGMA)))
            text = rng.choices(_COMMON, k=length)
            for place in range(length):
                if rng.random() < 0.6:
                    text[place] = words[int(rng.paretovariate(0.6)) % len(words)]
            if len(earlier) < 2_000:
                earlier.append(text)
        for place in range(15, len(text), 15):
            text[place] = text[place].rstrip(".") + "."
        yield " ".join(text)


@contextmanager
def cpu_time(into: dict[str, float], name: str) -> Iterator[None]:
    start = time.process_time()
    yield
    into[name] = into.get(name, 0.0) + time.process_time() - start


def minhash(count: int, root: Path) -> dict[str, Any]:
    """Signatures and clusters by datatrove's classes and by ours, on the same documents and words."""
    documents = list(texts(count))
    num_chars, config = sum(map(len, documents)), minhash_config(MinHash())
    seconds: dict[str, float] = {}
    for part in range(10):  # in turns, so that both meet the same machine
        some = documents[part::10]
        for name, kind in (("datatrove", MinhashDedupSignature), ("ours", BoundedSignature)):
            step = kind(str(root / name), config, language=SpacedWords())
            with cpu_time(seconds, f"sign {name}"):
                step.run((Document(text=text, id="") for text in some), part)
    files = sorted(path.relative_to(root / "ours") for path in (root / "ours").rglob("*.sig"))
    same = all(
        (root / "ours" / path).read_bytes() == (root / "datatrove" / path).read_bytes() for path in files
    )
    for bucket in range(config.num_buckets):
        step = MinhashDedupBuckets(
            str(root / "ours"), str(root / "pairs"), config=config, lines_to_buffer=1024
        )
        with cpu_time(seconds, "pair"):
            step.run(None, bucket, config.num_buckets)
    with cpu_time(seconds, "cluster datatrove"):
        MinhashDedupCluster(
            str(root / "pairs"), str(root / "clusters"), config=config, lines_to_buffer=1024
        ).run(None, 0, 1)
    firsts = [part * len(documents[0::10]) for part in range(10)]
    with cpu_time(seconds, "cluster ours"):
        members, roots = connected(sorted((root / "pairs").glob("*.dups")), firsts, len(documents))
    removed = sum(path.stat().st_size // 4 for path in (root / "clusters").glob("*.remove"))
    return {
        "documents": count,
        "mb": num_chars / 1e6,
        "same_signatures": same,
        "removed": [int(np.count_nonzero(members != roots)), removed],
        "cpu_s": seconds,
        "ratio_sign": seconds["sign datatrove"] / seconds["sign ours"],
        "ratio_cluster": seconds["cluster datatrove"] / seconds["cluster ours"],
    }


def declare(root: Path, count: int, mean_words: int = MEAN_WORDS, *, filters: bool = True) -> Corpus:
    """Eight files of the generated documents."""
    folder = root / "documents"
    folder.mkdir(parents=True, exist_ok=True)
    files = [open(folder / f"{part}.jsonl", "w") for part in range(8)]  # noqa: SIM115 (closed below)
    for number, text in enumerate(texts(count, mean_words)):
        files[number % 8].write(json.dumps({"id": number, "text": text}) + "\n")
    for file in files:
        file.close()
    source = {
        "name": "generated",
        "part": "papers",
        "reader": "jsonl",
        "path": folder,
        "options": {"id_key": "id"},
        "license": "CC0-1.0",
        "redistribution": True,
        "citation": "generated",
    }
    # Language identification and Gopher's rules take their time, but may drop nothing: words are invented.
    rules: dict[str, Any] = {
        "language": {"min_probability": 0.0, "keep": _all_languages()},
        "quality": {"min_stop_words": 0},
    }
    if not filters:
        rules = {name: {"enabled": False} for name in ("length", "language", "repetition", "quality")}
    return Corpus.model_validate(
        {"name": "generated", "output": root / "out", "sources": [source], "filters": rules}
    )


def _all_languages() -> list[str]:
    from meditron_train.corpus.pipeline.filters import _identifier

    return [str(label) for label in _identifier().labels]


def growth(count: int, root: Path, mean_words: int, *, filters: bool) -> dict[str, Any]:
    """CPU seconds of each stage of a build by one worker."""
    corpus = declare(root, count, mean_words, filters=filters)
    seconds: dict[str, float] = {}
    original = execute.run_stage

    def timed(stage: Any, *arguments: Any) -> None:
        with cpu_time(seconds, stage.name):
            original(stage, *arguments)

    build_module.run_stage = timed  # type: ignore[attr-defined,assignment]
    start = time.process_time()
    try:
        manifest = build(corpus)
    finally:
        build_module.run_stage = original  # type: ignore[attr-defined]
    total = time.process_time() - start
    seconds["alone"] = total - sum(seconds.values())  # what one process does: exact, cluster, publish
    (source,) = manifest["sources"]
    return {
        "documents": count,
        "mb": source["read"]["chars"] / 1e6,
        "dropped": source["dropped"],
        "cpu_s": seconds,
        "us_per_document": {name: 1e6 * value / count for name, value in seconds.items()}
        | {"all": 1e6 * total / count},
    }


def growth_plot(rows: list[dict[str, Any]]) -> str:
    """SVG: CPU microseconds per document, all stages and the dearest ones, over the number of documents (log)."""
    left, top, width, height = 60, 20, 420, 240
    largest = max(row["us_per_document"]["all"] for row in rows) * 1.1
    first, last = math.log10(rows[0]["documents"]), math.log10(rows[-1]["documents"])

    def place(row: dict[str, Any], stage: str) -> tuple[float, float]:
        across = (math.log10(row["documents"]) - first) / max(last - first, 1e-9)
        return left + width * across, top + height * (1 - row["us_per_document"][stage] / largest)

    parts = [f'<path d="M{left} {top}V{top + height}H{left + width}" fill="none" stroke="#888"/>']
    for row in rows:
        x = place(row, "all")[0]
        parts.append(
            f'<text x="{x:.0f}" y="{top + height + 18}" text-anchor="middle">{row["documents"]:,}</text>'
        )
    for value in range(0, int(largest), 1000):
        y = top + height * (1 - value / largest)
        parts.append(f'<text x="{left - 6}" y="{y + 4:.0f}" text-anchor="end">{value:,}</text>')
    for stage, color in (("all", "#1f77a4"), ("read", "#c05a1f"), ("sign", "#3a8a3a"), ("write", "#7a4fa0")):
        points = [place(row, stage) for row in rows]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        x, y = points[-1]
        parts.append(f'<text x="{x + 8:.0f}" y="{y + 4:.0f}" fill="{color}">{stage}</text>')
    title = "CPU microseconds per document, by the number of documents"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 70} {top + height + 30}" role="img" '
        f'aria-label="{title}" font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
        f"{''.join(parts)}</svg>\n"
    )


def wall(count: int, workers: int, root: Path) -> float:
    corpus = declare(root, count)
    start = time.monotonic()
    build(corpus, execute.Execution(workers=workers))
    return time.monotonic() - start


def projection(row: dict[str, Any]) -> dict[str, float]:
    """Hours for GAP-Replay on PROJECTED_WORKERS, from the rates of a row.

    Assumes that reading, signing and writing cost by the byte and are shared evenly; buckets cost by the document and
    run on as many tasks as there are buckets; and one process does the rest, by the document. Parsing XML is not in it.
    """
    num_mb = PAPER_TOKENS * CHARS_PER_TOKEN / 1e6
    by_byte = sum(row["cpu_s"].get(name, 0.0) for name in ("scan", "read", "sign", "write")) / row["mb"]
    pairs = row["cpu_s"]["pair"] / row["documents"] * PAPER_DOCUMENTS / min(14, PROJECTED_WORKERS)
    alone = row["cpu_s"]["alone"] / row["documents"] * PAPER_DOCUMENTS
    hours = {"shared": by_byte * num_mb / PROJECTED_WORKERS, "buckets": pairs, "alone": alone}
    return {name: value / 3600 for name, value in hours.items()} | {"all": sum(hours.values()) / 3600}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--mean-words", type=int, default=MEAN_WORDS, help="of a document, for the growth")
    parser.add_argument(
        "--no-filters", action="store_true", help="only what compares documents, and writes them"
    )
    parser.add_argument("--minhash", type=int, default=10_000)
    parser.add_argument("--workers", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="write the growth as SVG here")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        results["minhash"] = found = minhash(arguments.minhash, root / "minhash")
        print(json.dumps(found, indent=1), flush=True)
        results["growth"] = []
        for count in arguments.documents:
            place = root / f"growth-{count}"
            row = growth(count, place, arguments.mean_words, filters=not arguments.no_filters)
            results["growth"].append(row)
            print(json.dumps(row), flush=True)
        if arguments.plot:
            arguments.plot.write_text(growth_plot(results["growth"]))
        results["projection_hours"] = projection(results["growth"][-1])
        print(json.dumps(results["projection_hours"]), flush=True)
        if arguments.workers:
            count = arguments.documents[0]
            results["wall_s"] = {
                workers: wall(count, workers, root / f"wall-{workers}") for workers in (1, 2)
            }
            print(json.dumps(results["wall_s"]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
