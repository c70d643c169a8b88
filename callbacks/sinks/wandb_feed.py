"""What waits to be logged to a W&B run, and when it may be.

W&B has one open history row at a time. A row that a monitor commits moves the run's step on, and what the user then
logs with a smaller `step=` is dropped. So while the user may still log to a run, nothing is committed there: each of
their rows gets at most one result (`commit=False`; a second one would overwrite the first), with `phase/step` as its
own x-axis, and what is left over becomes rows when the run finishes or the process ends. A trainer logs without
`step=` and has its own step in each row, so that beside one each result gets a row of its own, at once.
"""

import atexit
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from phasewatch.callbacks.sinks.wandb_rows import drawing_row, point_row, table_row
from phasewatch.callbacks.sinks.wandb_run import Choice
from phasewatch.monitor.emergence.watching import NewRedFlags, RedFlag
from phasewatch.monitor.errors import in_words, warn
from phasewatch.monitor.runs.exiting import exiting, settle_at_exit
from phasewatch.monitor.runs.sink import CLOSE_SECONDS
from phasewatch.monitor.trajectories.trajectory import Point, Trajectory
from phasewatch.monitor.trajectories.transitions import Transition, is_same_transition

POLL_SECONDS = 0.2
"""Seconds between questions whether the user has begun a new row; one question takes half a millisecond."""


class Results:
    """Rows, alerts and drawings that wait to be logged.

    Attributes:
        rows: of points, in the order in which they came.
        alerts: title and text of each confirmed transition's and each red flag's.
    """

    def __init__(self) -> None:
        self.rows: deque[dict[str, Any]] = deque()
        self.alerts: deque[tuple[str, str]] = deque()
        self._trajectory: Callable[[], Trajectory] | None = None
        self._confirmed: list[Transition] = []
        self._provisional: list[Transition] = []
        self._red_flags = NewRedFlags()
        self._has_points = False
        self._has_news = False
        self._drawing_is_due = False

    def attach(self, trajectory: Callable[[], Trajectory]) -> None:
        """Draw this trajectory and look for red flags in it; without one there are no pictures and no red flags."""
        self._trajectory = trajectory

    def take(self, item: Point | Transition) -> None:
        """Keep an item until it is logged; transitions are for the table."""
        self._has_news = True
        if isinstance(item, Point):
            self._has_points = True
            self.rows.append(point_row(item))
            if self._trajectory is not None:
                self._alert(self._red_flags.after(item, self._trajectory))
            return
        if item.provisional:
            self._provisional.append(item)
        elif not any(is_same_transition(item, other) for other in self._confirmed):
            self._confirmed.append(item)
            self.alerts.append((f"phasewatch: transition of type {item.kind.name}", str(item)))
            self._drawing_is_due = self._can_draw

    @property
    def wait(self) -> bool:
        """Whether a row waits."""
        return bool(self.rows) or self._drawing_is_due

    def draw_at_last(self) -> None:
        """Draw once more if anything came since the last drawing, and look for red flags among all points."""
        if self._trajectory is not None and self._has_news:
            self._alert(self._red_flags.among(self._trajectory()))
        self._drawing_is_due = self._has_news and self._can_draw
        if self._trajectory is None and (found := [*self._confirmed, *self._provisional]):
            self.rows.append(table_row(found, max(transition.end for transition in found)))
            self._confirmed, self._provisional = [], []

    def log_next(self, log: Callable[[Mapping[str, Any]], None], *, rows_first: bool) -> None:
        """Log one row. A row that fails stays; a drawing that fails waits for the next transition or the end.

        Args:
            log: takes the row.
            rows_first: draw only when no other row waits.
        """
        if self._trajectory and self._drawing_is_due and not (rows_first and self.rows):
            self._drawing_is_due = False
            log(drawing_row(self._trajectory()))
            self._has_news = False
        else:
            log(self.rows[0])
            self.rows.popleft()

    def _alert(self, flags: Sequence[RedFlag]) -> None:
        self.alerts += [(f"phasewatch: {flag.title}", str(flag)) for flag in flags]

    @property
    def _can_draw(self) -> bool:
        return self._has_points and self._trajectory is not None


