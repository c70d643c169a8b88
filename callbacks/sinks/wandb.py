"""Points and transitions in Weights & Biases, without ever costing the user a row of their own.

W&B has one open history row at a time. A row that a monitor commits moves the run's step on, and what the user then
logs with a smaller `step=` is dropped. So while the user may still log to a run, this sink commits nothing there: it
adds at most one result to each of their rows (`commit=False`; a second one would overwrite the first), with
`phase/step` as its own x-axis, and what is left over becomes rows when the run finishes or the process ends.
"""

import atexit
import io
import math
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

from phasewatch.monitor.errors import PhasewatchError, warn
from phasewatch.monitor.estimates.estimate import Health
from phasewatch.monitor.trajectories.trajectory import Point
from phasewatch.monitor.trajectories.transitions import Transition

if TYPE_CHECKING:
    import wandb

Mode = Literal["online", "offline", "disabled"]

POLL_SECONDS = 0.2  # between questions whether the user has begun a new row; one takes half a millisecond

TABLE_COLUMNS = (
    "kind",
    "start",
    "end",
    "loss change",
    "llc change",
    "llc error",
    "confidence",
    "provisional",
    "in words",
)


class WandbSink:
    """Writes points and transitions to a W&B run: the user's, if one is open at the first write, else one of its own.

    Every point gives `phase/loss`, `phase/llc`, `phase/llc_low` and `phase/llc_high` (two standard errors either side),
    `phase/health` (a word), `phase/doubtful` (0 or 1) and `phase/<metric>`, over `phase/step`. Every transition gives
    `phase/transition_*` and, when it is confirmed, one alert. The table `phase/transitions`, the picture `phase/figure`
    and the chart `phase/llc_band` are drawn again at each confirmed transition and at the end.

    In the user's run a result waits for the user's next row, so one that logs seldom shows results late; whatever still
    waits is written when the run finishes or the process exits. A process that is killed leaves them out of W&B.
    A run of the sink's own is separate from `wandb.run`, is never returned by a later `wandb.init()`, and is offline if
    no API key is configured.

    Args:
        run: the run to write to; without it `wandb.run`, or a run of the sink's own.
        own_run: open a run of the sink's own even if `wandb.run` is there, by default in the same project.
        project: W&B project of a run of the sink's own.
        name: its name.
        group: its group.
        mode: "online", "offline" or "disabled".

    Raises:
        PhasewatchError: the arguments contradict each other, or `mode` is unknown.
    """

    def __init__(
        self,
        run: "wandb.Run | None" = None,
        *,
        own_run: bool = False,
        project: str | None = None,
        name: str | None = None,
        group: str | None = None,
        mode: Mode | None = None,
    ) -> None:
        self._settings: dict[str, Any] = {"project": project, "name": name, "group": group, "mode": mode}
        given = [key for key, value in {"own_run": own_run or None, **self._settings}.items() if value is not None]
        if run is not None and given:
            raise PhasewatchError(
                f"WandbSink(run=..., {given[0]}=...) names a run and describes another; "
                f"leave out either run or {' and '.join(given)}."
            )
        if run is not None and not callable(getattr(run, "log", None)):
            raise PhasewatchError(f"WandbSink(run=...) must be what wandb.init() returns, not {type(run).__name__}.")
        if mode is not None and mode not in get_args(Mode):
            raise PhasewatchError(f"WandbSink(mode=...) must be one of {', '.join(get_args(Mode))}, not {mode!r}.")
        self._own_run = own_run
        self._run = run
        self._opened = False
        self._ours = False

        self._points: dict[int, Point] = {}
        self._rows: deque[dict[str, Any]] = deque()
        self._alerts: deque[tuple[str, str]] = deque()
        self._confirmed: set[tuple[str, int, int]] = set()
        self._defined: set[str] = set()
        self._news = False
        self._redraw = False

        self._commits = False
        self._filled: int | None = -1
        self._finished = False
        self._told = False
        self._closed = False
        self._failure: Exception | None = None
        self._poller: threading.Thread | None = None
        self._lock = threading.RLock()

    def write(self, item: Point | Transition) -> None:
        """Log a point or a transition, at once or with the user's next row.

        Whatever W&B raises comes out of here. The item is kept, and logged with the next one.

        Raises:
            PhasewatchError: the sink is closed.
        """
        with self._lock:
            if self._closed:
                raise PhasewatchError("WandbSink.write(...) came after close(); nothing can be written any more.")
            self._take(item)
            self._open()
            if self._finished:
                self._tell_finished()
                return
            self._deliver()

    def close(self) -> None:
        """Draw everything once more; finish a run of our own, and leave the user's run open.

        What the user's run still has to take is logged as they log on, and the rest when they finish it.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._redraw = self._news and bool(self._points)
            if not (self._opened or self._rows) or self._finished:
                return
            try:
                self._open()
                if not self._finished:
                    self._deliver()
            finally:
                if self._ours and self._run is not None:
                    self._finished = True
                    self._run.finish()

    def _take(self, item: Point | Transition) -> None:
        """Note an item in our own state, which nothing that W&B does can lose."""
        self._news = True
        if isinstance(item, Point):
            self._points[item.step] = item
            self._rows.append(point_row(item))
            return
        if not item.provisional:
            key = (item.kind.name, item.start, item.end)
            if key in self._confirmed:
                return
            self._confirmed.add(key)
            self._alerts.append((f"phasewatch: transition of type {item.kind.name}", str(item)))
            self._redraw = bool(self._points)
        self._rows.append(transition_row(item))

    def _open(self) -> None:
        """Find the run to write to, once."""
        if self._opened:
            return
        import wandb

        run = self._run
        if run is None and not self._own_run:
            run = wandb.run
        if run is not None and _is_finished(run):
            self._finished = self._opened = True
            return
        says = None
        if run is not None and (run.disabled or self._join(run)):
            # Exit handlers that are registered while the process exits aren't called any more.
            self._run, self._commits = run, run.disabled or not threading.main_thread().is_alive()
        else:
            self._run, says = _open_own_run(run or wandb.run, **self._settings)
            self._ours = self._commits = True
            if run is not None:
                says = f"WandbSink can't share the W&B run {run.id} safely, so it writes to {self._run.id} beside it."
        self._opened = True
        if says:
            warn(says)

    def _join(self, run: "wandb.Run") -> bool:
        """Arrange to be called when this run finishes; False if that, or asking for its step, isn't possible."""
        try:
            from wandb.sdk.wandb_run import TeardownHook, TeardownStage

            if run.settings.mode == "shared":
                return False
            run._teardown_hooks.append(TeardownHook(self._on_finish, TeardownStage.EARLY))
        except (ImportError, AttributeError):
            return False
        atexit.register(self._at_exit)
        return True

    def _deliver(self) -> None:
        """Log what can be logged now, and leave the rest to a thread that waits for the user's rows."""
        run = self._run
        assert run is not None
        try:
            while self._alerts:
                title, text = self._alerts[0]
                run.alert(title, text)
                self._alerts.popleft()
            while self._waiting() and (self._commits or self._row_is_free(run)):
                self._send_one(run)
        finally:
            if self._waiting() and not self._commits and self._poller is None:
                self._poller = threading.Thread(target=self._poll, name="phasewatch-wandb", daemon=True)
                self._poller.start()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _waiting(self) -> bool:
        return bool(self._rows) or self._redraw

    def _row_is_free(self, run: "wandb.Run") -> bool:
        """Whether the run's open row holds nothing of ours yet."""
        step = run.step
        if self._filled is None:
            self._filled = step
        return step > self._filled

    def _send_one(self, run: "wandb.Run") -> None:
        """Log the next result: in the user's rows the picture goes first, since they may log seldom.

        A picture that fails is tried again at the next transition or at the end, a row with the next call.
        """
        self._filled = None
        if self._redraw and not (self._commits and self._rows):
            self._redraw = False
            self._log(run, drawing_row(self._points.values()))
            self._news = False
        else:
            self._log(run, self._rows[0])
            self._rows.popleft()
        # Read after logging: if the user's next row began in between, ours waits a row too long, which costs nothing.
        if not self._commits:
            self._filled = run.step

    def _log(self, run: "wandb.Run", row: Mapping[str, Any]) -> None:
        for name in row:
            if name not in self._defined:
                # Never `phase/*`: which of two patterns wins over another library's `*` varies between processes.
                axis = None if name == "phase/step" else "phase/step"
                run.define_metric(name, step_metric=axis, step_sync=False if axis else None)
                self._defined.add(name)
        run.log(dict(row), commit=self._commits)

    def _poll(self) -> None:
        """Give each new row of the user's one result, until none waits."""
        while True:
            time.sleep(POLL_SECONDS)
            with self._lock:
                try:
                    if not self._finished and self._run is not None:
                        while self._waiting() and self._row_is_free(self._run):
                            self._send_one(self._run)
                except Exception as error:
                    self._failure = error
                if self._finished or self._failure is not None or not self._waiting():
                    self._poller = None
                    return

    def _on_finish(self) -> None:
        """The user finishes the run: they log no more, so rows of our own can't cost them any."""
        with self._lock:
            if not self._finished:
                atexit.unregister(self._at_exit)
                self._settle()
                self._finished = True

    def _at_exit(self) -> None:
        """The process ends with the run open: W&B calls no hook then. What a monitor still sends is logged at once."""
        with self._lock:
            if not self._finished:
                self._settle()

    def _settle(self) -> None:
        """Log all that waits, in rows of our own."""
        run = self._run
        assert run is not None
        self._redraw = self._news and bool(self._points)
        self._failure = None
        try:
            if not self._commits:
                if not self._row_is_free(run):
                    run.log({}, commit=True)
                self._commits = True
            self._deliver()
        except Exception as error:
            warn(
                f"WandbSink could not log its last results to the W&B run {run.id} as it ended ({len(self._rows)} rows "
                f"are left): {type(error).__name__}: {error}. They are in points.jsonl."
            )

    def _tell_finished(self) -> None:
        if self._told:
            return
        self._told = True
        run = self._run.id if self._run is not None else "it joined"
        warn(
            f"WandbSink can't log any more: the W&B run {run} is finished, and results still come. They are in "
            "points.jsonl; close the monitor before run.finish(), or use WandbSink(own_run=True)."
        )


