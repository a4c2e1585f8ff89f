"""Why a run ended, in plain words: from status.json, requeue, the failures of ranks, their logs and heartbeats.

What the run itself and its ranks said carries its cause as data, and such a text is never searched for words.
Patterns are applied only to what others wrote: CUDA, NCCL, Slurm, the kernel, and only in the logs of the last start.
The causes are tried from the most certain to the least, the last being the silence of a rank that was killed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from meditron_train.errors import Cause, UserError
from meditron_train.files import open_regular, read_json_object
from meditron_train.report.status import LOG_DIR_KEY, MAX_RANKS, read_failures, read_requeue, read_status

_LAST_BYTES = 64 * 1024  # of each log: how a run ends stands at its end


@dataclass(frozen=True)
class Diagnosis:
    """What happened to a run.

    Attributes:
        cause: a value of `Cause`, or what no process says of itself: finished, killed, lost_peer, running_or_killed or
            unknown.
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
class _Said:
    """What a file says about the end: its cause where one of our programs wrote it, None for the words of others."""

    source: str
    text: str
    cause: Cause | None = None

    @property
    def is_foreign(self) -> bool:
        return _is_foreign(self.cause)


_START_AGAIN = "Start the same command again: it continues from the last checkpoint."
_KILLED = "killed"

# Cause -> (what happened, what to do). The others have no words but the run's own.
_EXPLANATIONS: dict[str, tuple[str, str]] = {
    Cause.HANG: (
        "The run hung: a rank stopped taking part.",
        f"{_START_AGAIN} Leave out a host that is named twice; logs/*.stacks.txt show what each thread did.",
    ),
    Cause.REPLICAS_DIFFER: (
        "Copies of the weights differed: a bit has flipped in memory or in a processor.",
        f"Have the named host's memory and GPU tested, and leave it out. {_START_AGAIN}",
    ),
    Cause.BAD_STEPS: (
        "The numbers went wrong: too many steps were not finite or anomalous.",
        "Look at the data of these steps (`meditron-train data trace`), lower optimizer.lr, or start from an earlier "
        "checkpoint. Started again unchanged, it ends in the same way.",
    ),
    Cause.CHANGED: (
        "The data, the model or the configuration is not what the run's checkpoints were made with.",
        "Put back what the message names, or give a new logging.run_dir.",
    ),
    Cause.DISK: (
        "The disk is full or fails.",
        f"Free space (lower checkpoint.keep_last?) or repair the file system. {_START_AGAIN}",
    ),
    Cause.OUT_OF_MEMORY: (
        "Memory ran out.",
        "Lower train.micro_batch_size or train.seq_len, choose train.recompute=full, raise parallel.tensor or "
        "parallel.pipeline, or ask for more host memory.",
    ),
    Cause.TIME_LIMIT: ("The time limit of the job came.", _START_AGAIN),
    Cause.TERMINATED: ("The batch system, or a person, ended the run.", _START_AGAIN),
    Cause.STOP_FILE: ("A person asked the run to stop.", _START_AGAIN),
    Cause.INTERRUPTED: ("The run was stopped by Ctrl-C.", _START_AGAIN),
    Cause.DIRECTORY_IN_USE: (
        "Another run has the directory.",
        "Wait for it, end it, or give this one its own logging.run_dir.",
    ),
    _KILLED: ("A process was killed, or its node lost.", _START_AGAIN),
}

# The words of others, in the order in which they are tried on every text.
_PATTERNS = tuple(
    (cause, re.compile(regex, re.IGNORECASE))
    for cause, regex in (
        (Cause.DISK, r"no space left|disk quota|read-only file system|input/output error"),
        (Cause.OUT_OF_MEMORY, r"out of memory|out-of-memory|oom[-_ ]?kill|can(?:'t|not) allocate memory"),
        (Cause.TIME_LIMIT, r"due to time limit"),
        (Cause.TERMINATED, r"due to preemption"),
        (_KILLED, r"node[ _]fail|signal 9|exit(?:ed with)? code:? -9|\bkilled\b"),
    )
)
_LOST_PEER = re.compile(
    r"connection (closed|reset|refused)|broken pipe|nccl|gloo|timed out|DistBackend|heartbeat", re.IGNORECASE
)
# What our logger and our batch script write between the words of others: a warning that a disk was full for a while
# ends no run.
_OWN_LOG = re.compile(r"rank_\d+\.log|wandb\.log")
_OWN_LINE = re.compile(
    r"^(?:\d\d:\d\d:\d\d (?:\[rank \d+\] )?[A-Z]+ |\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] job ).*\n?",
    re.MULTILINE,
)
# Before the words of a start: of launch/node.sh in the log of a rank, of launch/train.sbatch in that of the job.
_START_LINE = re.compile(
    r"^(?:==== .* rank \d+ of \d+, rendezvous .* ====|\[[^\]]*\] job \S+: training on .*)$", re.MULTILINE
)


