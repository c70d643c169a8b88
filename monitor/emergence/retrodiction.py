"""Forecasts made blind on what is already known."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from phasewatch.monitor.emergence.checks import check_chance, check_series
from phasewatch.monitor.emergence.forecast import FEWEST, Forecast, forecast, sorted_points
from phasewatch.monitor.errors import PhasewatchError, real_number


@dataclass(frozen=True)
class Retrodiction:
    """A forecast made blind of what came later.

    Attributes:
        error: mean absolute error of the forecast at the points behind the cut.
        naive_error: that of the last score before the cut, kept.
        linear_error: that of a line through the last six scores before the cut.
        coverage: the share of the points behind the cut that lie in their 90 % intervals.
        forecast: the forecast itself.
    """

    error: float
    naive_error: float
    linear_error: float
    coverage: float
    forecast: Forecast

    def __str__(self) -> str:
        return (
            f"Blind behind the cut, the forecast is off by {self.error:.3f} on average; keeping the last score is off "
            f"by {self.naive_error:.3f}, a line by {self.linear_error:.3f}. {self.coverage:.0%} of the "
            f"{len(self.forecast.mean)} points lie in their 90 % intervals."
        )


def retrodict(
    x: Any,
    sharp: Any,
    smooth: Any = None,
    *,
    cut: float,
    chance: float | None = None,
    series: Sequence[Any] | None = None,
) -> Retrodiction:
    """Forecast the points behind a cut from those up to it, and compare.

    Args:
        x: as in `forecast`, one axis.
        sharp: as in `forecast`.
        smooth: as in `forecast`.
        cut: in the axis; points up to it, itself included, are known.
        chance: the sharp score of a guess.
        series: as in `forecast`.

    Returns:
        The errors of the forecast and of two naive rules, and its coverage.

    Raises:
        PhasewatchError: as `forecast`, and if there are no points behind the cut or fewer than six up to it.

    >>> import numpy as np
    >>> step = np.geomspace(100, 10_000, 20)
    >>> log_p = -8 * (step / 100) ** -0.4
    >>> found = retrodict(step, np.exp(0.4 * log_p), log_p, cut=2000, chance=0.0)
    >>> found.error < found.naive_error / 5
    True
    """
    call = "retrodict"
    chance = check_chance(call, chance)
    cut = real_number("retrodict(cut=...)", cut)
    targets, labels = np.array([cut]), check_series(call, series)
    axis, u, score, guide, order = sorted_points(call, x, sharp, smooth, labels, targets)
    known = u <= axis.position(targets)[0]
    if (u[known] == u[0]).all() and known.sum() >= FEWEST:
        raise PhasewatchError(f"retrodict(cut={cut:g}) leaves points at one place up to the cut. Move the cut.")
    if known.sum() < FEWEST or known.all():
        raise PhasewatchError(
            f"retrodict(cut={cut:g}) leaves {int(known.sum())} points up to the cut and {int((~known).sum())} behind "
            f"it; it takes {FEWEST} and 1. Move the cut."
        )
    names = None if labels is None else [labels[i] for i in order[known]]
    places = axis.value(u)
    earlier = None if guide is None else guide[known]
    blind = forecast(places[known], score[known], earlier, at=places[~known], chance=chance, series=names)
    truth = score[~known]
    last = float(u[known][-1])
    slope, intercept = np.polyfit(u[known][-6:] - last, score[known][-6:], 1)
    line = np.clip(slope * (u[~known] - last) + intercept, 0, 1)
    return Retrodiction(
        error=float(np.abs(blind.mean - truth).mean()),
        naive_error=float(np.abs(score[known][-1] - truth).mean()),
        linear_error=float(np.abs(line - truth).mean()),
        coverage=float(((blind.low <= truth) & (truth <= blind.high)).mean()),
        forecast=blind,
    )
