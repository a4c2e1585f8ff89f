"""Killed at any moment and started again, a build ends in the same bytes."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytest.importorskip("datatrove")

from meditron_train.corpus.json_files import read_json
from tests.commands import Command
from tests.corpus.pipeline.corpora import article, nearly, source, write_jsonl


def _declare(root: Path, output: str) -> Path:
    declared = {
        "name": "killed",
        "output": str(root / output),
        "sources": [
            source("first", root / "first.jsonl", "guidelines", validation=0.2),
            source("second", root / "second"),
        ],
        "decontamination": {"benchmarks": [{"name": "quiz", "path": str(root / "quiz.jsonl")}]},
    }
    path = root / f"{output}.yaml"
    path.write_text(yaml.safe_dump(declared))
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the sources."""
    root = tmp_path_factory.mktemp("kill")
    write_jsonl(root / "first.jsonl", [{"id": f"f{i}", "text": article(i, 30)} for i in range(60)])
    for part in range(4):
        records = [{"id": f"s{part}-{i}", "text": article(100 * part + i + 60, 20)} for i in range(60)]
        records += [{"id": f"n{part}-{i}", "text": nearly(article(10 * part + i, 30), i)} for i in range(10)]
        write_jsonl(root / "second" / f"{part}.jsonl", records)
    write_jsonl(root / "quiz.jsonl", [{"question": article(7, 3)}])
    return root


@pytest.fixture(scope="module")
def whole(sources: Path) -> tuple[Path, dict[str, str], float]:
    """The directory of the sources, the hashes of a build that nobody disturbed, and how long it took."""
    start_s = time.monotonic()
    subprocess.run(_command(_declare(sources, "whole")), check=True, capture_output=True)
    return sources, read_json(sources / "whole" / "manifest.json")["files"], time.monotonic() - start_s


def _words(config: Path) -> list[str]:
    return ["corpus", "build", str(config), "--workers", "2"]


def _command(config: Path) -> list[str]:
    return [sys.executable, "-m", "meditron_train", *_words(config)]


def _kill_and_finish(root: Path, output: str, after_s: list[float]) -> dict[str, str]:
    config = _declare(root, output)
    for seconds in after_s:
        with subprocess.Popen(
            _command(config), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        ) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
            process.kill()  # its workers must notice by themselves
            process.wait()
    done = subprocess.run(_command(config), capture_output=True, text=True, start_new_session=True)
    assert done.returncode == 0, done.stderr
    return dict(read_json(root / output / "manifest.json")["files"])


# What a stage writes first, in the order of the stages, below the output.
STAGES = {
    "scan": ".build/claims/*",
    "read": ".build/read/*",
    "exact": ".build/fates*",
    "sign": ".build/minhash/signatures/*",
    "pair": ".build/minhash/pairs/*",
    "cluster": ".build/clusters*",
    "write": ".build/write/*",
}


def _kill_in_stages(root: Path, output: str) -> list[str]:
    """Start a build for each stage, and kill it when it is there; the stages in which builds were killed."""
    killed, config = [], _declare(root, output)
    for stage, pattern in STAGES.items():
        with subprocess.Popen(
            _command(config), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        ) as process:
            while process.poll() is None and not any((root / output).glob(pattern)):
                time.sleep(0.01)
            if process.poll() is None:
                killed.append(stage)
            process.kill()
    return killed


def _without_name(files: dict[str, str]) -> dict[str, str]:
    """corpus.yaml has the name of its directory."""
    return {name: value for name, value in files.items() if name != "corpus.yaml"}


@pytest.mark.long
def test_the_same_bytes_after_ten_kills(whole: tuple[Path, dict[str, str], float]) -> None:
    root, files, duration_s = whole
    rng = random.Random(10)
    after_s = [rng.uniform(0.1, 1.0) * duration_s for _ in range(10)]
    assert _without_name(_kill_and_finish(root, "killed", after_s)) == _without_name(files)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_same_bytes_after_a_kill_in_every_stage(whole: tuple[Path, dict[str, str], float]) -> None:
    root, files, _ = whole
    assert _kill_in_stages(root, "stages") == list(STAGES)
    assert _without_name(_kill_and_finish(root, "stages", [])) == _without_name(files)


@pytest.mark.long
def test_no_process_outlives_a_killed_build(whole: tuple[Path, dict[str, str], float]) -> None:
    root, _, duration_s = whole
    config = _declare(root, "orphans")
    with subprocess.Popen(
        _command(config), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.6 * duration_s)
        process.kill()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and _alive_in_session(process.pid):
        time.sleep(0.1)
    assert _alive_in_session(process.pid) == []


def _alive_in_session(session: int) -> list[str]:
    """The command lines of a session's processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] not in "ZX":
                found.append(path.with_name("cmdline").read_text().replace("\0", " "))
    return found


def test_a_second_build_in_the_same_directory_is_refused(sources: Path) -> None:
    words, begun = _words(_declare(sources, "busy")), sources / "busy" / ".build"
    first = Command(*words, environment=os.environ)
    try:
        first.wait_until(begun.exists, 60)
        os.kill(first.pid, signal.SIGSTOP)
        second = Command(*words, environment=os.environ)
        assert second.wait(60) == 2, second.stderr
        assert "another build is running" in second.stderr
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)
        first.wait(60)
