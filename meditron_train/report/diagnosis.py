"""Why a run ended, in plain words: from status.json, requeue, the failures of ranks, their logs and heartbeats.

The causes are tried from the most certain to the least: what the run itself said, what its ranks said, what a batch
system wrote into the logs, and last the silence of a rank that was killed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meditron_train.report.status import read_failures, read_requeue, read_status

_LAST_BYTES = 64 * 1024  # of each log: how a run ends stands at its end


@dataclass(frozen=True)
class Diagnosis:
    """What happened to a run.

    Attributes:
        cause: finished, time_limit, stopped, hang, bit_flip, nan, out_of_memory, disk, data_changed, user_error,
            failed, crashed, killed, lost_peer, running_or_killed or unknown.
        summary: one sentence.
        evidence: where it stands: file names and the words found there.
        advice: what to do.
        will_requeue: whether the run itself asks to be started again.
    """

    cause: str
    summary: str
    evidence: tuple[str, ...]
    advice: str
    will_requeue: bool


@dataclass(frozen=True)
class _Pattern:
    cause: str
    regex: re.Pattern[str]
    summary: str
    advice: str


def _pattern(cause: str, regex: str, summary: str, advice: str) -> _Pattern:
    return _Pattern(cause, re.compile(regex, re.IGNORECASE), summary, advice)


_START_AGAIN = "Start the same command again: it continues from the last checkpoint."

# In the order in which they are tried on every text.
_PATTERNS = (
    _pattern(
        "hang",
        r"\bhang in \w",
        "The run hung: a rank stopped taking part.",
        f"{_START_AGAIN} Leave out a host that is named twice; logs/*.stacks.txt show what each thread did.",
    ),
    _pattern(
        "bit_flip",
        r"copies of the same weights differ",
        "Copies of the weights differed: a bit has flipped in memory or in a processor.",
        f"Have the named host's memory and GPU tested, and leave it out. {_START_AGAIN}",
    ),
    _pattern(
        "nan",
        r"steps in a row were skipped|would be rollback \d+ to",
        "The numbers went wrong: too many steps were not finite or anomalous.",
        "Look at the data of these steps (`meditron-train data trace`), lower optimizer.lr, or start from an earlier "
        "checkpoint. Started again unchanged, it ends in the same way.",
    ),
    _pattern(
        "data_changed",
        r"training data has changed|changed since|with another configuration|checkpoint of another model",
        "The data, the model or the configuration is not what the run's checkpoints were made with.",
        "Put back what the message names, or give a new logging.run_dir.",
    ),
    _pattern(
        "disk",
        r"the disk is full|no space left|disk quota|read-only file system|input/output error|needs about .* free",
        "The disk is full or fails.",
        f"Free space (lower checkpoint.keep_last?) or repair the file system. {_START_AGAIN}",
    ),
    _pattern(
        "out_of_memory",
        r"out of memory|out-of-memory|oom[-_ ]?kill|can(?:'t|not) allocate memory|does not fit into the memory",
        "Memory ran out.",
        "Lower train.micro_batch_size or train.seq_len, choose train.recompute=full, raise parallel.tensor or "
        "parallel.pipeline, or ask for more host memory.",
    ),
    _pattern(
        "time_limit",
        r"due to time limit|\bSIGUSR1\b",
        "The time limit of the job came.",
        _START_AGAIN,
    ),
    _pattern(
        "stopped",
        r"due to preemption|\bSIGTERM\b|the file .*stop",
        "The run was asked to stop.",
        _START_AGAIN,
    ),
    _pattern(
        "killed",
        r"node[ _]fail|signal 9|exit(?:ed with)? code:? -9|\bkilled\b",
        "A process was killed, or its node lost.",
        _START_AGAIN,
    ),
)
_LOST_PEER = re.compile(
    r"connection (closed|reset|refused)|broken pipe|nccl|gloo|timed out|DistBackend|heartbeat", re.IGNORECASE
)


def diagnose(run_dir: Path) -> Diagnosis:
    """Explain the last end of the run in `run_dir`, which need not have ended."""
    run_dir = Path(run_dir)
    status, requeue, failures = read_status(run_dir), read_requeue(run_dir), read_failures(run_dir)
    if status is None:
        return _without_status(run_dir)
    state, wants_requeue = status.get("state"), requeue is not None
    where = f"after step {status.get('step')} of {status.get('steps')}"
    if state == "done":
        return Diagnosis(
            "finished", f"The run is finished: all {status.get('steps')} steps are done.", (), "", False
        )
    said = [("requeue", requeue)] if requeue else []
    if state in ("stopped", "failed") and not requeue:
        said.append(("status.json", status.get("reason") or ""))
    found = _explain(said, where, wants_requeue)
    if found is not None:
        return found
    if state in ("stopped", "failed"):
        cause = "user_error" if status.get("exit_code") == 2 else state
        advice = "Do what the message says." if state == "failed" else _START_AGAIN
        text = requeue or status.get("reason") or "no reason is given"
        return Diagnosis(
            cause, f"The run {state} {where}: {_first_line(text)}", _quote(said), advice, wants_requeue
        )
    return _from_ranks(run_dir, status, failures, where) or _silent(run_dir, status, failures, where)


def _explain(texts: Sequence[tuple[str, str]], where: str, will_requeue: bool) -> Diagnosis | None:
    """The first pattern that any of the (source, text) shows."""
    for pattern in _PATTERNS:
        for source, text in texts:
            match = pattern.regex.search(text)
            if match:
                summary = f"{pattern.summary} It was {where}."
                return Diagnosis(
                    pattern.cause,
                    summary,
                    (f"{source}: {_line_around(text, match)}",),
                    pattern.advice,
                    will_requeue,
                )
    return None


def _from_ranks(
    run_dir: Path, status: dict[str, Any], failures: list[dict[str, Any]], where: str
) -> Diagnosis | None:
    """From the exceptions that ended ranks, those that only lost a peer last, and from the logs."""
    own = [failure for failure in failures if not _only_lost_a_peer(failure)]
    texts = [
        (f"rank {failure['rank']} on host {failure['host']}", f"{failure['kind']}: {failure['message']}")
        for failure in own
    ]
    logs = [(str(path.relative_to(run_dir)), text) for path, text in _log_ends(run_dir)]
    found = _explain(texts, where, False) or _explain(logs, where, False)
    if found is not None or not own:
        return found
    first = own[0]
    return Diagnosis(
        "crashed",
        f"Rank {first['rank']} on host {first['host']} crashed {where}: {_first_line(texts[0][1])}",
        (f"logs/rank_{first['rank']:05d}.failure.json has the traceback",),
        f"If it is not a bug, {_START_AGAIN[0].lower()}{_START_AGAIN[1:]}",
        False,
    )


def _silent(run_dir: Path, status: dict[str, Any], failures: list[dict[str, Any]], where: str) -> Diagnosis:
    """Nobody said anything: who is missing among those who at least lost a peer?"""
    world_size = int(status.get("world_size") or 1)
    spoke = {failure["rank"] for failure in failures}
    if spoke:
        hosts = _hosts_of_ranks(run_dir)
        missing = [rank for rank in range(world_size) if rank not in spoke]
        names = (
            ", ".join(f"rank {rank} on host {hosts.get(rank, 'unknown')}" for rank in missing) or "no rank"
        )
        return Diagnosis(
            "killed" if missing else "lost_peer",
            f"The ranks lost each other {where}; {names} ended without a word: killed from outside (kill -9, or by the "
            "kernel for want of memory), or its machine or network was lost.",
            tuple(f"rank {failure['rank']}: {_first_line(failure['message'])}" for failure in failures[:3]),
            f"Look into that host's kernel log (dmesg). {_START_AGAIN}",
            False,
        )
    return Diagnosis(
        "running_or_killed",
        f"The run is going on, or all of it was killed at once, {where}; its last sign is of {status.get('updated')}.",
        (f"process {status.get('pid')} on host {(status.get('hosts') or ['unknown'])[0]} kept status.json",),
        f"If that process is gone: {_START_AGAIN[0].lower()}{_START_AGAIN[1:]}",
        False,
    )


def _without_status(run_dir: Path) -> Diagnosis:
    logs = [(str(path.relative_to(run_dir)), text) for path, text in _log_ends(run_dir)]
    found = _explain(logs, "before it began", False)
    if found is not None:
        return found
    summary = f"There is no status.json in {run_dir}: no run has started here, or it could not write."
    return Diagnosis("unknown", summary, (), "Look at what the command printed.", False)


def _only_lost_a_peer(failure: dict[str, Any]) -> bool:
    return (
        failure["exit_code"] == 1
        and _LOST_PEER.search(f"{failure['kind']}: {failure['message']}") is not None
    )


def _log_ends(run_dir: Path) -> list[tuple[Path, str]]:
    """The ends of all logs, also those that launch scripts put there, the newest first."""
    paths = [path for pattern in ("*.log", "*.out", "*.err") for path in run_dir.glob(f"logs/**/{pattern}")]
    texts = []
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            with open(path, "rb") as file:
                file.seek(max(0, path.stat().st_size - _LAST_BYTES))
                texts.append((path, file.read().decode(errors="replace")))
        except OSError:
            continue
    return texts


def _hosts_of_ranks(run_dir: Path) -> dict[int, str]:
    hosts = {}
    for path in (run_dir / "heartbeats").glob("rank_*.json"):
        try:
            beat = json.loads(path.read_text(encoding="utf-8"))
            hosts[int(beat["rank"])] = str(beat["host"])
        except (OSError, ValueError, KeyError):
            continue
    return hosts


def _line_around(text: str, match: re.Match[str]) -> str:
    start = text.rfind("\n", 0, match.start()) + 1
    end = text.find("\n", match.end())
    return text[start : end if end >= 0 else None].strip()[:400]


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:400]


def _quote(said: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    return tuple(f"{source}: {_first_line(text)}" for source, text in said if text)
