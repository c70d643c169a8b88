"""A trajectory as a picture: complexity above, loss below, stages shaded. Fit for a paper, and for the report."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerLine2D
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from phasewatch.callbacks.figures.style import INK, KIND_STYLES, MUTED, PROVISIONAL_HATCH
from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.estimates.estimate import Health
from phasewatch.monitor.trajectories.changes import Transition
from phasewatch.monitor.trajectories.points import Point
from phasewatch.monitor.trajectories.trajectory import Trajectory

MAX_METRICS = 4
"""A figure has panels for at most this many metrics, so that it fits on a page."""

_INTERVAL = "95 % interval of a boundary"


def draw_trajectory(
    trajectory: Trajectory,
    transitions: Sequence[Transition] = (),
    *,
    signal: str = "llc",
    metrics: Sequence[str] = (),
    width: float = 6.8,
) -> Figure:
    """Draw λ̂ with its band of ± 2 standard errors and the loss against the logarithm of the step.

    Above the stages' shades stand their kinds, and for each a bar with whiskers: the 95 % intervals of its two
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
    figure = Figure(figsize=(width, 0.9 + (0.3 + 0.11 * width) * sum(heights)), dpi=200, layout="constrained")
    panels: list[Axes] = list(figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])

    _set_step_axis(panels, steps)
    for panel in panels:
        _shade_stages(panel, transitions)
    _label_stages(panels[0], transitions, letter=0.1 / width)

    marks: list[Line2D] = []
    for panel, name in zip(panels, signals, strict=True):
        if name == "llc":
            marks += _draw_llc(panel, steps, trajectory, [point.llc.health for point in points])
            band = "  ± 2 s.e." if np.isfinite(trajectory.llc_error).any() else ""
            label = rf"{'complexity  ' if panel is panels[0] else ''}$\hat{{\lambda}}${band}"
            panel.set_ylabel(label, fontsize=8, color=INK)
        else:
            _draw_curve(panel, steps, trajectory.signal(name))
            short = name if len(name) <= 16 else f"{name[:15]}…"
            panel.set_ylabel(short, fontsize=8, color=INK, parse_math=False)
    figure.align_ylabels(panels)
    if not points:
        panels[0].text(0.5, 0.5, "no points yet", transform=panels[0].transAxes, ha="center", color=MUTED, fontsize=9)
        for panel in panels:
            panel.set_yticks([])

    legend = [*_stage_legend(transitions), *marks]
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
            handler_map={entry: HandlerLine2D(numpoints=2) for entry in legend if entry.get_label() == _INTERVAL},
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


def _set_step_axis(panels: Sequence[Axes], steps: np.ndarray) -> None:
    """A logarithmic axis of steps, with step 0 a little to the left of the first step after it."""
    positive = steps[steps > 0]
    first, last = (positive.min(), positive.max()) if positive.size else (1.0, 1.0)
    bottom = panels[-1]
    if steps.size and steps.min() <= 0:
        gap = min(0.5, 0.15 * math.log10(last / first)) or 0.5
        bottom.set_xscale("symlog", linthresh=first, linscale=gap)
        zero = [0.0]
    else:
        bottom.set_xscale("log")
        zero = []

    to_axis = bottom.xaxis.get_transform()
    left, right = to_axis.transform(np.array([*zero, first, last], dtype=float))[[0, -1]]
    margin = 0.02 * (right - left) or 0.2
    bottom.set_xlim(*to_axis.inverted().transform(np.array([left - margin, right + margin])))

    major, minor = _ticks(first, last)
    bottom.xaxis.set_major_locator(FixedLocator([*zero, *major]))
    bottom.xaxis.set_minor_locator(FixedLocator(minor))
    bottom.xaxis.set_major_formatter(FuncFormatter(lambda step, _: _step_label(step)))
    bottom.xaxis.set_minor_formatter(NullFormatter())
    bottom.set_xlabel("training step", fontsize=8, color=INK)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(MUTED)
        panel.spines[["left", "bottom"]].set_linewidth(0.7)
        panel.tick_params(which="both", width=0.7, color=MUTED, labelcolor=INK, labelsize=7)
        panel.tick_params(which="major", length=3.5)
        panel.tick_params(which="minor", length=2)
        if panel is not bottom:
            panel.tick_params(axis="x", which="both", length=0)
        panel.yaxis.set_major_locator(MaxNLocator(5 if panel is panels[0] else 3))


def _ticks(first: float, last: float) -> tuple[list[float], list[float]]:
    """Major ticks at powers of ten, thinned or filled in so that there are between two and nine, and minor ones."""
    exponents = range(math.floor(math.log10(first)), math.ceil(math.log10(last)) + 1)
    decades = [10.0**k for k in exponents]
    fine = [m * d for d in decades for m in range(1, 10)]
    for multiples in ((1,), (1, 3), (1, 2, 5)):
        major = [m * d for d in decades for m in multiples if first <= m * d <= last]
        if len(major) >= 3:
            return major[:: math.ceil(len(major) / 9)], [t for t in fine if first <= t <= last]
    even = [float(t) for t in MaxNLocator(4, integer=True).tick_values(first, last) if first <= t <= last]
    return even or [first], []


def _step_label(step: float) -> str:
    """A step in as few characters as say it: 0, 300, 10k, 2.5M."""
    for unit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if step >= unit:
            return f"{step / unit:.6g}{suffix}"
    return f"{step:.6g}"


