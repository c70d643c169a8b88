"""A run as one page that opens anywhere, offline: what happened, when, and how far each point can be trusted."""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from phasewatch.callbacks.figures.style import KIND_STYLES
from phasewatch.callbacks.figures.svg import svg_address
from phasewatch.callbacks.figures.trajectory import MAX_METRICS, draw_trajectory
from phasewatch.callbacks.sinks.report_chart import SCRIPT, SCRIPT_HASH, chart_data
from phasewatch.callbacks.sinks.report_emergence import emergence_section
from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.estimates.estimate import Health
from phasewatch.monitor.files import inside, read_json, write_atomically
from phasewatch.monitor.formatting import MISSING, count, integer, measured, number, percent, printable, value_and_error
from phasewatch.monitor.trajectories.changes import UNKNOWN_CHANGE, Transition
from phasewatch.monitor.trajectories.points import Point
from phasewatch.monitor.trajectories.tables import without_collector
from phasewatch.monitor.trajectories.trajectory import Trajectory
from phasewatch.monitor.trajectories.transitions import find_transitions

MAX_TRACES = 12
"""The chains of at most this many doubtful points are drawn, evenly spaced along the run, to keep the page small."""

MOST_ROWS = 2000
"""The table has at most this many points, and the figure draws as many, evenly spaced along the run: the page of a run
of 200,000 points stays below 5 MB and takes seconds."""

MOST_COLUMNS = 20
"""The table has at most this many metrics, by name, for the same reason."""

MOST_SETTINGS = 2000
"""At most this many settings are shown, each cut to 200 characters; a run's own has about forty."""

MOST_DRAWS = 200
"""A drawing of chains has at most about this many values a chain, and 64 chains."""

_TRACE_WIDTH, _TRACE_HEIGHT = 240.0, 84.0
"""The size of such a drawing, in units of its own; the page scales it."""


