"""A forked copy of this process that does one task concurrently and reports how it ended."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

from meditron_train.log import get_logger
from meditron_train.mcore import end_with_parent_only, forget_results_queue

_log = get_logger(__name__)


class ForkedCopy:
    """Runs `action` in a copy of this process as it is now: what the parent changes afterwards, the copy does not see.

    The copy ends with its parent, and does not hear the signals that ask a job to stop.
    """

    def __init__(self, action: Callable[[], object]) -> None:
        context = multiprocessing.get_context("fork")
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_run, args=(action, sender), name="saving copy")
        self._process.start()
        sender.close()

    def finished(self, *, wait: bool) -> bool:
        """Whether it has ended well.

        Raises:
            OSError, RuntimeError: what ended it otherwise.
        """
        if not (self._receiver.poll(None if wait else 0)):
            return False
        try:
            failure = self._receiver.recv()
        except EOFError:
            failure = None
            self._process.join()
            if self._process.exitcode != 0:
                failure = RuntimeError(f"the process that writes ended with {self._process.exitcode}")
        self._process.join()
        self._receiver.close()
        if failure is not None:
            raise failure
        return True

    def kill(self) -> None:
        """End it at once; one that has ended is left alone."""
        self._process.kill()
        self._process.join()


def _run(action: Callable[[], object], sender: Connection) -> None:
    end_with_parent_only()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    forget_results_queue()
    try:
        action()
        sender.send(None)
    except BaseException as error:  # of whatever kind: the parent must hear of it
        _log.debug("the saving copy failed:\n%s", traceback.format_exc())
        sender.send(_portable(error))
    finally:
        sender.close()
        os._exit(0)  # nothing inherited may be taken apart


def _portable(error: BaseException) -> Exception:
    """The OSError inside, as that says what to do; else the text, as not every exception can be pickled."""
    from meditron_train.checkpoint.sharded.store import os_error_inside

    cause = os_error_inside(error)
    if cause is not None:
        return OSError(cause.errno, cause.strerror, cause.filename)
    return RuntimeError(f"{type(error).__name__}: {error}")
