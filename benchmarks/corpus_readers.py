"""Parsing of PubMed Central's articles and MEDLINE's citations against pubmed-parser, and the memory of every reader.

    pip install -e '.[corpus,bench]'
    python -m benchmarks.corpus_readers [--tiny] [--rounds N] [--json FILE]

Both read the same generated files, part by part in turns, in one process on one core; rates are by CPU time, of the
fastest round of each part, so that a machine that is busy now and then treats both alike.
What pubmed-parser has to do is what our document contains. Articles: metadata, paragraphs, captions, tables and
references (parse_pubmed_xml, parse_pubmed_paragraph, parse_pubmed_caption, parse_pubmed_table,
parse_pubmed_references); beside it only the first two. Citations: parse_medline_xml with its defaults, which also
collects MeSH terms and authors. Memory is the peak resident size of a fresh process that reads one large file.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.corpus_articles import Writer, write_bundle, write_medline
from meditron_train.corpus.document import Document

_MEMORY_OF = """
import importlib, json, re, sys
reader = importlib.import_module("meditron_train.corpus.readers." + sys.argv[1])
options = {"path": sys.argv[2]}
counts = {}
for shard in reader.shards(options):
    for claim in reader.scan(shard, options):
        pass
    for item in reader.read(shard, options):
        kind = getattr(item, "reason", None)
        counts[str(kind) if kind else "documents"] = counts.get(str(kind) if kind else "documents", 0) + 1
