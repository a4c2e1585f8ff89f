"""Every figure that one GPU can give, in parts, in less than nine minutes: `python -m benchmarks.gpu.day OUT [--tiny]`.

Each part is a process of its own with a time limit. It leaves OUT/PART.json (status, device, versions, date, seconds,
result) and OUT/PART.log; OUT/table.md has all of them, and OUT/out.tar.gz every file, to be fetched as one. A part that
fails or is stopped keeps what it has found and does not stop the others; the exit status is 1 then. Parts that have
passed on the same device, with the same versions, are not run again: the same command after an interruption continues.
`--tiny` runs all parts with toy sizes on a CPU, to show that they run: its speeds mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import outcomes
from meditron_train.files import read_json_object, replace_text, replacing

TOTAL_S = 525
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Part:
    """One process. `arguments` follow the interpreter; `{result}` in them is the file to write."""

    name: str
    title: str
    limit_s: int
    arguments: tuple[str, ...]


def parts(*, tiny: bool) -> list[Part]:
    module = ("-m", "benchmarks.gpu.")
    toy = ("--tiny", "--device", "cpu") if tiny else ()
    tests: tuple[str, ...] = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
    tests += ("-p", "benchmarks.gpu.outcomes", "--outcomes", "{result}")
    if tiny:
        tests += ("tests/gpu/test_isolation.py", "-k", "not_a_number")
    else:  # the benchmarks are parts of their own
        tests += ("tests/gpu", "--ignore", "tests/gpu/test_benchmark.py", "--timeout", "60")
    few_steps = ("--rounds", "1", "--warm-up", "1" if tiny else "3", "--steps", "1" if tiny else "6")
    few_recorded = ("--warm-up", "2", "--steps", "2")

    def step(batch: int, seq_len: int) -> tuple[str, ...]:
        size = ("--model", "llama2-7b", "--batch", str(batch), "--seq-len", str(seq_len))
        return () if tiny else size

    def run(name: str, *arguments: str) -> tuple[str, ...]:
        return (module[0], module[1] + name, *toy, *arguments, "--json", "{result}")

    return [
        Part("tests", "tests/gpu", 115, tests),
        Part("attention", "Attention", 85, run("attention", "--rounds", "3", "--repeats", "10")),
        Part("step-4096", "Training step, s4096", 140, run("train_step", *few_steps, *step(2, 4096))),
        Part("profile", "Profile of our step, s4096", 60, run("profile", *few_recorded, *step(2, 4096))),
        Part("step-2048", "Training step, s2048", 140, run("train_step", *few_steps, *step(4, 2048))),
    ]


def machine(device: str) -> dict[str, str]:
    """What `benchmarks.gpu.machine` says, from a process of its own: this one takes no memory of the GPU."""
    command = [sys.executable, "-m", "benchmarks.gpu.machine", device]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout)


def run_part(part: Part, out: Path, on: dict[str, str], limit_s: float) -> dict[str, Any]:
    """Run it and keep its record; what a part has written before it failed is kept too."""
    raw, log = out / f"{part.name}.raw", out / f"{part.name}.log"
    raw.unlink(missing_ok=True)
    command = [sys.executable, *(word.replace("{result}", str(raw)) for word in part.arguments)]
    began, problem = time.monotonic(), ""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(limit_s)
            problem = "" if status == 0 else f"exit status {status}"
        except subprocess.TimeoutExpired:
            problem = f"took longer than {limit_s:.0f} s"
        finally:
            if process.poll() is None:  # its ranks too: the session is its own
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    try:
        result = read_result(part, raw)
    except (OSError, ValueError) as error:
        result, problem = None, problem or f"left no result: {error}"
    record = {
        "part": part.name,
        "status": "failed" if problem else "passed",
        "problem": problem,
        "date": date,
        "seconds": round(time.monotonic() - began, 1),
        "machine": on,
        "result": result,
    }
    replace_text(out / f"{part.name}.json", json.dumps(record, indent=1))
    raw.unlink(missing_ok=True)
    return record


def read_result(part: Part, raw: Path) -> dict[str, Any]:
    if part.name != "tests":
        return json.loads(raw.read_text())
    return outcomes.summary(raw)


def passed_before(part: Part, out: Path, on: dict[str, str]) -> dict[str, Any] | None:
    """The record of an earlier run on such a machine that passed, or None."""
    path = out / f"{part.name}.json"
    if not path.is_file():
        return None
    record = read_json_object(path)
    return record if record.get("status") == "passed" and record.get("machine") == on else None


def as_table(part: Part, record: dict[str, Any]) -> str:
    """A section of table.md."""
    lines = [f"## {part.title}", ""]
    lines += [f"{record['machine']['device']}, {record['date']}, {record['seconds']} s: {record['status']}."]
    if record["problem"]:
        lines += ["", f"{record['problem']}; see {part.name}.log."]
    if record["result"]:
        lines += ["", body(part, record["result"])]
    return "\n".join(lines)


def body(part: Part, result: dict[str, Any]) -> str:
    """The result as the part itself would print it."""
    if part.name == "tests":
        names = ("tests", *outcomes.ENDS)
        row = " | ".join(str(result[name]) for name in names)
        listed = "".join(f"\n- failed: `{name}`" for name in result["names_failed"])
        listed += "".join(f"\n- did not end: `{name}`" for name in result["names_unfinished"])
        return f"| {' | '.join(names)} |\n{'|---' * len(names)}|\n| {row} |\n{listed}".rstrip()
    # torch and transformers are imported once all parts have run.
    from benchmarks.gpu import attention, profile, train_step

    if part.name == "attention":
        return f"Useful TFLOP/s; in brackets our speed over the tool's.\n\n{attention.as_markdown(result)}"
    if part.name == "profile":
        return profile.table(result)
    size = (
        f"Llama of {result['parameters'] / 1e9:.2f} B parameters in {result['layers']} layers, "
        f"{result['sequences']} x {result['seq_len']} tokens a step, bf16; the plan counts "
        f"{result['plan_counted_bytes'] / 2**30:.1f} GiB."
    )
    return f"{size}\n\n{train_step.table(result)}"


def pack(out: Path) -> None:
    """All files of OUT as OUT/out.tar.gz."""
    with replacing(out / "out.tar.gz") as file, tarfile.open(fileobj=file, mode="w:gz") as tar:
        for path in sorted(out.iterdir()):
            if path.suffix in (".json", ".log", ".md"):
                tar.add(path, arcname=path.name)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="toy sizes on a CPU")
    parser.add_argument("--only", metavar="PART", action="append", help="this part alone; may be repeated")
    options = parser.parse_args(arguments)
    chosen = parts(tiny=options.tiny)
    names = [part.name for part in chosen]
    if unknown := set(options.only or ()) - set(names):
        parser.error(f"no part is named {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if options.tiny:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # megatron-core would use a GPU that torch sees
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + TOTAL_S
    try:
        on = machine("cpu" if options.tiny else "cuda")
    except subprocess.CalledProcessError:
        parser.exit(2)  # it has said why
    records: dict[str, dict[str, Any]] = {}
    for part in chosen:
        if options.only and part.name not in options.only:
            continue
        record = passed_before(part, out, on)
        again = "" if record is None else " (before)"
        if record is None:
            # A CPU may be busy with other work, and has all the time.
            limit_s = 8 * part.limit_s if options.tiny else max(1, min(part.limit_s, ends - time.monotonic()))
            print(f"{part.name}: at most {limit_s:.0f} s ...", flush=True)
            record = run_part(part, out, on, limit_s)
            pack(out)  # also for whoever stops this process
        records[part.name] = record
        print(f"{part.name}: {record['status']}{again} {record['problem']}".rstrip(), flush=True)
    versions = ", ".join(f"{name} {value}" for name, value in on.items() if name != "device")
    sections = [as_table(part, records[part.name]) for part in chosen if part.name in records]
    text = "\n\n".join([f"# {on['device']}\n\n{versions}.", *sections]) + "\n"
    replace_text(out / "table.md", text)
    pack(out)
    print(f"\n{text}")
    return 1 if any(record["status"] == "failed" for record in records.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
