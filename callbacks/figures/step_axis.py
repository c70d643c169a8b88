"""The axis of training steps, shared by all panels of a figure."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

from phasewatch.callbacks.figures.style import INK, MUTED


def set_step_axis(panels: Sequence[Axes], steps: np.ndarray) -> None:
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