class Feed:
    """Logs results to a run: at once where nobody else logs, and else one with each of the user's rows.

    Args:
        choice: which run.
        results: what waits; guarded by the lock.
        lock: of the sink.
        in_own_rows: results get rows of their own in the user's run, since nobody there logs with `step=`.

    Attributes:
        run: the run.
        ours: whether it is a run of our own.
        finished: whether the run takes nothing any more.
        failure: what W&B raised between two calls of the sink, to come out of the next one.
    """

    def __init__(
        self, choice: Choice, results: Results, lock: AbstractContextManager[Any], *, in_own_rows: bool = False
    ) -> None:
        self._results = results
        self._lock = lock
        self._commits = False
        self._filled: int | None = -1
        self._defined: set[str] = set()
        self._poller: threading.Thread | None = None
        self.failure: Exception | None = None
        self._closing: float | None = None
        opened = choice.open(self._on_finish)
        self.run, self.ours, self.finished = opened.run, opened.ours, opened.finished
        self._commits = opened.commits or in_own_rows
        if not opened.commits and not opened.finished:
            atexit.register(self._at_exit)

    def describe(self, settings: Mapping[str, Any]) -> None:
        """Keep in the run's configuration what the points are measured with."""
        self.run.config.update({"phasewatch": dict(settings)}, allow_val_change=True)

    def deliver(self) -> None:
        """Log what can be logged now, and leave the rest to a thread that waits for the user's rows."""
        try:
            while self._results.alerts:
                self.run.alert(*self._results.alerts[0])
                self._results.alerts.popleft()
            while self._results.wait and (self._commits or self._row_is_free()):
                self._send_one()
        finally:
            if self._results.wait and not self._commits and self._poller is None:
                self._poller = threading.Thread(target=self._poll, name="phasewatch-wandb", daemon=True)
                settle_at_exit(self._poller)
                self._poller.start()
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    def close(self) -> None:
        """Log what can be logged, and finish a run of our own."""
        self._closing = time.monotonic()
        try:
            try:
                self.deliver()
            finally:
                if self.ours:
                    self.finish()
        finally:
            self._closing = None

    def finish(self) -> None:
        """Finish the run."""
        self.finished = True
        self.run.finish()

    def _row_is_free(self) -> bool:
        """Whether the run's open row holds nothing of ours yet."""
        step = self.run.step
        if self._filled is None:
            self._filled = step
        return step > self._filled

    def _send_one(self) -> None:
        """Log the next result: in the user's rows the picture goes first, since they may log seldom."""
        self._filled = None
        self._results.log_next(self._log, rows_first=self._commits)
        # Read after logging: if the user's next row began in between, ours waits a row too long, which costs nothing.
        if not self._commits:
            self._filled = self.run.step

    def _log(self, row: Mapping[str, Any]) -> None:
        for name in row:
            if name not in self._defined:
                # Never `phase/*`: which of two patterns wins over another library's `*` varies between processes.
                axis = None if name == "phase/step" else "phase/step"
                self.run.define_metric(name, step_metric=axis, step_sync=False if axis else None)
                self._defined.add(name)
        self.run.log(dict(row), commit=self._commits)

    def _poll(self) -> None:
        """Give each new row of the user's one result, until none waits."""
        while not exiting.is_set():
            time.sleep(POLL_SECONDS)
            with self._lock:
                try:
                    while not self.finished and self._results.wait and self._row_is_free():
                        self._send_one()
                except Exception as error:
                    self.failure = error
                if self.finished or self.failure is not None or not self._results.wait:
                    self._poller = None
                    return

    def _on_finish(self) -> None:
        """The user finishes the run: they log no more, so rows of our own can't cost them any."""
        atexit.unregister(self._at_exit)
        self._settle_in_time(finished=True)

    def _at_exit(self) -> None:
        """The process ends with the run open: W&B calls no hook then. What a monitor still sends is logged at once."""
        self._settle_in_time()

    def _settle_in_time(self, *, finished: bool = False) -> None:
        """Settle in a thread, which is left alone after `CLOSE_SECONDS`: a table waits for W&B's server.

        Where `close` still waits for it, its seconds count.
        """

        def settle() -> None:
            with self._lock:
                if not self.finished:
                    self._settle()
                    self.finished = finished

        thread = threading.Thread(target=settle, name="phasewatch-wandb-end", daemon=True)
        settle_at_exit(thread)
        thread.start()
        waited = 0.0 if self._closing is None else time.monotonic() - self._closing
        thread.join(max(CLOSE_SECONDS - waited, 0.0))
        if thread.is_alive():
            warn(
                f"WandbSink left its last results out of the W&B run {self.run.id}, since W&B hasn't taken them within "
                f"{CLOSE_SECONDS:g} seconds of its end. They are in points.jsonl."
            )

    def _settle(self) -> None:
        """Log all that waits, in rows of our own."""
        self._results.draw_at_last()
        self.failure = None
        try:
            if not self._commits:
                if not self._row_is_free():
                    self.run.log({}, commit=True)
                self._commits = True
            self.deliver()
        except Exception as error:
            warn(
                f"WandbSink could not log its last results to the W&B run {self.run.id} as it ended "
                f"({len(self._results.rows)} rows are left): {in_words(error)}. They are in points.jsonl."
            )
