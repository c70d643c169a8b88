"""What a sink is, and the thread between it and training, so that a sink that raises or hangs can't hurt training."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

from phasewatch.monitor.errors import warn
from phasewatch.monitor.trajectories.trajectory import Point, Trajectory
from phasewatch.monitor.trajectories.transitions import Transition

SINK_TIMEOUT = 30.0
"""Seconds that a sink may take for one item before it gets nothing more: longer than a slow upload takes, and short
enough to wait for at the end of a training."""


class Sink(Protocol):
    """Somewhere that points and transitions are written to.

    A sink that also has a method `attach(trajectory)` is given, once and before the first write, a function that
    returns the `Trajectory` measured so far, so that it needs no copy of the points.

    Example:
        >>> class Printer:
        ...     def write(self, item):
        ...         print(item)
        ...     def close(self):
        ...         print("closed")
        >>> sink: Sink = Printer()
        >>> sink.close()
        closed
    """

    def write(self, item: Point | Transition) -> None:
        """Take one point, or one transition: when it is confirmed, and at the end those still provisional."""

    def close(self) -> None:
        """Finish: nothing more is written."""


class Outlet:
    """A sink and the thread that calls it.

    An item that the sink raises on is lost. A sink that takes longer than `SINK_TIMEOUT` for one item gets no more.
    Either costs one warning.

    Args:
        sink: what to call.
        trajectory: returns the trajectory so far, for a sink that has `attach`.
    """

    def __init__(self, sink: Sink, trajectory: Callable[[], Trajectory]) -> None:
        self._sink = sink
        self._name = type(sink).__name__
        self._items: queue.SimpleQueue[Point | Transition | None] = queue.SimpleQueue()
        self._started: float | None = None
        self._complained = False
        self._given_up = False
        self._thread = threading.Thread(
            target=self._run, args=(trajectory,), name=f"phasewatch-{self._name}", daemon=True
        )
        self._thread.start()

    def put(self, item: Point | Transition) -> None:
        """Pass an item on; returns at once."""
        if not self._hangs():
            self._items.put(item)

    def finish(self) -> None:
        """Close the sink after what it was sent; returns at once."""
        self._items.put(None)

    def wait(self) -> None:
        """Wait until the sink is closed, or hangs."""
        while self._thread.is_alive() and not self._hangs():
            self._thread.join(min(0.05, SINK_TIMEOUT))

    def _hangs(self) -> bool:
        started = self._started
        if not self._given_up and started is not None and time.monotonic() - started > SINK_TIMEOUT:
            self._given_up = True
            self._complain(f"has taken more than {SINK_TIMEOUT:g} seconds and gets nothing more")
        return self._given_up

    def _run(self, trajectory: Callable[[], Trajectory]) -> None:
        attach = getattr(self._sink, "attach", None)
        if callable(attach):
            self._call(lambda: attach(trajectory))
        while (item := self._items.get()) is not None:
            self._call(lambda item=item: self._sink.write(item))
        self._call(self._sink.close)

    def _call(self, action: Callable[[], object]) -> None:
        self._started = time.monotonic()
        try:
            action()
        except BaseException as error:  # nothing that a sink raises, SystemExit included, may end its thread
            self._complain(f"failed and lost what it was writing ({type(error).__name__}: {error})")
        finally:
            self._started = None

    def _complain(self, what: str) -> None:
        if not self._complained:
            self._complained = True
            warn(f"The sink {self._name} {what}; training and the other sinks go on.")
