"""Where points and transitions go: to the run's folder, and to sinks that can't hurt training or each other."""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from phasewatch.monitor.errors import warn
from phasewatch.monitor.trajectories.trajectory import Point, Trajectory
from phasewatch.monitor.trajectories.transitions import Transition, find_transitions


class Sink(Protocol):
    """Somewhere that points and transitions are written to."""

    def write(self, item: Point | Transition) -> None:
        """Take one point, or one transition: when it is confirmed, and at the end those still provisional."""

    def close(self) -> None:
        """Finish: nothing more is written."""


class Publisher:
    """Tells the sinks of each point, and of each transition once, when later points can't take it back.

    Each sink has a thread of its own. One that raises loses that row; one that takes longer than the timeout loses its
    remaining rows; either costs one warning.

    Args:
        sinks: what to tell.
        timeout: seconds that a sink may take for one item.
        known: points of an earlier process, which are told again, and whose confirmed transitions aren't.
    """

    def __init__(self, sinks: Iterable[Sink], *, timeout: float = 30.0, known: Sequence[Point] = ()) -> None:
        self._outlets = [_Outlet(sink, timeout) for sink in sinks]
        self._points = list(known)
        self._found: list[Transition] = []
        self._complained = False
        self._announced = [t for t in self.transitions() if not t.provisional]
        for point in known:
            self._tell(point)

    def transitions(self) -> list[Transition]:
        """The transitions of the points so far; those found last if the search fails, which costs one warning."""
        try:
            self._found = find_transitions(Trajectory(self._points))
        except Exception as error:
            if not self._complained:
                self._complained = True
                warn(f"Transitions could not be looked for, and the points go on: {type(error).__name__}: {error}")
        return self._found

    def publish(self, point: Point) -> list[Transition]:
        """Tell of a point, and of the transitions that it confirms.

        Args:
            point: the newest measured; its step may be earlier than others'.

        Returns:
            The transitions as they stand now.
        """
        self._points.append(point)
        self._tell(point)
        found = self.transitions()
        for transition in found:
            if not transition.provisional and not any(_same(transition, other) for other in self._announced):
                self._announced.append(transition)
                self._tell(transition)
        return found

    def close(self) -> list[Transition]:
        """Tell of the transitions that are still provisional, and wait for the sinks.

        Returns:
            The transitions of the whole trajectory.
        """
        found = self.transitions()
        for transition in found:
            if not any(_same(transition, other) for other in self._announced):
                self._tell(transition)
        for outlet in self._outlets:
            outlet.finish()
        for outlet in self._outlets:
            outlet.wait()
        return found

    def _tell(self, item: Point | Transition) -> None:
        for outlet in self._outlets:
            outlet.put(item)


def _same(a: Transition, b: Transition) -> bool:
    """Whether two findings are of one transition: the same kind, and more than half of the shorter one in common."""
    common = min(a.end, b.end) - max(a.start, b.start)
    return a.kind is b.kind and common > min(a.end - a.start, b.end - b.start) / 2


class _Outlet:
    """One sink and its thread."""

    def __init__(self, sink: Sink, timeout: float) -> None:
        self._sink = sink
        self._timeout = timeout
        self._name = type(sink).__name__
        self._items: queue.SimpleQueue[Point | Transition | None] = queue.SimpleQueue()
        self._started: float | None = None
        self._complained = False
        self._given_up = False
        self._thread = threading.Thread(target=self._run, name=f"phasewatch-{self._name}", daemon=True)
        self._thread.start()

    def put(self, item: Point | Transition) -> None:
        if not self._hangs():
            self._items.put(item)

    def finish(self) -> None:
        self._items.put(None)

    def wait(self) -> None:
        while self._thread.is_alive() and not self._hangs():
            self._thread.join(min(0.05, self._timeout))

    def _hangs(self) -> bool:
        started = self._started
        if not self._given_up and started is not None and time.monotonic() - started > self._timeout:
            self._given_up = True
            self._complain(f"has taken more than {self._timeout:g} seconds and gets nothing more")
        return self._given_up

    def _run(self) -> None:
        while (item := self._items.get()) is not None:
            self._call(lambda item=item: self._sink.write(item))
        self._call(self._sink.close)

    def _call(self, action: Callable[[], None]) -> None:
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
