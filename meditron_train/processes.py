"""Child processes that must not outlive their parent."""

from __future__ import annotations

import os
import threading
from multiprocessing import connection


def end_with(sentinel: int) -> None:
    """End this process when its parent ends, however that happens.

    Args:
        sentinel: `parent_process().sentinel`, which becomes ready when the parent is gone.
    """

    def wait() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
