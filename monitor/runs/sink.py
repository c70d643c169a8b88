"""What a sink is, and the thread between it and training, so that a sink that raises or hangs can't hurt training."""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from phasewatch.monitor.errors import warn
from phasewatch.monitor.runs.exiting import exiting, settle_at_exit
from phasewatch.monitor.trajectories.trajectory import Point, Trajectory
from phasewatch.monitor.trajectories.transitions import Transition

SLOW_SECONDS = 30.0
"""Seconds that a sink may take for one item before a warning; a slow upload takes less."""

CLOSE_SECONDS = 7.0
"""Seconds that the end of a run waits for a sink, unless the sink has a `close_seconds` of its own: W&B takes 3 to 6 to
finish a run, and a process has to end within 15 of its training's end."""


class Sink(Protocol):
    """Somewhere that points and transitions are written to.

    A sink that also has a method `attach(trajectory)` is given, once and before the first write, a function that
    returns the `Trajectory` measured so far, so that it needs no copy of the points. One that has a method
    `describe(settings)` is told, before the first write, what the points are measured with. One that has a method
    `join_trainer()` is told by the callbacks of trainers that it is beside one.

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

    An item that the sink raises on is lost. What comes while it is slow waits until it isn't; what still waits
    `close_seconds` of the sink after the end, or else `CLOSE_SECONDS`, is left to a thread that ends with the process.
    Either costs one warning, with `advice` of the sink, if it has any.

    Args:
        sink: what to call.
        trajectory: returns the trajectory so far, for a sink that has `attach`.
        settings: returns what the points are measured with, for a sink that has `describe`.
    """

    def __init__(
        self,
        sink: Sink,
        trajectory: Callable[[], Trajectory],
        settings: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self._sink = sink
        self._name = type(sink).__name__
        self._items: queue.SimpleQueue[Point | Transition | None] = queue.SimpleQueue()
        self._started: float | None = None
        self._ends = 0.0
        self._complaints: set[str] = set()
        self._thread = threading.Thread(
            target=self._run, args=(trajectory, settings), name=f"phasewatch-{self._name}", daemon=True
        )
        settle_at_exit(self._thread)
        self._thread.start()

    def put(self, item: Point | Transition) -> None:
        """Pass an item on; returns at once."""
        started = self._started
        if started is not None and time.monotonic() - started > SLOW_SECONDS:
            self._complain("slow", f"has taken more than {SLOW_SECONDS:g} seconds for one item, and others wait for it")
        self._items.put(item)

    def finish(self) -> None:
        """Close the sink after what it was sent; returns at once."""
        self._ends = time.monotonic() + self._close_seconds
        self._items.put(None)

    def wait(self) -> None:
        """Wait until the sink is closed, or has had its time since `finish`."""
        self._thread.join(max(self._ends - time.monotonic(), 0))
        if self._thread.is_alive():
            self._complain("late", f"has not finished {self._close_seconds:g} seconds after the end and is left behind")

    @property
    def is_content(self) -> bool:
        """Whether nothing has gone wrong."""
        return not self._complaints

    @property
    def _close_seconds(self) -> float:
        return getattr(self._sink, "close_seconds", CLOSE_SECONDS)

    def _run(self, trajectory: Callable[[], Trajectory], settings: Callable[[], Mapping[str, Any]]) -> None:
        attach, describe = (getattr(self._sink, name, None) for name in ("attach", "describe"))
        if callable(attach):
            self._call(lambda: attach(trajectory))
        while (item := self._items.get()) is not None and not exiting.is_set():
            if callable(describe):
                self._call(lambda describe=describe: describe(settings()))
                describe = None
            self._call(lambda item=item: self._sink.write(item))
        if not exiting.is_set():
            self._call(self._sink.close)

    def _call(self, action: Callable[[], object]) -> None:
        self._started = time.monotonic()
        try:
            action()
        except BaseException as error:  # nothing that a sink raises, SystemExit included, may end its thread
            self._complain("failed", f"failed and lost what it was writing ({type(error).__name__}: {error})")
        finally:
            self._started = None

    def _complain(self, kind: str, what: str) -> None:
        """Say each kind once, and nothing of a failure that comes after it was left behind."""
        if not self._complaints & {kind, "late"}:
            self._complaints.add(kind)
            advice = getattr(self._sink, "advice", "")
            warn(f"The sink {self._name} {what}; training and the other sinks go on.{f' {advice}' if advice else ''}")


def send(points: Trajectory, transitions: Iterable[Transition], sink: Sink) -> bool:
    """Tell a sink of a run that is measured already, and wait until it is closed.

    Args:
        points: of the run.
        transitions: of the points.
        sink: what to tell.

    Returns:
        Whether it took everything in its time; a warning says why not.
    """
    outlet = Outlet(sink, lambda: points)
    for item in (*points, *transitions):
        outlet.put(item)
    outlet.finish()
    outlet.wait()
    return outlet.is_content