# Not ru_maxrss, which begins with the size of the process that started this one.
peak_kib = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
print(json.dumps({"peak_mib": peak_kib / 1024, "counts": counts}))
"""


def read_all(reader: str, path: Path) -> int:
    """The number of documents of a source."""
    module, options = importlib.import_module(f"meditron_train.corpus.readers.{reader}"), {"path": str(path)}
    items = [item for shard in module.shards(options) for item in module.read(shard, options)]
    assert all(isinstance(item, Document) for item in items), [
        i for i in items if not isinstance(i, Document)
    ][:3]
    return len(items)


def peer_articles(paths: list[Path], *, everything: bool) -> int:
    import pubmed_parser

    for path in map(str, paths):
        pubmed_parser.parse_pubmed_xml(path)
        pubmed_parser.parse_pubmed_paragraph(path, all_paragraph=True)
        if everything:
            pubmed_parser.parse_pubmed_caption(path)
            pubmed_parser.parse_pubmed_table(path)
            pubmed_parser.parse_pubmed_references(path)
    return len(paths)


def peer_citations(path: Path) -> int:
    import pubmed_parser

    return sum(1 for _ in pubmed_parser.parse_medline_xml(str(path)))


def fastest(
    functions: dict[str, Callable[[Path], int]], parts: list[Path], rounds: int
) -> dict[str, tuple[float, int]]:
    """CPU seconds of the fastest round of each part together, and the records read; the functions take turns."""
    times: dict[tuple[str, Path], tuple[float, int]] = {}
    for _ in range(rounds):
        for part in parts:
            for name, function in functions.items():
                begin = time.process_time()
                records = function(part)
                spent_s = time.process_time() - begin
                times[name, part] = min(times.get((name, part), (spent_s, records)), (spent_s, records))
    return {
        name: (sum(times[name, part][0] for part in parts), sum(times[name, part][1] for part in parts))
        for name in functions
    }


def write_articles(root: Path, count: int, seed: int) -> list[Path]:
    writer = Writer(seed)
    paths = []
    for number in range(1, count + 1):
        folder = root / f"PMC{number}.1"
        folder.mkdir(parents=True)
        paths.append(folder / f"PMC{number}.1.xml")
        paths[-1].write_text(writer.article(number))
        (folder / f"PMC{number}.1.json").write_text(
            json.dumps({"pmcid": f"PMC{number}", "license_code": "CC BY"})
        )
    return paths


def speed(
    directory: Path, *, articles: int, medline_bytes: int, rounds: int, num_parts: int = 10
) -> list[dict[str, Any]]:
    files: dict[Path, list[Path]] = {}
    medline: list[Path] = []
    citations = 0
    for part in range(num_parts):
        folder = directory / f"pmc-{part}"
        files[folder] = write_articles(folder, articles // num_parts, seed=part)
        medline.append(directory / f"pubmed26n{part:04d}.xml.gz")
        citations += write_medline(medline[-1], medline_bytes // num_parts, seed=part)
    article_mb = sum(path.stat().st_size for paths in files.values() for path in paths) / 1e6
    rows = []
    for what, parts, megabytes, records, functions in (
        (
            "articles",
            list(files),
            article_mb,
            articles // num_parts * num_parts,
            {
                "ours": lambda part: read_all("pmc", part),
                "pubmed-parser": lambda part: peer_articles(files[part], everything=True),
                "pubmed-parser, metadata and paragraphs": lambda part: peer_articles(
                    files[part], everything=False
                ),
            },
        ),
        (
            "citations",
            medline,
            medline_bytes / 1e6,
            citations,
            {"ours": lambda part: read_all("medline", part), "pubmed-parser": peer_citations},
        ),
    ):
        times = fastest(functions, parts, rounds)
        ours_s = times["ours"][0]
        for name, (spent_s, found) in times.items():
            assert found == records, f"{name} read {found} of {records} {what}"
            rows.append(
                {
                    "what": what,
                    "who": name,
                    "mb_per_s": megabytes / spent_s,
                    "records_per_s": records / spent_s,
                    "ratio": spent_s / ours_s,
                }
            )
    return rows


def memory(directory: Path, num_bytes: int) -> list[dict[str, Any]]:
    """The peak of a process that reads a file of num_bytes, for each kind of file."""
    directory.mkdir()
    cases: list[tuple[str, str, Path]] = []

    def case(what: str, reader: str, name: str) -> Path:
        cases.append((what, reader, directory / name))
        return directory / name

    write_medline(case("citations, one file", "medline", "a.xml.gz"), num_bytes)
    write_bundle(case("articles, one bundle", "pmc_bundles", "b.tar.gz"), num_bytes)
    huge = case("one article", "pmc", "c") / "PMC1.1"
    huge.mkdir(parents=True)
    (huge / "PMC1.1.json").write_text('{"pmcid": "PMC1"}')
    write_large_article(huge / "PMC1.1.xml", num_bytes)
    limit = case("one article of 16 MB", "pmc", "d") / "PMC1.1"
    limit.mkdir(parents=True)
    (limit / "PMC1.1.json").write_text('{"pmcid": "PMC1"}')
    write_large_article(limit / "PMC1.1.xml", 16_000_000 * num_bytes // 200_000_000)
    with open(case("JSON lines, one line", "jsonl", "e.jsonl"), "wb") as file:
        file.write(b'{"text": "' + b"word " * (num_bytes // 5) + b'"}\n')
    with open(case("JSON lines, many lines", "jsonl", "f.jsonl"), "wb") as file:
        for _ in range(num_bytes // 2015):
            file.write(b'{"text": "' + b"word " * 400 + b'"}\n')
    rows = []
    for what, reader, path in cases:
        command = [sys.executable, "-c", _MEMORY_OF, reader, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append({"what": what, **json.loads(done.stdout)})
    return rows


def write_large_article(path: Path, num_bytes: int) -> None:
    """One article with as many paragraphs as make up the size."""
    writer = Writer(2)
    paragraph = writer.paragraph(5)
    with open(path, "w") as file:
        file.write('<article xmlns:mml="http://www.w3.org/1998/Math/MathML"><body>')
        for _ in range(num_bytes // len(paragraph)):
            file.write(paragraph)
        file.write("</body></article>")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a trial run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the result here, too")
    arguments = parser.parse_args()
    articles, medline_bytes, memory_bytes = (
        (10, 200_000, 2_000_000) if arguments.tiny else (150, 20_000_000, 200_000_000)
    )
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        speeds = speed(root, articles=articles, medline_bytes=medline_bytes, rounds=arguments.rounds)
        peaks = memory(root / "memory", memory_bytes)
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}\n")
    print("| | | MB/s | records/s | × ours |\n|---|---|---|---|---|")
    for row in speeds:
        rates = f"{row['mb_per_s']:.1f} | {row['records_per_s']:.0f} | {row['ratio']:.1f}"
        print(f"| {row['what']} | {row['who']} | {rates} |")
    print(f"\n| file of {memory_bytes / 1e6:.0f} MB | peak MiB | read |\n|---|---|---|")
    for row in peaks:
        read = ", ".join(f"{count} {kind}" for kind, count in row["counts"].items())
        print(f"| {row['what']} | {row['peak_mib']:.0f} | {read} |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"speed": speeds, "memory": peaks}, indent=1) + "\n")


if __name__ == "__main__":
    main()