def point_row(point: Point) -> dict[str, Any]:
    """A point as one history row; a metric whose name is taken becomes `phase/metrics/<name>`."""
    llc = point.llc
    row: dict[str, Any] = {
        "phase/step": point.step,
        "phase/loss": point.loss,
        "phase/llc": llc.value,
        "phase/llc_low": llc.value - 2 * llc.error,
        "phase/llc_high": llc.value + 2 * llc.error,
        "phase/health": llc.health.name,
        "phase/doubtful": int(llc.health is not Health.OK),
    }
    taken = {key.removeprefix("phase/") for key in row} | {"figure", "llc_band"}
    for name, value in point.metrics.items():
        row[f"phase/metrics/{name}" if name in taken or name.startswith("transition") else f"phase/{name}"] = value
    return row


def transition_row(transition: Transition) -> dict[str, Any]:
    """A transition as one history row, at the step where it ends."""
    return {
        "phase/step": transition.end,
        "phase/transition": str(transition),
        "phase/transition_kind": transition.kind.name,
        "phase/transition_start": transition.start,
        "phase/transition_end": transition.end,
        "phase/transition_loss_change": transition.loss_change,
        "phase/transition_llc_change": transition.llc_change,
        "phase/transition_llc_error": transition.llc_error,
        "phase/transition_confidence": transition.confidence,
        "phase/transition_provisional": int(transition.provisional),
    }


