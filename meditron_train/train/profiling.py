"""Chosen steps under torch's profiler: a trace to look at, and a summary by phase to read.

The phases are marked where they happen, by `torch.profiler.record_function`: "data" in the loop, the others in the
engine. Outside the recorded steps a mark costs a microsecond.
"""

from __future__ import annotations

import bisect
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from meditron_train.config.profiling import ProfileSection
from meditron_train.files import replace_text
from meditron_train.log import get_logger
from meditron_train.parallel import Mesh
from meditron_train.train.life.heartbeat import Pulse

_log = get_logger(__name__)

PROFILE_NAME = "profile"
PHASES = ("data", "forward-backward", "reduce", "update")
_REST = "rest"  # of a step
_NUM_OPERATORS = 12  # listed of each phase


class StepProfiler:
    """Records the steps that `settings` names, on the ranks that it names, into RUN_DIR/profile/."""

    def __init__(self, settings: ProfileSection, mesh: Mesh, run_dir: Path, pulse: Pulse) -> None:
        first = settings.from_step
        self._steps = range(first, first + settings.num_steps) if first is not None else range(0)
        self._records = bool(self._steps) and mesh.rank in settings.ranks
        self._mesh, self._directory, self._pulse = mesh, run_dir / PROFILE_NAME, pulse
        self._recorded: list[int] = []
        self._profile: Any = None

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """The block takes `step`. The first and the last one recorded start and end the recording; the last one is
        collective on all ranks, as the others must not take the writing for a hang."""
        if step not in self._steps:
            yield
            return
        if self._records and self._profile is None:
            self._profile = profile(activities=self._activities(), acc_events=True)
            self._profile.start()
        with record_function(f"step {step}"):
            yield
        self._recorded.append(step)
        if step == self._steps[-1]:
            self._pulse.enter("writing the profile")
            self.close()
            self._mesh.max_over_ranks([0.0])

    def close(self) -> None:
        """Write what is recorded; a run that ends among the steps has fewer."""
        if self._profile is None:
            return
        recorder, self._profile = self._profile, None
        recorder.stop()
        if not self._recorded:
            return
        first, last = self._recorded[0], self._recorded[-1]
        name = f"steps_{first:08d}-{last:08d}_rank_{self._mesh.rank:05d}"
        try:
            self._directory.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._directory) as scratch:
                trace = Path(scratch, f"{name}.pt.trace.json.gz")
                recorder.export_chrome_trace(str(trace))
                trace.replace(self._directory / trace.name)
            text = f"Steps {first} to {last} of rank {self._mesh.rank}, torch {torch.__version__}\n\n"
            replace_text(self._directory / f"{name}.txt", text + summarize(recorder.events()))
        except (OSError, RuntimeError) as error:
            _log.warning("the profile of steps %d to %d could not be written: %s", first, last, error)
            return
        _log.info("the profile of steps %d to %d is in %s", first, last, self._directory)

    def _activities(self) -> list[ProfilerActivity]:
        return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._mesh.on_gpu else [])]


@dataclass(frozen=True)
class _Span:
    """A phase of one step, in microseconds."""

    phase: str
    start: float
    end: float


def summarize(events: Sequence[Any]) -> str:
    """Time by phase, and in each phase the operators with the most time of their own, per step.

    Args:
        events: torch's FunctionEvents of a recording.
    """
    on_host = [event for event in events if event.device_type.name == "CPU"]
    spans = sorted(
        (
            _Span(event.name if event.name in PHASES else _REST, event.time_range.start, event.time_range.end)
            for event in on_host
            if event.name in PHASES or event.name.startswith("step ")
        ),
        key=lambda span: (span.start, -span.end),
    )
    marks = {*PHASES, *(event.name for event in on_host if event.name.startswith("step "))}
    num_steps = max(1, len(marks) - len(PHASES))
    host_us, gpu_us, calls = (
        Counter[tuple[str, str]](),
        Counter[tuple[str, str]](),
        Counter[tuple[str, str]](),
    )
    starts = [span.start for span in spans]
    for event in on_host:
        if event.name in marks:
            continue
        key = _phase_at(spans, starts, event.time_range.start), event.name
        host_us[key] += event.self_cpu_time_total
        gpu_us[key] += event.self_device_time_total
        calls[key] += 1
    phase_us = _own_time(spans)
    whole_us = sum(phase_us.values()) or 1.0
    lines = [
        "Milliseconds per step. The profiler's own cost is included: compare parts, not with other steps.",
        "host: time of the CPU, waiting for others and for the GPU included. gpu: kernels that the phase has launched.",
        "",
        f"{'phase':18}{'host':>12}{'share':>8}{'gpu':>12}",
    ]
    for phase in (*PHASES, _REST):
        of_gpu = sum(us for (its_phase, _), us in gpu_us.items() if its_phase == phase)
        lines.append(
            f"{phase:18}{_ms(phase_us[phase], num_steps)}{phase_us[phase] / whole_us:8.1%}{_ms(of_gpu, num_steps)}"
        )
    lines.append(f"{'step':18}{_ms(whole_us, num_steps)}{1:8.1%}{_ms(sum(gpu_us.values()), num_steps)}")
    for phase in (*PHASES, _REST):
        keys = [key for key in calls if key[0] == phase]
        keys.sort(key=lambda key: (gpu_us[key], host_us[key]), reverse=True)
        if keys:
            lines += ["", f"{phase:18}{'own host':>12}{'own gpu':>12}{'calls':>10}  operator"]
        for key in keys[:_NUM_OPERATORS]:
            times = _ms(host_us[key], num_steps) + _ms(gpu_us[key], num_steps)
            lines.append(f"{'':18}{times}{calls[key] / num_steps:10.0f}  {key[1]}")
    return "\n".join(lines) + "\n"


def _ms(us: float, num_steps: int) -> str:
    return f"{us / 1000 / num_steps:12.3f}"


def _phase_at(spans: Sequence[_Span], starts: Sequence[float], us: float) -> str:
    """The innermost span around a moment: backward operators run in a thread without marks of their own."""
    for index in range(bisect.bisect_right(starts, us) - 1, -1, -1):
        if spans[index].end >= us:
            return spans[index].phase
    return _REST


def _own_time(spans: Sequence[_Span]) -> Counter[str]:
    """Microseconds of each phase without the phases inside it; `spans` are sorted by their start."""
    own: Counter[str] = Counter()
    around: list[_Span] = []
    for span in spans:
        while around and around[-1].end <= span.start:
            around.pop()
        own[span.phase] += span.end - span.start  # type: ignore[assignment]
        if around:
            own[around[-1].phase] -= span.end - span.start  # type: ignore[assignment]
        around.append(span)
    return own
