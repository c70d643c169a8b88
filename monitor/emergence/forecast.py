"""Forecasts of a sharp score with their doubt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from phasewatch.monitor.emergence.checks import (
    Axis,
    as_numbers,
    check_axis,
    check_chance,
    check_numbers,
    check_series,
    check_share,
    check_smooth,
)
from phasewatch.monitor.emergence.onset import Onset, find_onset
from phasewatch.monitor.emergence.prediction import predict
from phasewatch.monitor.emergence.several import forecast_of_columns
from phasewatch.monitor.errors import PhasewatchError

FEWEST = 6
"""A forecast takes at least this many points."""

WIDTH = 1.645
"""Standard deviations on either side of a 90 % interval."""


@dataclass(frozen=True)
class Forecast:
    """What a sharp score will be.

    Attributes:
        at: the places, in the user's axis, shape (target,) or (target, column).
        mean: the expected score, shape (target,).
        low: the lower end of its 90 % interval, shape (target,).
        high: the upper end, shape (target,).
        onset: when the score leaves chance; None if it has from the first point on, or more likely doesn't within one
            more span of the points.
        trust: how far the smooth score guided the forecast, between 0 and 1.
        chance: the score of a guess.
    """

    at: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    onset: Onset | None
    trust: float
    chance: float

    def __str__(self) -> str:
        lines = [
            f"At {'a target' if self.at.ndim > 1 else f'{x:.4g}'}: {m:.3f} (90 % interval: {lo:.3f} to {hi:.3f})."
            for x, m, lo, hi in zip(
                self.at if self.at.ndim == 1 else self.mean, self.mean, self.low, self.high, strict=True
            )
        ]
        if self.onset is not None:
            lines.append(f"It leaves chance ({self.chance:g}) at {self.onset}.")
        if self.trust < 0.5:
            lines.append("No smooth score explains the points so far; the forecast rests on the axis alone.")
        return "\n".join(lines)


def forecast(
    x: Any,
    sharp: Any,
    smooth: Any = None,
    *,
    at: Any,
    chance: float | None = None,
    series: Sequence[Any] | None = None,
) -> Forecast:
    """Forecast a sharp score, such as an accuracy, for later steps, larger models or lower losses.

    The mean is that of a few laws: -log accuracy as a power law of the axis (Krajewski et al. 2025, arXiv 2512.08894),
    the smooth score's own law carried through a link from chance to 1 (after Bhagia et al. 2024, arXiv 2412.04403),
    and, as far as the smooth score explains little, a logistic curve. Its interval adds the scatter of the points, the
    errors of forecasts of the later points from the earlier ones (growing with the distance), the disagreement of
    the laws, and how far other models may be ahead or behind.

    Args:
        x: a step, tokens, compute or a loss, shape (point,), rising or falling throughout. Or several columns, shape
            (point, column), such as other benchmarks' scores: their one direction that goes with the sharp score is the
            axis. There, NaN is a score that is missing.
        sharp: the score to forecast, between 0 and 1, shape (point,).
        smooth: a smooth score of the same items, in either direction, shape (point,), or (point, column) with a column
            for each item or group of items. None if there is none; with several columns of x it is one more.
        at: where to forecast, shape (target,), or (target, column). Values within the points are interpolated.
        chance: the sharp score of a guess.
        series: the run or model of each point, if several share an axis; points may then come in any order, and share
            an x. A loss then counts as falling if most of `at` lies below it.

    Returns:
        Mean, 90 % interval and onset.

    Raises:
        PhasewatchError: if the axis repeats or turns, there are fewer than six points, chance is missing, or every
            score is at its top from the start.

    >>> import numpy as np
    >>> compute = np.geomspace(1e18, 1e20, 12)
    >>> bits = 0.4 + 1.2 * (compute / 1e18) ** -0.2
    >>> accuracy = 0.25 + 0.75 * np.exp(-bits ** 3)
    >>> later = forecast(compute, accuracy, bits, at=[1e21], chance=0.25)
    >>> truth = 0.25 + 0.75 * np.exp(-(0.4 + 1.2 * 1e3**-0.2) ** 3)
    >>> bool(abs(later.mean[0] - truth) < 0.03), bool(later.low[0] < truth < later.high[0])
    (True, True)
    """
    call = "forecast"
    chance = check_chance(call, chance)
    if np.ndim(x) == 2:
        return _of_columns(x, sharp, smooth, at, chance)
    series = check_series(call, series)
    targets = check_numbers(call, "at", np.atleast_1d(as_numbers(call, "at", at)), shape=(None,))
    axis, u, score, guide, _ = sorted_points(call, x, sharp, smooth, series, targets)
    if axis.logarithmic and (targets < 0).any():
        raise PhasewatchError(
            f"{call}(at=...) has {targets.min():g}, and x is never negative; ask for a place on the same axis."
        )
    mean, deviation, trust = predict(u, score, guide, axis.position(targets), chance, is_loss=axis.falling)
    low, high = np.clip(mean - WIDTH * deviation, 0, 1), np.clip(mean + WIDTH * deviation, 0, 1)
    return Forecast(targets, mean, low, high, find_onset(axis, u, score, guide, chance), trust, chance)


def sorted_points(
    call: str, x: Any, sharp: Any, smooth: Any, series: Sequence[str] | None, targets: np.ndarray
) -> tuple[Axis, np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
    """The checked arrays of a call from early to late.

    Args:
        call: the function as it is typed.
        x: what came.
        sharp: what came.
        smooth: what came.
        series: the run of each point, if several share the axis.
        targets: where to forecast, which tells the direction of an axis that several share.

    Returns:
        The axis, positions, sharp, smooth, and the order of the points.

    Raises:
        PhasewatchError: if one of them can't be used.
    """
    values, order = check_axis(call, x, least=FEWEST, series=series)
    score = check_share(call, "sharp", check_numbers(call, "sharp", sharp, shape=(len(values),)))
    check_moves(call, score)
    guide = None
    if smooth is not None:
        guide = check_smooth(call, smooth, len(values))
    if series is None:
        falling = bool(values[-1] < values[0])
    else:
        falling = bool(np.mean(targets < np.median(values)) > 0.5)
    axis = Axis.of(values, falling=falling)
    if series is not None and falling:
        order = order[::-1]
    elif series is None:
        order = np.arange(len(values))
    u = axis.position(values)[order]
    return axis, u, score[order], None if guide is None else guide[order], order


def check_moves(call: str, sharp: np.ndarray, name: str = "sharp") -> None:
    """Refuse a score that is at its top from the first point on.

    Raises:
        PhasewatchError: if so.
    """
    if sharp.size and (sharp >= 1).all():
        raise PhasewatchError(
            f"{call}({name}=...) is 1 at every point: all items are right from the start, and nothing is left to "
            "emerge. Start earlier, or use harder items."
        )


def _of_columns(x: Any, sharp: Any, smooth: Any, at: Any, chance: float) -> Forecast:
    columns, targets = as_numbers("forecast", "x", x), as_numbers("forecast", "at", at)
    for name, values in (("x", columns), ("at", targets)):
        check_numbers("forecast", name, np.where(np.isnan(values), 0.0, values))
    if smooth is not None:
        raise PhasewatchError(
            "forecast(smooth=...) with several columns of x: a smooth score is known before the jump only; pass "
            "smooth=None, and what is known of the targets too as columns of x and at."
        )
    if not columns.shape[1] or targets.ndim != 2 or targets.shape[1] != columns.shape[1]:
        raise PhasewatchError(
            f"forecast(at=...) must have the {columns.shape[1]} columns of x (at least one), shape (target, column); "
            f"{targets.shape} came."
        )
    score = check_share("forecast", "sharp", check_numbers("forecast", "sharp", sharp, shape=(len(columns),)))
    check_moves("forecast", score)
    mean, deviation = forecast_of_columns(columns, score, targets, chance)
    low, high = np.clip(mean - WIDTH * deviation, 0, 1), np.clip(mean + WIDTH * deviation, 0, 1)
    return Forecast(targets, mean, low, high, None, 1.0, chance)