def find_and_draw(points: Iterable[Point]) -> tuple[list[Transition], bytes]:
    """The transitions that all these points show together, and the picture of them as a PNG file."""
    from phasewatch.callbacks.figures.trajectory import draw_trajectory
    from phasewatch.monitor.trajectories.trajectory import Trajectory
    from phasewatch.monitor.trajectories.transitions import find_transitions

    trajectory = Trajectory(points)
    transitions = list(find_transitions(trajectory))
    png = io.BytesIO()
    draw_trajectory(trajectory, transitions).savefig(png, format="png", dpi=150)
    return transitions, png.getvalue()


def drawing_row(points: Iterable[Point]) -> dict[str, Any]:
    """The transitions that all these points show, as a table, a picture and a chart, in one history row."""
    import PIL.Image
    import wandb

    points = sorted(points, key=lambda point: point.step)
    transitions, png = find_and_draw(points)
    row = {
        "phase/step": points[-1].step,
        "phase/transitions": wandb.Table(columns=list(TABLE_COLUMNS), data=[_table_row(t) for t in transitions]),
        # Not wandb.Image(figure): that replaces a method of matplotlib's, and needs pyplot.
        "phase/figure": wandb.Image(PIL.Image.open(io.BytesIO(png))),
    }
    known = [point for point in points if math.isfinite(point.llc.value) and math.isfinite(point.llc.error)]
    if known:
        row["phase/llc_band"] = wandb.plot.line_series(
            xs=[point.step for point in known],
            ys=[[point.llc.value + side * point.llc.error for point in known] for side in (-2, 0, 2)],
            keys=["llc - 2 errors", "llc", "llc + 2 errors"],
            title="Local learning coefficient, with twice its standard error",
            xname="training step",
        )
    return row