def write_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write a run's report: the figure, the transitions in words, every point with its verdict, and the settings.

    A run with the metrics of `ItemScores` also gets a section with its scores side by side and any red flags.

    The page is one HTML file that loads nothing from elsewhere. Its figure shows values and verdicts under the pointer
    and can be zoomed, by a script of its own, the only one that the page's policy lets run; without scripts, and in
    print, it is a picture. Transitions are found anew from the points. The file is replaced in one step, so that a
    reader never sees half of it.

    Args:
        run: the run's folder, with its `run.json` (settings) and `points.jsonl`.
        out: where to write; `report.html` inside the run if left out.

    Returns:
        The path of the page.

    Raises:
        PhasewatchError: if `run` is not a run's folder, or its settings or points can't be read.

    Example:
        >>> import pathlib, tempfile
        >>> import phasewatch as pw
        >>> trajectory = pw.Trajectory.from_values([1, 10, 100], loss=[3.0, 2.0, 1.9], llc=[1.0, 20.0, 21.0])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trajectory.write(pathlib.Path(folder, "points.jsonl"))
        ...     page = pw.write_report(folder)
        ...     page.name, "3 points from step 1 to step 100: no transition." in page.read_text(encoding="utf-8")
        ('report.html', True)
    """
    return report_and_points(run, out)[0]


@without_collector()
def report_and_points(
    run: str | Path, out: str | Path | None = None
) -> tuple[Path, Trajectory | None, Sequence[Transition]]:
    """Write a run's report as `write_report` does, and return what it is about as well.

    Args:
        run: the run's folder.
        out: where to write.

    Returns:
        The path of the page, the points, None where nothing has been measured yet, and their transitions.

    Raises:
        PhasewatchError: as `write_report`.
    """
    run = Path(run)
    settings = _read_settings(run)
    points, transitions = _read_points(run)
    page = _render(run.resolve().name, points, transitions, settings)
    out = run / "report.html" if out is None else Path(out)
    if not out.parent.is_dir():
        raise PhasewatchError(f"write_report(out={str(out)!r}) names a folder that does not exist; make it first.")
    write_atomically(out, page)
    return out, points, transitions


def _read_settings(run: Path) -> dict[str, Any]:
    path = run / "run.json"
    if not os.path.lexists(path):
        if (run / "points.jsonl").is_file():
            return {}
        raise PhasewatchError(
            f"write_report({str(run)!r}) found neither run.json nor points.jsonl there; "
            "name the folder that was given as run=... to PhaseMonitor or replay."
        )
    settings = read_json(path, within=run, allow_nan=True)
    if not isinstance(settings, dict):
        raise PhasewatchError(f"write_report({str(run)!r}) expects a JSON object in {path.name}, and it holds another.")
    return settings


def _read_points(run: Path) -> tuple[Trajectory | None, Sequence[Transition]]:
    """The trajectory and its transitions, or None where nothing has been measured yet."""
    path = inside(run, "points.jsonl")
    if not os.path.lexists(path) or (path.is_file() and path.stat().st_size == 0):
        return None, ()
    trajectory = Trajectory.read(path)
    return (trajectory, tuple(find_transitions(trajectory))) if len(trajectory) else (None, ())


def _render(
    name: str, trajectory: Trajectory | None, transitions: Sequence[Transition], settings: dict[str, Any]
) -> str:
    points = tuple(trajectory) if trajectory is not None else ()
    metrics = sorted({metric for point in points for metric in point.metrics})
    doubtful = [point for point in points if point.llc.health.doubtful]
    traced = [point for point in doubtful if point.llc.trace]
    environment = Environment(
        loader=PackageLoader("phasewatch.callbacks.sinks", ""),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        integer=_typeset(integer), number=_typeset(number), percent=_typeset(percent), count_of=_typeset(count)
    )
    environment.globals.update(measured=_measured, value_and_error=_typeset(value_and_error), setting=_setting)
    environment.globals.update(styles={kind.label.lower(): style for kind, style in KIND_STYLES.items()})
    environment.globals.update(unknown=UNKNOWN_CHANGE)
    return environment.get_template("report.html.j2").render(
        name=name,
        summary=_summary(points, transitions, doubtful),
        picture=None if trajectory is None else _picture(points, transitions, metrics[:MAX_METRICS]),
        chart=chart_data(_spread(points, MOST_ROWS), transitions, metrics[:MAX_METRICS]),
        script=Markup(SCRIPT),
        script_hash=SCRIPT_HASH,
        count=len(points),
        points=_spread(points, MOST_ROWS),
        metrics=metrics[:MOST_COLUMNS],
        left_out=metrics[MOST_COLUMNS:],
        undrawn=metrics[MAX_METRICS:MOST_COLUMNS],
        transitions=transitions,
        emergence=None if trajectory is None else emergence_section(trajectory),
        doubts=[(health, steps) for health in Health if (steps := _steps(doubtful, health))],
        traces=[_trace(point) for point in _spread(traced, MAX_TRACES)],
        traced=len(traced),
        settings=_some_settings(settings, [MOST_SETTINGS]),
    )


def _printable(value: Any) -> Any:
    """What a file says, with what would act rather than show made visible; not what is markup already."""
    return value if not isinstance(value, str) or isinstance(value, Markup) else printable(value, most=100_000)


def _some_settings(value: Any, left: list[int]) -> Any:
    """Settings without those for which there is no room; `left` is how many may still come."""
    if isinstance(value, dict):
        return {printable(k, 60): _some_settings(v, left) for k, v in value.items() if _is_room(left)}
    if isinstance(value, list):
        return [_some_settings(inner, left) for inner in value if _is_room(left)]
    return printable(value) if isinstance(value, str) else value


def _is_room(left: list[int]) -> bool:
    left[0] -= 1
    return left[0] >= 0


def _steps(doubtful: Sequence[Point], health: Health) -> list[int]:
    return [point.step for point in doubtful if point.llc.health is health]


def _summary(points: Sequence[Point], transitions: Sequence[Transition], doubtful: Sequence[Point]) -> str:
    """The run in one sentence; `doubtful` are those of the points whose estimate isn't right, or failed."""
    if not points:
        return "Nothing has been measured yet."
    first, last = (integer(point.step) for point in (points[0], points[-1]))
    if len(points) == 1:
        text = f"One point, at step {first}"
    else:
        text = f"{integer(len(points))} points from step {first} to step {last}"
    found = {0: "no transition", 1: "one transition"}.get(len(transitions), f"{len(transitions)} transitions")
    kinds = [transition.kind.label for transition in transitions]
    text += f": {found}"
    if kinds:
        text += f" ({', '.join(kinds)})"
    failed = sum(point.llc.health.failed for point in doubtful)
    doubts = [
        f"{integer(count)} estimate{'s' if count > 1 else ''} {verb}"
        for count, verb in ((len(doubtful) - failed, "doubtful"), (failed, "failed"))
        if count
    ]
    return _typeset(str)(text + "".join(f", {doubt}" for doubt in doubts) + ".")


