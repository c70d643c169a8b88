"""The one path of a point: to the run's folder, to the sinks, and into the search for transitions."""

from collections.abc import Iterable, Mapping
from typing import Any

from phasewatch.monitor.errors import in_words, warn
from phasewatch.monitor.runs.folder import RunFolder
from phasewatch.monitor.runs.sink import Outlet, Sink
from phasewatch.monitor.trajectories.pace import Pace
from phasewatch.monitor.trajectories.trajectory import Point, Trajectory
from phasewatch.monitor.trajectories.transitions import Transition, find_transitions, is_same_transition


class Recorder:
    """Keeps each point, tells the sinks of it, and tells them of each transition once, when it is confirmed.

    Args:
        sinks: what to tell. Points that the folder holds already are told again, and their confirmed transitions
            aren't.
        folder: where points and transitions are kept; without one, points are kept in memory.
        settings: what the points are measured with, where there is no folder to say so.

    Attributes:
        found: the transitions as they were last looked for.
    """

    def __init__(
        self,
        sinks: Iterable[Sink] = (),
        folder: RunFolder | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._folder = folder
        self._points: list[Point] = folder.points if folder else []
        self._known = Trajectory()
        self.found: list[Transition] = []
        self._search_failed = False
        self._pace = Pace()
        self._announced = [transition for transition in self.transitions() if not transition.provisional]
        self._outlets = [
            Outlet(sink, self.trajectory, lambda: folder.settings if folder else settings or {}) for sink in sinks
        ]
        for point in self._points:
            self._tell(point)

    def trajectory(self) -> Trajectory:
        """The points so far."""
        points, known = self._points[:], self._known  # sinks ask from threads of their own
        if len(known) != len(points):
            self._known = known = Trajectory(points)
        return known

    def record(self, *points: Point) -> bool:
        """Keep points that came at the same time, then tell of them and of the transitions that they confirm.

        Transitions are looked for after every point, and in a run of more than 200 points after 1 % more.

        Args:
            points: of steps that aren't there yet, earlier than others' or not.

        Returns:
            Whether every point is where it is kept: False while a disk refuses some.
        """
        if self._folder:
            is_kept = self._folder.append(*points)
        else:
            self._points += points
            is_kept = True
        for point in points:
            self._tell(point)
        if self._pace.is_due(len(self._points)):
            found = self.transitions()
            for transition in found:
                if not transition.provisional and not self._is_announced(transition):
                    self._announced.append(transition)
                    self._tell(transition)
            self._write(found)
        return is_kept

    def transitions(self) -> list[Transition]:
        """The transitions of the points so far; those found last if the search fails, which costs one warning."""
        try:
            self.found = find_transitions(self.trajectory())
        except Exception as error:
            if not self._search_failed:
                self._search_failed = True
                warn(f"Transitions could not be looked for, and the points go on: {in_words(error)}")
        return self.found

    def close(self) -> None:
        """Tell that this is the end, and wait for the sinks."""
        self.finish()
        self.wait()

    def finish(self) -> None:
        """Write `transitions.json`, and tell the sinks of what is still provisional and that this is the end."""
        found = self.transitions()
        for transition in found:
            if not self._is_announced(transition):
                self._tell(transition)
        for outlet in self._outlets:
            outlet.finish()
        self._write(found)

    def wait(self) -> None:
        """Wait for the sinks, each as long after `finish` as it says."""
        for outlet in self._outlets:
            outlet.wait()

    def _is_announced(self, transition: Transition) -> bool:
        return any(is_same_transition(transition, other) for other in self._announced)

    def _tell(self, item: Point | Transition) -> None:
        for outlet in self._outlets:
            outlet.put(item)

    def _write(self, found: list[Transition]) -> None:
        if self._folder:
            self._folder.write_transitions(found)
