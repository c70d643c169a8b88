"""The scores of one task side by side, with the forecast of the sharp one."""

import math

import numpy as np
from matplotlib.figure import Figure

from phasewatch.callbacks.figures.step_axis import set_step_axis
from phasewatch.callbacks.figures.style import INK, MUTED
from phasewatch.monitor.emergence.overview import Overview
from phasewatch.monitor.errors import PhasewatchError

COLOURS = ("#0072B2", "#009E73", "#E69F00", "#CC79A7", "#D55E00")
"""Of the scores, from the smoothest to the sharpest: Okabe & Ito's, told apart by all kinds of colour vision."""

MARKERS = ("o", "s", "^", "D", "v")
"""Of the scores, so that they differ in black and white too."""


def draw_emergence(overview: Overview, *, width: float = 6.8) -> Figure:
    """Draw each score's share of its own change above, and the sharp score with its forecast below.

    Above, every score goes from 0 to 1 between its lowest and highest value, better upwards; a score that moves before
    another lies to its left. Below stand the sharp score, the forecast with its band of 90 %, chance as a dotted line,
    the onset's interval as a bar at the bottom, and a red line where the alarm for a reversal rang.

    Args:
        overview: of at least two steps.
        width: in inches. Letters keep their size: 3.4 is a column of a paper, 6.8 the page.

    Returns:
        A figure that belongs to no window and no global state.

    Raises:
        PhasewatchError: if there are fewer than two steps.
    """
    steps = np.asarray(overview.steps, dtype=float)
    if len(steps) < 2:
        raise PhasewatchError(f"draw_emergence(overview) takes at least 2 steps; {len(steps)} came.")
    figure = Figure(figsize=(width, 0.9 + 0.62 * width), dpi=200, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1.3, 1.0])
    later = overview.forecast
    set_step_axis([above, below], steps if later is None else np.concatenate([steps, later.at]))

    sharp = np.asarray(overview.scores[overview.sharp], dtype=float)
    for (name, score), colour, marker in zip(overview.scores.items(), COLOURS, MARKERS, strict=False):
        share = _share(np.asarray(score, dtype=float), sharp)
        look = {"color": colour, "marker": marker, "markersize": 3, "markeredgewidth": 0}
        above.plot(steps, share, label=name, linewidth=1.2, **look)
    above.set_ylabel("share of its range", fontsize=8, color=INK)
    above.legend(frameon=False, fontsize=7, labelcolor=MUTED, loc="upper left")
    if overview.verdict is not None:
        text = f"{overview.verdict.kind}, probability {overview.verdict.probability:.2f}"
        above.set_title(text, fontsize=8, color=INK, loc="left")

    below.plot(steps, sharp, color=INK, linewidth=1.0, marker="o", markersize=3, markeredgewidth=0)
    below.set_ylabel(overview.sharp, fontsize=8, color=INK, parse_math=False)
    if later is not None:
        order = np.argsort(later.at)
        at, mean = (
            np.append(first, values[order]) for first, values in ((steps[-1], later.at), (sharp[-1], later.mean))
        )
        low, high = (np.append(sharp[-1], values[order]) for values in (later.low, later.high))
        below.fill_between(at, low, high, color=COLOURS[0], alpha=0.2, linewidth=0)
        below.plot(at, mean, color=COLOURS[0], linewidth=1.2, linestyle="--", marker="o", markersize=3)
        below.axhline(later.chance, color=MUTED, linewidth=0.7, linestyle=":")
        if later.onset is not None:
            first, last = below.get_xlim()
            left, right = sorted((later.onset.low, later.onset.high))
            right = right if math.isfinite(right) else last
            span = np.clip([left, right], first, last)
            below.plot(span, [0.03, 0.03], transform=below.get_xaxis_transform(), color=MUTED, linewidth=2.5)
    if overview.reversal is not None:
        for panel in (above, below):
            panel.axvline(overview.reversal.alarm, color="#b00020", linewidth=1.0)
    figure.align_ylabels([above, below])
    return figure


def _share(score: np.ndarray, sharp: np.ndarray) -> np.ndarray:
    """A score between 0 and 1, turned over where it falls as the sharp one rises."""
    span = float(np.ptp(score))
    if span == 0:
        return np.zeros_like(score)
    share = (score - score.min()) / span
    together = float(np.sum((score - score.mean()) * (sharp - sharp.mean())))
    return share if together >= 0 else 1 - share
