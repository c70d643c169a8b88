"""How a measuring process ends with the one that started it. Nothing heavy is imported: it may end meanwhile."""

import os
import signal
import threading
import time
from collections.abc import Callable

PARENT_POLL_SECONDS = 1.0
"""Seconds between looks whether the process that started this one still runs: how long an orphan may live."""


def end() -> None:
    """End this process and what it has forked, such as the workers of a data loader."""
    if os.name == "posix" and os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


def end_with(parent: int, ending: Callable[[], object] = end) -> None:
    """Have this process end within `PARENT_POLL_SECONDS` of its parent, from now on.

    A pipe alone doesn't tell that the parent is gone: what the parent forked holds the other end open.

    Args:
        parent: process id of the one that started this one.
        ending: ends this process.
    """
    threading.Thread(target=_watch, args=(parent, ending), daemon=True).start()


def _watch(parent: int, ending: Callable[[], object]) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_SECONDS)
    ending()
