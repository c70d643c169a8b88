"""A calibration as a picture: why this step size, this nβ, and how far from unstable."""

import math
from collections.abc import Callable

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from phasewatch.callbacks.figures.style import INK, MUTED
from phasewatch.monitor.estimates.estimate import Estimate
from phasewatch.monitor.formatting import integer
from phasewatch.monitor.probing.calibration import Calibration, Trial
from phasewatch.monitor.sampling.settings import Sampler


def draw_calibration(calibration: Calibration) -> Figure:
    """Draw λ̂ against the step size and against nβ, and κ against the step size, a colour for each snapshot.

    Lines join trials that differ in nothing else; a trial that can be compared with no other is left out. Open markers
    are doubtful estimates. Those that have no level (diverged, negative, not at a minimum) are left out of the first
    two panels. The vertical line is the choice; the sampler is unstable from κ = 4 on.

    Args:
        calibration: what `calibrate` shows.

    Returns:
        A figure that belongs to no window and no global state: `figure.savefig("calibration.pdf")`.

    Example:
        >>> import phasewatch as pw
        >>> from phasewatch.callbacks.figures.calibration import draw_calibration
        >>> from phasewatch.monitor.probing.calibration import Calibration, Trial
        >>> sampler = pw.SGLD(step_size=1e-3, localization=10.0, nbeta=100.0)
        >>> points = tuple(pw.Trajectory.from_values([10, 20], loss=[2.0, 1.5], llc=[5.0, 8.0]))
        >>> trial = Trial("first", sampler, points, cost=1000)
        >>> calibration = Calibration(sampler, (trial,), ("It was the only one.",), {10: 1.0, 20: 2.0}, 1000, 2000)
        >>> len(draw_calibration(calibration).axes)
        3
    """
    figure = Figure(figsize=(9.0, 3.3), dpi=200, layout="constrained")
    panels = figure.subplots(1, 3)
    steps = list(calibration.curvatures)
    colours = dict(zip(steps, colormaps["viridis"](np.linspace(0.05, 0.85, len(steps))), strict=True))
    _draw(panels[0], calibration, colours, lambda s: s.step_size or math.nan, lambda s: (s.localization, s.nbeta), _llc)
    _draw(panels[1], calibration, colours, lambda s: s.nbeta, _scale_free, _llc)
    _draw(
        panels[2], calibration, colours, lambda s: s.step_size or math.nan, lambda s: (s.localization, s.nbeta), _kappa
    )
    panels[2].axhline(4, color=MUTED, linestyle="--", linewidth=0.8)
    panels[2].set_yscale("log")
    panels[2].yaxis.set_major_locator(LogLocator(subs=(1, 2, 4)))
    panels[2].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    panels[2].yaxis.set_minor_formatter(NullFormatter())
    for panel, x, y in zip(
        panels, ("step size ε", "nβ, with γ and 1/ε", "step size ε"), ("λ̂ ± 2 s.e.", "λ̂ ± 2 s.e.", "κ"), strict=True
    ):
        panel.set_xlabel(x, fontsize=9, color=INK)
        panel.set_ylabel(y, fontsize=9, color=INK)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(which="both", color=MUTED, labelcolor=INK, labelsize=8)
    legend = [Line2D([], [], color=colours[s], marker="o", markersize=4, label=f"step {integer(s)}") for s in steps]
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False, fontsize=8)
    return figure


def _llc(estimate: Estimate) -> tuple[float, float]:
    """The height of a point and the half length of its bar."""
    return (math.nan, 0.0) if not estimate.health.has_level else (estimate.value, 2 * estimate.error)


def _kappa(estimate: Estimate) -> tuple[float, float]:
    return estimate.checks.kappa, 0.0


def _scale_free(sampler: Sampler) -> tuple[float, ...]:
    """What stays the same when nβ, γ and 1/ε change together, to the digit that survives their rounding."""
    return tuple(
        float(f"{x:.1g}")
        for x in ((sampler.step_size or math.nan) * sampler.nbeta, sampler.localization / sampler.nbeta)
    )


def _draw(
    panel: Axes,
    calibration: Calibration,
    colours: dict[int, np.ndarray],
    across: Callable[[Sampler], float],
    alike: Callable[[Sampler], tuple[float, ...]],
    height: Callable[[Estimate], tuple[float, float]],
) -> None:
    groups: dict[tuple[float, ...], list[Trial]] = {}
    for trial in calibration.trials:
        groups.setdefault((*alike(trial.sampler), trial.sampler.chains, trial.sampler.burn_in), []).append(trial)
    chosen, tried = calibration.chosen, set()
    for trials in groups.values():
        if len(trials) == 1 and trials[0] is not chosen and len(groups) > 1:
            continue  # there is nothing to compare it with
        tried |= {across(trial.sampler) for trial in trials}
        for step, colour in colours.items():
            found = sorted(
                (across(trial.sampler), *height(point.llc), not point.llc.health.doubtful)
                for trial in trials
                for point in trial.points
                if point.step == step
            )
            for x, y, bar, sound in found:
                panel.errorbar(
                    x,
                    y,
                    bar or None,
                    marker="o",
                    markersize=4,
                    color=colour,
                    linewidth=1,
                    mfc=colour if sound else "white",
                )
            if len(found) > 1:
                panel.plot([x for x, *_ in found], [y for _, y, *_ in found], color=colour, linewidth=0.8)
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(FixedLocator(sorted(tried)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    panel.xaxis.set_minor_locator(NullLocator())
    if chosen is not None:
        panel.axvline(across(chosen.sampler), color=MUTED, linewidth=0.8, zorder=0)
