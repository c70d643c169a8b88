"""Points and transitions in Weights & Biases, without ever costing the user a row of their own."""

import importlib.util
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phasewatch.callbacks.sinks.wandb_feed import Feed, Results
from phasewatch.callbacks.sinks.wandb_process import WandbProcess
from phasewatch.callbacks.sinks.wandb_run import Choice, Mode, refuse_foreign_settings
from phasewatch.monitor.errors import PhasewatchError, real_number, requires, warn
from phasewatch.monitor.files import inside
from phasewatch.monitor.runs.sink import CLOSE_SECONDS, send
from phasewatch.monitor.trajectories.trajectory import Point, Trajectory
from phasewatch.monitor.trajectories.transitions import Transition, find_transitions

if TYPE_CHECKING:
    import wandb

SEND_SECONDS = 300.0
"""Seconds that W&B may take for a run that is sent to it afterwards."""


class WandbSink:
    """Writes points and transitions to a W&B run: the user's, if one is open at the first write, else one of its own.

    Every point gives `phase/loss`, `phase/llc`, `phase/llc_low` and `phase/llc_high` (two standard errors either side),
    `phase/health` (a word), `phase/doubtful` (0 or 1) and `phase/<metric>`, over `phase/step`. The table
    `phase/transitions`, the picture `phase/figure` and the chart `phase/llc_band` are drawn again at each confirmed
    transition, which gives an alert too, and at the end. A watched log-likelihood that turns after a rise gives one
    alert. The run's configuration holds the sampler and the seed, under `phasewatch`.

    In a trainer's run (`HuggingFaceCallback`, `LightningCallback`) each result is a row of its own, logged as it comes.
    In a run of your own loop a result waits for your next row and shares it, since a row of its own would move the step
    that you may log with; whatever still waits is written when the run finishes or the process exits. A process that is
    killed leaves it out of W&B.

    A run of the sink's own is separate from `wandb.run`, is never returned by a later `wandb.init()`, and is offline if
    no API key is configured. Unless the program has imported W&B itself, it lies in a process of its own, since that
    import alone would hold up training for a second.

    Args:
        run: the run to write to; without it `wandb.run`, or a run of the sink's own.
        own_run: open a run of the sink's own even if `wandb.run` is there, by default in the same project.
        project: W&B project of a run of the sink's own.
        name: its name.
        group: its group.
        mode: "online", "offline" or "disabled".
        close_seconds: how long the end of a training waits for W&B. A run of the sink's own that isn't uploaded when
            the process ends is left as it is.

    Attributes:
        close_seconds: the same.
        advice: what to do about results that W&B didn't take.

    Raises:
        PhasewatchError: the arguments contradict each other, `mode` is unknown, or W&B isn't installed.

    Example:
        >>> sink = WandbSink(own_run=True, project="grokking", mode="disabled")
        >>> sink.close()
    """

    advice = "Points are in points.jsonl, and `phasewatch replay RUN --wandb` sends them to a new W&B run."

    def __init__(
        self,
        run: "wandb.Run | None" = None,
        *,
        own_run: bool = False,
        project: str | None = None,
        name: str | None = None,
        group: str | None = None,
        mode: Mode | None = None,
        close_seconds: float = CLOSE_SECONDS,
    ) -> None:
        self.close_seconds = real_number("WandbSink(close_seconds=...)", close_seconds, least=0)
        with requires("WandbSink()"):
            if importlib.util.find_spec("wandb") is None:  # importing it takes a second, and is left to the first write
                raise ModuleNotFoundError(name="wandb")
        described = {"own_run": own_run, "project": project, "name": name, "group": group, "mode": mode}
        self._arguments = {**described, "close_seconds": self.close_seconds}
        self._choice = Choice(run, **self._arguments)
        self._results = Results()
        self._trajectory: Callable[[], Trajectory] | None = None
        self._apart: WandbProcess | None = None
        self._feed: Feed | None = None
        self._settings: Mapping[str, Any] = {}
        self._in_own_rows = False
        self._has_warned = False
        self._closed = False
        self._lock = threading.RLock()

    def attach(self, trajectory: Callable[[], Trajectory]) -> None:
        """Be told where the points so far are kept, for the table, the picture and the chart; none without it.

        Args:
            trajectory: returns the points so far.
        """
        with self._lock:
            self._trajectory = trajectory
            self._results.attach(trajectory)

    def describe(self, settings: Mapping[str, Any]) -> None:
        """Be told what the points are measured with, for the run's configuration.

        Args:
            settings: of the probe, as plain JSON values.
        """
        with self._lock:
            self._settings = settings

    def join_trainer(self) -> None:
        """Log each result in a row of its own, in a run in which nobody logs with `step=`."""
        self._in_own_rows = True

    def write(self, item: Point | Transition) -> None:
        """Log a point or a transition, at once or with the user's next row.

        Whatever W&B raises comes out of here. The item is kept, and logged with the next one.

        Args:
            item: what was measured or found.

        Raises:
            PhasewatchError: the sink is closed.
        """
        with self._lock:
            if self._closed:
                raise PhasewatchError("WandbSink.write(...) came after close(); nothing can be written any more.")
            if self._is_apart():
                self._process().write(item)
                return
            self._results.take(item)
            feed = self._open()
            if feed.finished:
                self._warn_that_it_is_finished(feed)
            else:
                feed.deliver()

    def close(self) -> None:
        """Draw everything once more; finish a run of our own, and leave the user's run open.

        What the user's run still has to take is logged as they log on, and the rest when they finish it.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._apart is not None:
                self._apart.close()
                return
            self._results.draw_at_last()
            if self._feed is None and not self._results.rows:
                return
            feed = self._open()
            if not feed.finished:
                feed.close()

    def _is_apart(self) -> bool:
        """Whether the run lies in a process of its own: nobody can have given one, or opened one, without W&B."""
        return self._apart is not None or (self._feed is None and "wandb" not in sys.modules)

    def _process(self) -> WandbProcess:
        """Start the process of the run, once."""
        if self._apart is None:
            self._apart = WandbProcess(self._arguments)
            if self._trajectory is not None:
                self._apart.ask(points=[point.as_json() for point in self._trajectory()])
            if self._settings:
                self._apart.ask(settings=dict(self._settings))
        return self._apart

    def _open(self) -> Feed:
        """Find the run to write to, once."""
        if self._feed is None:
            feed = Feed(self._choice, self._results, self._lock, in_own_rows=self._in_own_rows)
            self._feed = feed
            if self._settings and not feed.finished:
                feed.describe(self._settings)
        return self._feed

    def _warn_that_it_is_finished(self, feed: Feed) -> None:
        if not self._has_warned:
            self._has_warned = True
            warn(
                f"WandbSink can't log any more: the W&B run {feed.run.id} is finished, and results still come. They "
                "are in points.jsonl; close the monitor before run.finish(), or use WandbSink(own_run=True)."
            )


def send_run(run: Path) -> bool:
    """Send the points of a run's folder, and their transitions, to a W&B run of their own.

    Args:
        run: the run's folder, with its `points.jsonl`.

    Returns:
        Whether W&B took them within `SEND_SECONDS`; a warning says why not.

    Raises:
        PhasewatchError: if it is none, or W&B isn't installed.
    """
    from phasewatch.monitor.runs.folder import settings_of  # with torch, which a sink doesn't need

    refuse_foreign_settings()
    points = Trajectory.read(inside(run, "points.jsonl"))
    sink = WandbSink(own_run=True, name=run.resolve().name, close_seconds=SEND_SECONDS)
    sink.describe(settings_of(run))
    return send(points, find_transitions(points), sink)