def _table_row(transition: Transition) -> list[Any]:
    return [
        transition.kind.name,
        transition.start,
        transition.end,
        transition.loss_change,
        transition.llc_change,
        transition.llc_error,
        transition.confidence,
        transition.provisional,
        str(transition),
    ]


def _is_finished(run: "wandb.Run") -> bool:
    return bool(getattr(run, "_is_finished", False))


def _open_own_run(
    beside: "wandb.Run | None", *, project: str | None, name: str | None, group: str | None, mode: Mode | None
) -> tuple["wandb.Run", str | None]:
    """A run of our own, in the project of the run `beside` it, and what the user should hear about it."""
    import wandb

    entity = None
    if beside is not None:
        project, entity, group = project or beside.project, beside.entity or None, group or beside.group or None
        name = name or (f"{beside.name}-phasewatch" if beside.name else None)
        mode = mode or next((known for known in get_args(Mode) if known == beside.settings.mode), None)
    keyless = mode is None and not _has_key()
    run = wandb.init(
        project=project,
        entity=entity,
        name=name,
        group=group,
        mode="offline" if keyless else mode,
        reinit="create_new",
        settings=wandb.Settings(console="off"),
    )
    # W&B counts it among the runs that a later wandb.init() returns, or finishes, in place of a new one.
    forget = getattr(getattr(run, "_wl", None), "remove_active_run", None)
    if forget is not None:
        forget(run)
    if not keyless:
        return run, None
    directory = run.settings.sync_dir
    return run, (
        "WandbSink() found no W&B API key, so its run is offline, in "
        f"{directory}; `wandb sync {directory}` uploads it. Run `wandb login` first, or pass mode='offline'."
    )


def _has_key() -> bool:
    """Whether W&B can go online without asking the user, or was told not to; looks at no network."""
    import wandb
    from wandb.sdk.lib import wbauth

    settings = wandb.setup().settings
    return settings.mode != "online" or (
        wbauth.authenticate_session(host=settings.base_url, source="phasewatch", prompt=False, update_session=False)
        is not None
    )