def diagnose(run_dir: Path) -> Diagnosis:
    """Explain the last end of the run in `run_dir`, which need not have ended."""
    run_dir = Path(run_dir)
    status, requeue, failures = read_status(run_dir), read_requeue(run_dir), read_failures(run_dir)
    if status is None:
        return _without_status(run_dir)
    state = status.get("state")
    where = _where(status)
    if state == "done":
        return Diagnosis(
            "finished", f"The run is finished: all {status.get('steps')} steps are done.", (), "", False
        )
    if requeue is not None:
        said = _Said("requeue", requeue.reason, requeue.cause)
    elif state in ("stopped", "failed"):
        said = _Said("status.json", status.get("reason") or "", _cause(status))
    else:
        return _from_ranks(run_dir, status, failures, where) or _silent(run_dir, status, failures, where)
    found = _explain([said], where, requeue is not None)
    if found is not None:
        return found
    advice = "Do what the message says." if state == "failed" else _START_AGAIN
    text = _first_line(said.text) or "no reason is given"
    evidence = (f"{said.source}: {text}",) if said.text else ()
    cause = said.cause or (Cause.FAILED if state == "failed" else Cause.CRASHED)
    return Diagnosis(cause.value, f"The run {state} {where}: {text}", evidence, advice, requeue is not None)


def _where(status: dict[str, Any]) -> str:
    if status.get("step") is None:
        return "before the first step" + (" of this start" if len(status["starts"]) > 1 else "")
    return f"after step {status['step']} of {status.get('steps')}"


def _cause(record: dict[str, Any]) -> Cause | None:
    """The cause in a file of ours: None where it has none, FAILED for one that only a later version knows."""
    value = record.get("cause")
    if value is None:
        return None
    try:
        return Cause(str(value))
    except ValueError:
        return Cause.FAILED


def _is_foreign(cause: Cause | None) -> bool:
    """Whether the text beside `cause` may be searched for words.

    A text with a cause of ours may not. CRASHED is the exception: it goes with the text of an exception that others
    wrote (CUDA, NCCL, gloo), which nothing but its words tells apart.
    """
    return cause in (None, Cause.CRASHED)


def _explain(said: Sequence[_Said], where: str, will_requeue: bool) -> Diagnosis | None:
    """The first cause that has an explanation, else the first pattern that any text of others shows."""
    for one in said:
        if one.cause in _EXPLANATIONS:
            return _explanation(one.cause, where, f"{one.source}: {_first_line(one.text)}", will_requeue)
    for cause, regex in _PATTERNS:
        for one in said:
            if one.is_foreign and (match := regex.search(one.text)):
                evidence = f"{one.source}: {_line_around(one.text, match)}"
                return _explanation(cause, where, evidence, will_requeue)
    return None


def _explanation(cause: str, where: str, evidence: str, will_requeue: bool) -> Diagnosis:
    summary, advice = _EXPLANATIONS[cause]
    name = cause.value if isinstance(cause, Cause) else cause
    return Diagnosis(name, f"{summary} It was {where}.", (evidence,), advice, will_requeue)


