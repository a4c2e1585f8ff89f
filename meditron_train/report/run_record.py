"""What a run left in its directory, read once: the raw material of its report. Every file may be missing or damaged."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from meditron_train.config.yaml_file import read_yaml
from meditron_train.errors import UserError
from meditron_train.files import describe_missing_directory, open_regular, read_json_object, read_whole
from meditron_train.report.curves import Metrics, read_metrics
from meditron_train.report.diagnosis import Diagnosis, diagnose
from meditron_train.report.json_lines import decode_line
from meditron_train.report.metrics import METRICS_NAME
from meditron_train.report.provenance import PROVENANCE_NAME
from meditron_train.report.status import STATUS_NAME, read_failures, read_status

_MAX_SMALL_FILE_BYTES = 16 << 20
_MAX_RESULT_BYTES = 1 << 30
_MARKS = ("config.yaml", STATUS_NAME, METRICS_NAME, PROVENANCE_NAME, "checkpoints", "logs")
_SILENT_AFTER_S = 600.0  # without a sign a run that says it runs is suspected to be dead


@dataclass(frozen=True)
class Start:
    """One start of a run.

    Attributes:
        began, ended: seconds since 1970; ended is the last sign of it, None where nothing says it.
        from_step: the step it continued after.
        to_step: the last step it is known to have done.
        why: the reason for the start, in the words of status.json.
    """

    number: int
    began: float
    ended: float | None
    from_step: int | None
    to_step: int | None
    why: str
    world_size: int
    hosts: tuple[str, ...]
    job_id: str | None

    @property
    def seconds(self) -> float | None:
        return None if self.ended is None else max(0.0, self.ended - self.began)


@dataclass(frozen=True)
class RunRecord:
    """All that the small files of a run say.

    Attributes:
        problems: what is wrong with them, a sentence each.
    """

    path: Path
    config: dict[str, Any]
    config_text: str
    status: dict[str, Any]
    diagnosis: Diagnosis
    provenance: list[dict[str, Any]]
    failures: list[dict[str, Any]]
    metrics: Metrics
    evaluations: list[tuple[str, dict[str, Any]]]
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def last_provenance(self) -> dict[str, Any]:
        return self.provenance[-1] if self.provenance else {}

    @property
    def step(self) -> int:
        """The last step that is known to be done."""
        return max(_step(self.status.get("step")) or 0, self.metrics.last_step)

    @property
    def state(self) -> str:
        """starting, running, silent, stopped, failed, crashed, done or unknown."""
        state = str(self.status.get("state") or "unknown")
        if state in ("starting", "running"):
            updated = seconds_of(self.status.get("updated"))
            if self.failures:
                return "crashed"
            if updated is None or time.time() - max(updated, _last_heartbeat(self.path)) > _SILENT_AFTER_S:
                return "silent"
        return state

    @property
    def starts(self) -> list[Start]:
        """All starts that status.json remembers, with what is known of their ends."""
        listed = [start for start in listing(self.status.get("starts")) if isinstance(start, dict)]
        resumed = {
            seconds_of(record.get("time")): launch_of(record).get("resumed_after_step")
            for record in self.provenance
        }
        found = []
        for number, start in enumerate(listed):
            began = seconds_of(start.get("time"))
            if began is None:
                continue
            after = listed[number + 1] if number + 1 < len(listed) else None
            ended = seconds_of(after["last_sign_before"] if after and "last_sign_before" in after else None)
            to_step = after.get("last_step_before") if after else None
            if after is None:
                ended, to_step = seconds_of(self.status.get("updated")), self.step
            later = [moment for moment in resumed if moment is not None and moment >= began - 1]
            found.append(
                Start(
                    number + 1, began, ended,
                    _step(resumed[min(later)]) if later and (ended is None or min(later) <= ended + 1) else None,
                    _step(to_step),
                    str(start.get("why") or "no reason is given"),
                    whole(start.get("world_size"), 1),
                    tuple(str(host) for host in listing(start.get("hosts"))),
                    None if start.get("job_id") is None else str(start["job_id"]),
                )
            )  # fmt: skip
        return found

    def setting(self, *keys: str) -> Any:
        """A value of config.yaml, None where it is not there."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def read_run(path: Path, evaluations: tuple[Path, ...] = ()) -> RunRecord:
    """Read the run in `path`.

    Args:
        evaluations: results of `evaluate --output`, beside those in RUN_DIR/evaluation.

    Raises:
        UserError: there is no such directory or nothing of a run in it, or an evaluation is none.
    """
    if not path.is_dir():
        raise UserError(f"{describe_missing_directory(path)}; give the logging.run_dir of a run")
    if not any((path / mark).exists() for mark in _MARKS):
        raise UserError(f"{path} is not the directory of a run: it has none of {', '.join(_MARKS)}")
    problems: list[str] = []
    config_text, config = _read_config(path / "config.yaml", problems)
    metrics = read_metrics(path / METRICS_NAME)
    status = read_status(path)
    if status is None and (path / STATUS_NAME).exists():
        problems.append(f"{STATUS_NAME} cannot be read.")
    results = [(str(file), _read_evaluation(file)) for file in evaluations]
    for file in sorted((path / "evaluation").glob("*.json")):
        try:
            results.append((file.name, _read_evaluation(file)))
        except UserError as error:
            problems.append(f"{error}.")
    return RunRecord(
        path,
        config,
        config_text,
        status or {},
        _diagnosis(path, problems),
        _read_provenance(path / PROVENANCE_NAME, problems),
        read_failures(path),
        metrics,
        results,
        problems + metrics.problems,
    )


