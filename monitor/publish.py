"""Where points and transitions go: sinks, each in a thread of its own so that none can hurt training or another."""

from typing import Protocol

from phasewatch.monitor.trajectory import Point
from phasewatch.monitor.transitions import Transition


class Sink(Protocol):
    """Somewhere that points and transitions are written to."""

    def write(self, item: Point | Transition) -> None:
        """Take one point, or one transition when it is confirmed (and at the end those still provisional)."""

    def close(self) -> None:
        """Finish: nothing more is written."""
