"""A trajectory as a picture: complexity above, loss below, stages shaded. Fit for a paper, and for the report."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from phasewatch.callbacks.figures.stage_marks import label_stages, shade_stages, stage_legend
from phasewatch.callbacks.figures.step_axis import set_step_axis
from phasewatch.callbacks.figures.style import INK, MUTED
from phasewatch.callbacks.figures.svg import NotebookFigure
from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.estimates.estimate import Health
from phasewatch.monitor.formatting import printable
from phasewatch.monitor.trajectories.changes import Transition
from phasewatch.monitor.trajectories.points import Point
from phasewatch.monitor.trajectories.trajectory import Trajectory

MAX_METRICS = 4
"""A figure has panels for at most this many metrics, so that it fits on a page."""

LARGEST = 1e300
"""Values beyond are drawn at it: matplotlib can't draw an axis whose ends differ by more than a float holds."""


def draw_trajectory(
    trajectory: Trajectory,
    transitions: Sequence[Transition] = (),
    *,
    signal: str = "llc",
    metrics: Sequence[str] = (),
    width: float = 6.8,
) -> Figure:
    """Draw λ̂ with its band of ± 2 standard errors and the loss against the logarithm of the step.

    Above the stages' shades stand their kinds, and for each a bar with grey behind it: the 95 % intervals of its two
    boundaries. Open markers are doubtful estimates, crosses at the lower edge are failed ones, and triangles at an edge
    are doubtful ones so far away that showing them would flatten the curve. A hatched stage is provisional. The font is
    matplotlib's configured one, so that a paper's own settings hold.

    Args:
        trajectory: the points, in order of step.
        transitions: the stages to shade.
        signal: the signal whose transitions they are, "llc", "loss" or a metric's name. Its panel is the first and
            largest.
        metrics: names of the points' own metrics, at most four, each in a panel of its own below the loss.
        width: in inches. Letters keep their size: 3.4 is a column of a paper, 6.8 the page.

    Returns:
        A figure that belongs to no window and no global state: `figure.savefig("trajectory.pdf")`.

    Raises:
        PhasewatchError: if a metric is on no point, or more than four are named.

    Example:
        >>> import phasewatch as pw
        >>> from phasewatch.callbacks.figures.trajectory import draw_trajectory
        >>> trajectory = pw.Trajectory.from_values([1, 10, 100], loss=[3.0, 2.0, 1.9], llc=[1.0, 20.0, 21.0])
        >>> figure = draw_trajectory(trajectory, pw.find_transitions(trajectory), width=3.4)
        >>> len(figure.axes)
        2
    """
    points, transitions = list(trajectory), list(transitions)
    others = [name for name in metrics if name != signal]
    _check_metrics(metrics if signal in {"llc", "loss"} else [signal, *others], points)
    signals = [signal, *(name for name in ("llc", "loss") if name != signal and _is_there(trajectory, name)), *others]
    steps = np.asarray(trajectory.steps, dtype=float)
    heights = [2.2, *(1.3 if name in {"llc", "loss"} else 0.9 for name in signals[1:])]
    figure = NotebookFigure(figsize=(width, 0.9 + (0.3 + 0.11 * width) * sum(heights)), dpi=200, layout="constrained")
    panels: list[Axes] = list(figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])

    set_step_axis(panels, steps)
    for panel in panels:
        shade_stages(panel, transitions)
    label_stages(panels[0], transitions, letter=0.1 / width)

    marks: list[Line2D] = []
    for panel, name in zip(panels, signals, strict=True):
        if name == "llc":
            marks += _draw_llc(panel, steps, trajectory, [point.llc.health for point in points])
            band = "  ± 2 s.e." if np.isfinite(trajectory.llc_error).any() else ""
            label = rf"{'complexity  ' if panel is panels[0] else ''}$\hat{{\lambda}}${band}"
            panel.set_ylabel(label, fontsize=8, color=INK)
        else:
            _draw_curve(panel, steps, trajectory.signal(name))
            shown = printable(name)
            short = shown if len(shown) <= 16 else f"{shown[:15]}…"
            panel.set_ylabel(short, fontsize=8, color=INK, parse_math=False)
    figure.align_ylabels(panels)
    if not points:
        panels[0].text(0.5, 0.5, "no points yet", transform=panels[0].transAxes, ha="center", color=MUTED, fontsize=9)
        for panel in panels:
            panel.set_yticks([])

    legend = [*stage_legend(transitions), *marks]
    if legend:
        figure.legend(
            handles=legend,
            loc="outside lower center",
            ncols=min(len(legend), max(1, round(width / 1.7))),
            frameon=False,
            fontsize=7,
            labelcolor=MUTED,
            handletextpad=0.5,
            columnspacing=1.8,
        )
    return figure


