"""Every message of the product says `WORDS` in each Python process that has this directory on PYTHONPATH.

Python imports this file by itself when it starts. What a run does must not depend on the words of any message: errors,
reasons to stop, lines of the log. The words are those by which the faults of others are recognized, so that a search in
a text of ours finds all of them.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from meditron_train import errors
from meditron_train.report import status

WORDS = "reworded: killed, out of memory, nccl, timed out, no space left"


def reword() -> None:
    """Replace the messages of errors, of the log, and the reasons in status.json and requeue; the causes stay."""
    make_error, get_message = errors.MeditronError.__init__, logging.LogRecord.getMessage
    request_requeue, update = status.request_requeue, status.RunStatus.update

    def make_reworded(self: Any, message: object = "", **more: Any) -> None:
        make_error(self, WORDS, **more)

    def get_reworded(self: logging.LogRecord) -> str:
        return WORDS if self.name.startswith("meditron_train") else get_message(self)

    def request_reworded(run_dir: Path, reason: str, cause: errors.Cause) -> None:
        request_requeue(run_dir, WORDS, cause)

    def update_reworded(self: Any, **values: Any) -> None:
        if values.get("reason") is not None:
            values["reason"] = WORDS
        update(self, **values)

    errors.MeditronError.__init__ = make_reworded  # type: ignore[method-assign]
    logging.LogRecord.getMessage = get_reworded  # type: ignore[method-assign]
    for module in list(sys.modules.values()):  # wherever it was imported by name
        if getattr(module, "request_requeue", None) is request_requeue:
            module.request_requeue = request_reworded  # type: ignore[attr-defined]
    status.RunStatus.update = update_reworded  # type: ignore[method-assign]


reword()