def _picture(points: Sequence[Point], transitions: Sequence[Transition], metrics: Sequence[str]) -> str:
    """The figure as the data address of an SVG image."""
    drawn = Trajectory(_spread(points, MOST_ROWS))
    there = [name for name in metrics if any(name in point.metrics for point in drawn)]
    return svg_address(draw_trajectory(drawn, transitions, metrics=there))


def _typeset(write: Any) -> Any:
    """`write`'s text with a narrow no-break space between thousands and a minus for a hyphen."""

    def typeset(*values: Any, **options: Any) -> str:
        text = re.sub(r"(?<=\d) (?=\d{3}(?!\d))", "\N{NARROW NO-BREAK SPACE}", write(*values, **options))
        return re.sub(r"-(?=\d)", "\N{MINUS SIGN}", text)

    return typeset


def _measured(value: float, error: float) -> tuple[str, str]:
    text, spread = measured(value, error)
    return _typeset(str)(text), spread


def _setting(value: Any) -> str:
    """A setting's leaf as written in JSON, without quotes; what isn't a finite number is missing."""
    if value is None or value in ("nan", "inf", "-inf") or (isinstance(value, float) and not math.isfinite(value)):
        return MISSING
    return value if isinstance(value, str) else printable(json.dumps(value))


def _spread(points: Sequence[Point], count: int) -> list[Point]:
    """At most `count` of the points, evenly spaced from the first to the last."""
    if len(points) <= count:
        return list(points)
    return [points[i] for i in np.linspace(0, len(points) - 1, count).round().astype(int)]


@dataclass(frozen=True)
class _Trace:
    """The chains of one point as lines of an SVG drawing.

    Attributes:
        point: the point.
        lines: a path for each chain.
        high: the largest value, as text.
        low: the smallest.
        zero: height of the line of value 0 in the drawing, None where it lies outside.
    """

    point: Point
    lines: list[str]
    high: str
    low: str
    zero: float | None
    width: float = _TRACE_WIDTH
    height: float = _TRACE_HEIGHT


def _trace(point: Point) -> _Trace:
    chains = [chain[:: 1 + len(chain) // MOST_DRAWS] for chain in point.llc.trace[:64]]
    finite = [value for chain in chains for value in chain if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    span = (high - low) or 1.0

    def height(value: float) -> float:
        return _TRACE_HEIGHT * (0.95 - 0.9 * ((value - low) / span))

    def path(chain: Sequence[float]) -> str:
        commands, pen = [], "M"
        for i, value in enumerate(chain):
            if math.isfinite(value):
                commands.append(f"{pen}{_TRACE_WIDTH * i / max(1, len(chain) - 1):.1f} {height(value):.1f}")
            pen = "L" if math.isfinite(value) else "M"
        return "".join(commands)

    short = _typeset(lambda value: f"{value:.3g}" if finite else MISSING)
    return _Trace(
        point=point,
        lines=[path(chain) for chain in chains],
        high=short(high),
        low=short(low),
        zero=height(0.0) if low < 0 < high else None,
    )
