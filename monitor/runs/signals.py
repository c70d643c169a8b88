"""Ending the command line's own process: by Ctrl-C, by a scheduler, or because its terminal is gone."""

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType

from phasewatch.monitor.errors import say
from phasewatch.monitor.runs.imports import imports

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")

SECONDS = 3.0
"""Seconds that the process has to tidy up after a signal before it ends as it is; its files are whole at any moment."""

AGAIN_SECONDS = 0.1
"""Seconds after which `KeyboardInterrupt` is raised once more, if it was held back or got lost."""

IMPORT_SECONDS = 0.5
"""Seconds after which a process that still imports packages ends as it is."""

STATUS = 130
"""The exit status after any of the signals, which is a shell's for Ctrl-C."""


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Have SIGTERM and SIGHUP end the block as Ctrl-C does, with a sentence, and all three within `SECONDS`.

    A signal that was ignored, as by nohup and for what a shell runs in the background, stays ignored. Nothing is
    changed outside of the main thread. For the process of the command line alone: a training keeps its own handlers.
    """
    signals = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    before, over = {}, threading.Event()
    if threading.current_thread() is threading.main_thread():
        usual = {signal.SIG_DFL, signal.default_int_handler}
        before = {number: handler for number in signals if (handler := signal.getsignal(number)) in usual}

    def end(number: int, frame: FrameType | None) -> None:
        for other in signals:
            signal.signal(other, signal.SIG_IGN)
        say(
            f"ended by {signal.Signals(number).name}. What is measured is kept; the same command goes on from there, "
            "and begins anew where it keeps nothing."
        )
        interrupt = partial(_interrupt, time.monotonic() + IMPORT_SECONDS)
        signal.signal(number, interrupt)
        threading.Thread(target=_insist, args=(number, over), name="phasewatch-end", daemon=True).start()
        interrupt(number, frame)

    try:
        for number in before:
            signal.signal(number, end)
        yield
    finally:
        over.set()
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(imports_until: float, number: int, frame: FrameType | None) -> None:
    """Raise `KeyboardInterrupt`, unless it is on its way, or an import would end in an abort by it, as torch's does."""
    if _is_ending():
        return
    if not imports(frame):
        raise KeyboardInterrupt
    if time.monotonic() > imports_until:
        os._exit(STATUS)


def _insist(number: int, over: threading.Event) -> None:
    """Interrupt the main thread until the block is over: code in C may swallow what a handler raises."""
    ends = time.monotonic() + SECONDS
    while time.monotonic() < ends and not over.wait(AGAIN_SECONDS):
        if hasattr(signal, "pthread_kill"):  # which interrupts a system call too
            signal.pthread_kill(threading.main_thread().ident or 0, number)
        else:
            _thread.interrupt_main(signal.Signals(number))
    time.sleep(max(ends - time.monotonic(), 0))
    os._exit(STATUS)


def _is_ending() -> bool:
    """Whether a `KeyboardInterrupt` is being handled, so that this is the tidying up."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None