def _tint(colour: str, share: float) -> tuple[float, float, float]:
    """A colour thinned with white; opaque, since matplotlib's SVG gives a face's transparency to its hatch as well."""
    r, g, b = (share * c + 1 - share for c in to_rgb(colour))
    return r, g, b


def _shade_stages(panel: Axes, transitions: Sequence[Transition]) -> None:
    left, right = panel.get_xlim()
    for stage in transitions:
        start, end = np.clip((stage.start, stage.end), left, right)
        style = KIND_STYLES[stage.kind]
        panel.axvspan(
            start,
            end,
            facecolor=_tint(style.colour, style.shade / 2 if stage.provisional else style.shade),
            edgecolor=_tint(style.colour, 0.2 + style.shade),
            hatch=PROVISIONAL_HATCH if stage.provisional else None,
            linewidth=0,
            zorder=0,
        )
        for edge in (start, end):
            panel.axvline(edge, color=INK, alpha=0.4, linewidth=0.5, zorder=0.5)


def _label_stages(panel: Axes, transitions: Sequence[Transition], *, letter: float) -> None:
    """Above each stage a bar from start to end, whiskers over the intervals of both, and its kind.

    Bars whose whiskers meet lie in different rows, of which there are three. A kind that would touch that of a longer
    stage is left out; `letter` is the width of one as a share of the axis.
    """
    to_axis = panel.xaxis.get_transform()
    low, high = to_axis.transform(np.array(panel.get_xlim()))

    def across(*steps: float) -> np.ndarray:
        """Steps as shares of the axis."""
        return (np.clip(to_axis.transform(np.array(steps, dtype=float)), low, high) - low) / (high - low)

    reach, rows = [-1.0, -1.0, -1.0], []
    for stage in transitions:
        first, last = across(min(stage.start, stage.start_interval[0]), max(stage.end, stage.end_interval[1]))
        row = next((i for i, end in enumerate(reach) if first > end + 0.01), int(np.argmin(reach)))
        reach[row] = last
        rows.append(row)
    for stage, row in zip(transitions, rows, strict=True):
        colour, (a, b) = KIND_STYLES[stage.kind].colour, across(stage.start, stage.end)
        up = panel.transAxes + ScaledTranslation(0, (4 + 5 * row) / 72, panel.figure.dpi_scale_trans)
        bar = [Line2D([a, b], [1, 1], color=colour, linewidth=3, solid_capstyle="butt")]
        if stage.provisional:
            bar.append(Line2D([a, b], [1, 1], color="white", linewidth=1.6, solid_capstyle="butt"))
        whiskers = [
            Line2D(across(*interval), [1, 1], color=INK, linewidth=0.8, marker="|", markersize=4, markeredgewidth=0.8)
            for interval in (stage.start_interval, stage.end_interval)
        ]
        for line in (*bar, *whiskers):
            line.set(transform=up, clip_on=False)
            panel.add_line(line)

    labelled: list[tuple[float, float]] = []
    for stage in sorted(transitions, key=lambda stage: np.ptp(across(stage.start, stage.end)), reverse=True):
        label, (a, b) = stage.kind.label, across(stage.start, stage.end)
        left, right = (a + b) / 2 + np.array([-0.5, 0.5]) * letter * (1 if len(label) == 1 else 4)
        if any(left < other_right and other_left < right for other_left, other_right in labelled):
            continue
        labelled.append((left, right))
        panel.annotate(
            label,
            ((a + b) / 2, 1),
            xycoords="axes fraction",
            xytext=(0, 8 + 5 * max(rows)),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=9 if len(label) == 1 else 7.5,
            fontweight="bold" if len(label) == 1 else "normal",
            color=KIND_STYLES[stage.kind].colour,
            annotation_clip=False,
        )


def _draw_curve(panel: Axes, steps: np.ndarray, values: np.ndarray) -> None:
    values = np.where(np.isfinite(values), values, math.nan)
    size = 1.6 if steps.size > 60 else 3.0
    panel.plot(steps, values, color=INK, linewidth=1.0, marker="o", markersize=size, markeredgewidth=0, zorder=3)


def _draw_llc(panel: Axes, steps: np.ndarray, trajectory: Trajectory, healths: Sequence[Health]) -> list[Line2D]:
    """λ̂, its band, and the marks of what isn't to be trusted.

    Returns:
        A legend's entry for each sort of mark that was needed.
    """
    llc = np.asarray(trajectory.llc, dtype=float)
    there = np.isfinite(llc) & ~np.array([health.failed for health in healths], dtype=bool)
    doubtful = there & np.array([health is not Health.OK for health in healths], dtype=bool)
    llc = np.where(there, llc, math.nan)
    error = np.asarray(trajectory.llc_error, dtype=float)
    error = np.where(np.isfinite(error), error, 0.0)

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


def _stage_legend(transitions: Sequence[Transition]) -> list[Patch | Line2D]:
    entries: list[Patch | Line2D] = []
    if transitions:
        entries.append(Line2D([], [], color=INK, linewidth=0.8, marker="|", markersize=4, label=_INTERVAL))
    if any(stage.provisional for stage in transitions):
        entries.append(
            Patch(facecolor="white", edgecolor=MUTED, hatch="//////", linewidth=0, label="provisional stage")
        )
    there = {stage.kind for stage in transitions}
    for kind, style in KIND_STYLES.items():
        if kind in there and style.explanation:
            entries.append(Patch(facecolor=_tint(style.colour, 0.3), linewidth=0, label=style.explanation))
    return entries