def _from_ranks(
    run_dir: Path, status: dict[str, Any], failures: list[dict[str, Any]], where: str
) -> Diagnosis | None:
    """From the exceptions that ended ranks, those that only lost a peer last, and from the logs."""
    own = [failure for failure in failures if not _only_lost_a_peer(failure)]
    said = [
        _Said(
            f"rank {failure['rank']} on host {failure['host']}",
            f"{failure['kind']}: {failure['message']}",
            _cause(failure),
        )
        for failure in own
    ]
    ours = [i for i, one in enumerate(said) if not one.is_foreign]
    if ours and all(said[i].cause not in _EXPLANATIONS for i in ours):  # before any words, the logs' too
        first, cause = own[ours[0]], said[ours[0]].cause or Cause.FAILED
        return Diagnosis(
            cause.value,
            f"Rank {first['rank']} on host {first['host']} failed {where}: {_first_line(first['message'])}",
            (_traceback_of(first),),
            "Do what the message says.",
            False,
        )
    found = _explain(said, where, False) or _explain(_log_ends(run_dir, status), where, False)
    if found is not None or not own:
        return found
    first = own[0]
    return Diagnosis(
        Cause.CRASHED.value,
        f"Rank {first['rank']} on host {first['host']} crashed {where}: {_first_line(said[0].text)}",
        (_traceback_of(first),),
        f"If it is not a bug, {_START_AGAIN[0].lower()}{_START_AGAIN[1:]}",
        False,
    )


def _traceback_of(failure: dict[str, Any]) -> str:
    return f"logs/rank_{failure['rank']:05d}.failure.json has the traceback"


def _silent(run_dir: Path, status: dict[str, Any], failures: list[dict[str, Any]], where: str) -> Diagnosis:
    """No rank reported a cause: which rank is missing among those that lost a peer?"""
    world_size = min(status.get("world_size") or 1, MAX_RANKS)
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
            "kernel for lack of memory), or its machine or network was lost.",
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
    found = _explain(_log_ends(run_dir, {}), "before it began", False)
    if found is not None:
        return found
    summary = f"There is no status.json in {run_dir}: no run has started here, or it could not write."
    return Diagnosis("unknown", summary, (), "Look at what the command printed.", False)


def _only_lost_a_peer(failure: dict[str, Any]) -> bool:
    return (
        _is_foreign(_cause(failure))
        and _LOST_PEER.search(f"{failure['kind']}: {failure['message']}") is not None
    )


def _log_ends(run_dir: Path, status: dict[str, Any]) -> list[_Said]:
    """What others wrote at the ends of the last start's logs, the newest first.

    They lie in the run's directory, where launch scripts put them there, and in that of the batch job.
    """
    names = {path.resolve(): str(path.relative_to(run_dir)) for path in _logs(run_dir / "logs", "**/")}
    if log_dir := status.get(LOG_DIR_KEY):
        names = {path.resolve(): str(path) for path in _logs(Path(log_dir), "")} | names
    since, texts = _last_start_s(status), []
    for path, name in names.items():
        try:
            with open_regular(path) as file:
                found = os.fstat(file.fileno())
                if found.st_mtime < since:
                    continue
                file.seek(max(0, found.st_size - _LAST_BYTES))
                text = file.read(_LAST_BYTES).decode(errors="replace")
        except (OSError, ValueError):  # a link to nothing, a pipe
            continue
        for match in list(_START_LINE.finditer(text))[-1:]:
            text = text[match.end() :]
        texts.append((found.st_mtime, _Said(name, _OWN_LINE.sub("", text))))
    return [said for _, said in sorted(texts, key=lambda text: text[0], reverse=True)]


def _logs(directory: Path, below: str) -> list[Path]:
    try:
        found = [path for kind in ("log", "out", "err") for path in directory.glob(f"{below}*.{kind}")]
    except (OSError, ValueError):
        return []
    return [path for path in found if not _OWN_LOG.fullmatch(path.name)]


def _last_start_s(status: dict[str, Any]) -> float:
    """When the last start began, as files have their times; 0 where nothing says it."""
    try:
        return datetime.fromisoformat(status["starts"][-1]["time"]).timestamp()
    except (LookupError, TypeError, ValueError, OverflowError, OSError):
        return 0.0


def _hosts_of_ranks(run_dir: Path) -> dict[int, str]:
    hosts = {}
    for path in (run_dir / "heartbeats").glob("rank_*.json"):
        try:
            beat = read_json_object(path)
            hosts[int(beat["rank"])] = str(beat["host"])
        except (UserError, ValueError, KeyError, TypeError, OverflowError):
            continue
    return hosts


def _line_around(text: str, match: re.Match[str]) -> str:
    start = text.rfind("\n", 0, match.start()) + 1
    end = text.find("\n", match.end())
    return text[start : end if end >= 0 else None].strip()[:400]


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:400]
