"""A plot under a notebook's cell that grows while training goes on."""

import time
from collections.abc import Callable
from importlib import import_module

from phasewatch.callbacks.figures.notebook import trajectory_html
from phasewatch.monitor.errors import PhasewatchError, requires
from phasewatch.monitor.trajectories.changes import Transition
from phasewatch.monitor.trajectories.points import Point
from phasewatch.monitor.trajectories.trajectory import Trajectory

SHARE = 0.05
"""Drawing takes at most this share of the time."""


class LivePlot:
    """Draws the trajectory so far below the notebook's cell in which it was made, and again as points come.

    It is drawn by the sink's own thread, seldom enough to take at most a twentieth of the time, and once more at the
    end.

    Raises:
        PhasewatchError: outside of a notebook, or if IPython or matplotlib isn't installed.

    Example:
        In a notebook, `pw.PhaseMonitor(model, probe, run="runs/first", at=pw.every(100), sinks=[pw.LivePlot()])`:

        >>> import phasewatch as pw
        >>> try:
        ...     pw.LivePlot()
        ... except pw.PhasewatchError as error:
        ...     print(error)
        LivePlot() draws below a cell of a notebook, and this is none; leave it out, and look at the run's report.html.
    """

    def __init__(self) -> None:
        with requires("LivePlot()"):
            from IPython.core.getipython import get_ipython
            from IPython.display import HTML, display

            import_module("matplotlib")
        if get_ipython() is None:
            raise PhasewatchError(
                "LivePlot() draws below a cell of a notebook, and this is none; leave it out, and look at the run's "
                "report.html."
            )
        self._html = HTML
        self._display = display(HTML("<p>No point yet.</p>"), display_id=True)
        self._trajectory: Callable[[], Trajectory] = Trajectory
        self._next = 0.0

    def attach(self, trajectory: Callable[[], Trajectory]) -> None:
        """Take the function that returns the trajectory so far."""
        self._trajectory = trajectory

    def write(self, item: Point | Transition) -> None:
        """Draw, unless it was drawn just now."""
        if time.monotonic() >= self._next:
            self._draw()

    def close(self) -> None:
        """Draw what there is at the end."""
        self._draw()

    def _draw(self) -> None:
        began = time.monotonic()
        if self._display is not None:
            self._display.update(self._html(trajectory_html(self._trajectory())))
        ended = time.monotonic()
        self._next = ended + (ended - began) / SHARE
