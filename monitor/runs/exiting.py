"""The end of a process in which threads are left at work, such as that of a sink whose server hangs.

When a process ends, Python before 3.14 ends each daemon thread that next needs the interpreter, by unwinding its stack
(python/cpython#87135). With code in C++ or Rust on that stack, the process aborts. So it ends only once each thread has
ended, or waits with Python alone on its stack, and one that is woken afterwards raises SystemExit rather than go on.
"""

import atexit
import ctypes
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from weakref import WeakSet

from phasewatch.monitor.runs.imports import imports

SETTLE_SECONDS = 3.0
"""Seconds that the end of the process waits for threads at work."""

IMPORT_SECONDS = 20.0
"""The same while one imports packages, as from a slow disk, or is called from code in Rust."""

STILL_SECONDS = 0.3
"""A thread that is at one place for so long waits for something, such as a server."""

exiting = threading.Event()
"""Set when the process ends: a thread that is still there begins nothing more."""

_threads: WeakSet[threading.Thread] = WeakSet()
_actions: list[Callable[[], object]] = []


def call_at_exit(action: Callable[[], object]) -> None:
    """Call something as the process ends: after the handlers of runs, which still write to their sinks.

    Args:
        action: called without arguments; not again if it is given once more.
    """
    _register()
    if action not in _actions:
        _actions.append(action)


def call_no_more(action: Callable[[], object]) -> None:
    """Take back `call_at_exit`."""
    if action in _actions:
        _actions.remove(action)


def settle_at_exit(thread: threading.Thread) -> None:
    """Have the end of the process wait until a daemon thread has ended or stands still.

    Call it before the thread imports a package with exit handlers of its own where that is possible. Those may wake the
    thread, and the one that waits is to come after them: handlers are called last in, first out.

    Args:
        thread: to wait for.
    """
    _register()
    _threads.add(thread)


@cache
def _register() -> None:
    atexit.register(_settle)


def _settle() -> None:
    """Wait for all threads; one that stands still can't move on before the interpreter is gone."""
    exiting.set()
    for action in _actions[:]:
        action()
    began, before = time.monotonic(), {}
    while alive := [thread for thread in threading.enumerate() if thread in _threads]:
        now = {thread: _place(thread) for thread in alive}
        moving = [thread for thread in alive if now[thread] is None or now[thread] != before.get(thread)]
        limit = IMPORT_SECONDS if None in now.values() else SETTLE_SECONDS
        if not moving or time.monotonic() - began > limit:
            for thread in alive:
                _raise_when_woken(thread)
            return
        before = now
        moving[0].join(STILL_SECONDS)


def _raise_when_woken(thread: threading.Thread) -> None:
    """Have a thread raise SystemExit at its next step in Python: a later exit handler, such as W&B's, may wake it."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))


def _place(thread: threading.Thread) -> tuple[int, int] | None:
    """Where a thread is, to be compared with where it is later; None while its stack can't be unwound.

    That is while it imports a module, or while pydantic, which W&B uses, calls it from code in Rust.
    """
    top = frame = sys._current_frames().get(thread.ident or 0)
    if top is None or imports(top):
        return None
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith("pydantic."):
            return None
        frame = frame.f_back
    return id(top), top.f_lasti
