"""Faults on request, for trials of a run's resilience: MEDITRON_INJECT="nan@7:rank=1,bitflip@9:rank=2".

    nan@STEP      the rank's loss of the first micro-batch becomes NaN, every time the step is computed
    nan-once@STEP the same, the first time only: a passing fault
    spike@STEP    the rank's loss is multiplied by 1000
    bitflip@STEP  one bit of one weight of the rank flips before the step
    hang@STEP     the rank stops forever before the step
    slow@STEP     the rank sleeps for one second before this and every later step
    crash@STEP    the rank raises an exception
    kill@STEP     the rank kills itself (signal 9)

Each happens once in a run directory, on `rank` (default 0), so that the run which is started again meets a sound
machine; RUN_DIR/injected/ remembers. Without the variable there is nothing here but one look at the environment.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.hooks import RemovableHandle

from meditron_train.errors import UserError
from meditron_train.log import get_logger
from meditron_train.train.engine import Engine

_log = get_logger(__name__)

VARIABLE = "MEDITRON_INJECT"
KINDS = ("nan", "nan-once", "spike", "bitflip", "hang", "slow", "crash", "kill")
_SYNTAX = re.compile(r"(?P<kind>[a-z-]+)@(?P<step>\d+)(:rank=(?P<rank>\d+))?")


@dataclass(frozen=True)
class Fault:
    kind: str
    step: int
    rank: int


def parse(text: str) -> list[Fault]:
    """The faults of the variable's text.

    Raises:
        UserError: the text cannot be read.
    """
    faults = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _SYNTAX.fullmatch(part)
        if match is None or match["kind"] not in KINDS:
            raise UserError(
                f"{VARIABLE}: cannot read {part!r}; expected KIND@STEP or KIND@STEP:rank=N, KIND one of {KINDS}"
            )
        faults.append(Fault(match["kind"], int(match["step"]), int(match["rank"] or 0)))
    return faults


class InjectedFaults:
    """The faults of one rank."""

    def __init__(self, run_dir: Path, rank: int, environment: Mapping[str, str] = os.environ) -> None:
        self._directory = Path(run_dir) / "injected"
        self._faults = [fault for fault in parse(environment.get(VARIABLE, "")) if fault.rank == rank]
        self._handles: list[RemovableHandle] = []

    def before_step(self, step: int, engine: Engine) -> None:
        """Do what is due at `step`, and end what the step before suffered from."""
        while self._handles:
            self._handles.pop().remove()
        for fault in self._faults:
            if fault.kind == "slow" and step >= fault.step:
                time.sleep(1)
            elif fault.step == step and self._is_first(fault):
                _log.warning("injecting %s at step %d", fault.kind, step)
                handle = _inject(fault.kind, engine)
                self._handles += [handle] if handle is not None else []

    def _is_first(self, fault: Fault) -> bool:
        self._directory.mkdir(exist_ok=True)
        try:
            (self._directory / f"{fault.kind}@{fault.step}.rank{fault.rank}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def _inject(kind: str, engine: Engine) -> RemovableHandle | None:
    """Do it now, or, for what happens during the step, prepare it and return what undoes that."""
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "crash":
        raise RuntimeError("an injected crash")
    elif kind == "hang":
        while True:
            time.sleep(3600)
    elif kind == "bitflip":
        weight = next(engine.chunks[0].parameters())
        bits = weight.data.view({2: torch.int16, 4: torch.int32}[weight.element_size()]).flatten()
        bits[len(bits) // 2] ^= 1 << 3
    else:
        return _spoil_loss(engine, 1000.0 if kind == "spike" else float("nan"), once=kind == "nan-once")
    return None


def _spoil_loss(engine: Engine, factor: float, *, once: bool) -> RemovableHandle:
    """Multiply the losses of training, but not those of validation."""

    def spoil(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor | None:
        if not torch.is_grad_enabled():
            return None
        if once:
            handle.remove()
        return output * factor

    handle = engine.chunks[-1].register_forward_hook(spoil)
    return handle
