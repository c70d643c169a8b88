"""How transitions are marked in a figure: shades, bars with their intervals, letters, and the legend."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.transforms import ScaledTranslation

from phasewatch.callbacks.figures.style import INK, KIND_STYLES, MUTED, PROVISIONAL_HATCH
from phasewatch.monitor.trajectories.changes import Transition

INTERVAL = "95 % interval of a boundary"
"""The legend's words for the grey behind a bar."""

ROW_POINTS = 7
"""How far rows of bars lie apart, in points."""


def _tint(colour: str, share: float) -> tuple[float, float, float]:
    """A colour thinned with white; opaque, since matplotlib's SVG gives a face's transparency to its hatch as well."""
    r, g, b = (share * c + 1 - share for c in to_rgb(colour))
    return r, g, b


def shade_stages(panel: Axes, transitions: Sequence[Transition]) -> None:
    """Shade each stage in the colour of its kind; hatched and paler while it is provisional."""
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


def label_stages(panel: Axes, transitions: Sequence[Transition], *, letter: float) -> None:
    """Draw above each stage a bar from start to end, grey behind it over the intervals of both, and its kind.

    Bars whose intervals meet lie in different rows, of which there are three. A label that would touch that of a longer
    stage is left out.

    Args:
        panel: the topmost.
        transitions: the stages.
        letter: the width of a letter as a share of the axis.
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
        up = panel.transAxes + ScaledTranslation(0, (5 + ROW_POINTS * row) / 72, panel.figure.dpi_scale_trans)
        bar = [Line2D([a, b], [1, 1], color=colour, linewidth=2.4, solid_capstyle="butt")]
        if stage.provisional:
            bar.append(Line2D([a, b], [1, 1], color="white", linewidth=1.2, solid_capstyle="butt"))
        intervals = [
            Line2D(
                across(*interval), [1, 1], color=_tint(INK, 0.25), linewidth=5.5, solid_capstyle="butt", gid=INTERVAL
            )
            for interval in (stage.start_interval, stage.end_interval)
        ]
        for line in (*intervals, *bar):
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
            xytext=(0, 9 + ROW_POINTS * max(rows)),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=9 if len(label) == 1 else 7.5,
            fontweight="bold" if len(label) == 1 else "normal",
            color=KIND_STYLES[stage.kind].colour,
            annotation_clip=False,
        )


def stage_legend(transitions: Sequence[Transition]) -> list[Patch | Line2D]:
    """The legend's entries for those of the marks that these transitions have."""
    entries: list[Patch | Line2D] = []
    if transitions:
        entries.append(Patch(facecolor=_tint(INK, 0.25), linewidth=0, label=INTERVAL))
    if any(stage.provisional for stage in transitions):
        entries.append(
            Patch(facecolor="white", edgecolor=MUTED, hatch="//////", linewidth=0, label="provisional stage")
        )
    there = {stage.kind for stage in transitions}
    for kind, style in KIND_STYLES.items():
        if kind in there and style.explanation:
            entries.append(Patch(facecolor=_tint(style.colour, 0.3), linewidth=0, label=style.explanation))
    return entries