def _is_there(trajectory: Trajectory, name: str) -> bool:
    return not len(trajectory) or bool(np.isfinite(trajectory.signal(name)).any())


def _check_metrics(wanted: Sequence[str], points: Sequence[Point]) -> None:
    if isinstance(wanted, str):
        raise PhasewatchError(f"draw_trajectory(metrics={wanted!r}) takes a list of names; write metrics=[{wanted!r}].")
    if len(wanted) > MAX_METRICS:
        raise PhasewatchError(
            f"draw_trajectory(metrics=...) got {len(wanted)} names and has room for {MAX_METRICS}; draw two figures."
        )
    there = {name for point in points for name in point.metrics}
    for name in wanted:
        if name not in there:
            known = ", ".join(sorted(there)) or "none"
            raise PhasewatchError(
                f"draw_trajectory(metrics=[{name!r}]) names a metric that no point carries; they carry: {known}."
            )


def _draw_curve(panel: Axes, steps: np.ndarray, values: np.ndarray) -> None:
    values = np.where(np.isfinite(values), np.clip(values, -LARGEST, LARGEST), math.nan)
    size = 1.6 if steps.size > 60 else 3.0
    panel.plot(steps, values, color=INK, linewidth=1.0, marker="o", markersize=size, markeredgewidth=0, zorder=3)


def _draw_llc(panel: Axes, steps: np.ndarray, trajectory: Trajectory, healths: Sequence[Health]) -> list[Line2D]:
    """λ̂, its band, and the marks of what isn't to be trusted.

    Returns:
        A legend's entry for each sort of mark that was needed.
    """
    llc = np.asarray(trajectory.llc, dtype=float)
    there = np.isfinite(llc) & ~np.array([health.failed for health in healths], dtype=bool)
    doubtful = there & np.array([health.doubtful for health in healths], dtype=bool)
    llc = np.where(there, np.clip(llc, -LARGEST, LARGEST), math.nan)
    error = np.asarray(trajectory.llc_error, dtype=float)
    error = np.where(np.isfinite(error), np.clip(error, 0.0, LARGEST), 0.0)

    panel.fill_between(steps, llc - 2 * error, llc + 2 * error, color=INK, alpha=0.2, linewidth=0, zorder=2)
    low, high = _limits(llc, error, doubtful)
    panel.set_ylim(low, high)
    above, below = doubtful & (llc > high), doubtful & (llc < low)
    _draw_curve(panel, steps, np.where(above | below, math.nan, llc))

    def mark(
        where: np.ndarray, heights: np.ndarray, marker: str, label: str, *, of_panel: bool = False
    ) -> list[Line2D]:
        if not where.any():
            return []
        look = Line2D(
            steps[where],
            heights[where],
            marker=marker,
            linestyle="none",
            color=INK,
            markerfacecolor="white",
            markersize=4.5,
            markeredgewidth=0.9,
            label=label,
            clip_on=False,
            zorder=4,
        )
        look.set_transform(panel.get_xaxis_transform() if of_panel else panel.transData)
        panel.add_artist(look)
        return [look]

    edge = np.ones_like(steps)
    return [
        *mark(doubtful & ~above & ~below, llc, "o", "doubtful estimate"),
        *mark(~there, 0.03 * edge, "x", "failed estimate", of_panel=True),
        *mark(above, 0.98 * edge, "^", "doubtful, above", of_panel=True),
        *mark(below, 0.02 * edge, "v", "doubtful, below", of_panel=True),
    ]


def _limits(llc: np.ndarray, error: np.ndarray, doubtful: np.ndarray) -> tuple[float, float]:
    """The range of the trusted estimates and their bands, widened by at most half for the doubtful ones."""
    there = np.isfinite(llc)
    trusted = there & ~doubtful
    if trusted.sum() < 2:
        trusted = there
    if not trusted.any():
        return 0.0, 1.0
    low = float((llc - 2 * error)[trusted].min())
    high = float((llc + 2 * error)[trusted].max())
    span = (high - low) or 1.0
    near = there & (llc > low - span / 2) & (llc < high + span / 2)
    low, high = min(low, float(llc[near].min())), max(high, float(llc[near].max()))
    margin = 0.06 * ((high - low) or 1.0)
    return low - margin, high + margin