def _diagnosis(path: Path, problems: list[str]) -> Diagnosis:
    try:
        return diagnose(path)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # a status.json of another kind
        problems.append(f"How the run ended cannot be told: {error!r}")
        return Diagnosis("unknown", "How the run ended cannot be told from its files.", (), "", False)


def _read_config(path: Path, problems: list[str]) -> tuple[str, dict[str, Any]]:
    if not path.exists():
        problems.append(f"There is no {path.name}.")
        return "", {}
    try:
        return read_whole(path, _MAX_SMALL_FILE_BYTES).decode(errors="replace"), read_yaml(
            path, unescape=True
        )
    except (OSError, ValueError, UserError) as error:
        problems.append(f"{error}.")
    return "", {}


def _read_provenance(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    records = []
    try:
        with open_regular(path) as file:
            while line := file.readline(_MAX_SMALL_FILE_BYTES):
                with suppress(ValueError, RecursionError):  # a kill may tear a line
                    records.append(decode_line(line))
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read: {error}")
    return records


def _read_evaluation(path: Path) -> dict[str, Any]:
    result = read_json_object(path, _MAX_RESULT_BYTES)
    scores = result.get("scores")
    if not isinstance(scores, list) or not all(isinstance(score, dict) for score in scores):
        raise UserError(f"{path} is not a result of `evaluate --output`: it has no scores")
    return {"model": result.get("model"), "protocol": result.get("protocol"), "scores": scores}


def _last_heartbeat(path: Path) -> float:
    newest = 0.0
    for beat in (path / "heartbeats").glob("rank_*.json"):
        with suppress(OSError):
            newest = max(newest, beat.stat().st_mtime)
    return newest


def _step(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 62 else None


def seconds_of(moment: Any) -> float | None:
    """Seconds since 1970 of an ISO time; None for anything else."""
    try:
        return datetime.fromisoformat(str(moment)).timestamp()
    except (ValueError, OverflowError):
        return None


def whole(value: Any, default: int) -> int:
    """A positive whole number from a file, or the default."""
    return value if type(value) is int and 0 < value < 1 << 40 else default


def listing(value: Any) -> list[Any]:
    """A list from a file; [] for anything else."""
    return value if isinstance(value, list) else []


def mapping(value: Any) -> dict[str, Any]:
    """An object from a file; {} for anything else."""
    return value if isinstance(value, dict) else {}


def launch_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """`launch` of a record of provenance.jsonl; {} where there is none."""
    return mapping(record.get("launch"))


def read_lines_at_end(path: Path, max_bytes: int = 16 << 10) -> str:
    """The last lines of a log, as far as it can be read; "" else."""
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - max_bytes))
            text = file.read(max_bytes).decode("utf-8", errors="replace")
    except (OSError, ValueError):
        return ""
    return text if size <= max_bytes else text.partition("\n")[2]
