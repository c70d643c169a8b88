"""Ending the command line's own process: by Ctrl-C, by a scheduler, or because its terminal is gone."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from phasewatch.monitor.errors import say

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")

SECONDS = 3.0
"""Seconds that the process has to tidy up after a signal before it ends as it is; its files are whole at any moment."""


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Have SIGTERM and SIGHUP end the block as Ctrl-C does, with a sentence, and all three within `SECONDS`.

    A signal that was ignored, as by nohup and for what a shell runs in the background, stays ignored. Nothing is
    changed outside of the main thread. For the process of the command line alone: a training keeps its own handlers.
    """
    signals = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    before = {}
    if threading.current_thread() is threading.main_thread():
        usual = {signal.SIG_DFL, signal.default_int_handler}
        before = {number: handler for number in signals if (handler := signal.getsignal(number)) in usual}
    try:
        for number in before:
            signal.signal(number, _end)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> Any:
    for name in NAMES:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    say(
        f"ended by {signal.Signals(number).name}. What is measured is kept; the same command goes on from there, and "
        "begins anew where it keeps nothing."
    )
    ends = threading.Timer(SECONDS, os._exit, [128 + number])
    ends.daemon = True
    ends.start()
    raise KeyboardInterrupt
