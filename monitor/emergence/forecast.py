"""Forecasts of a sharp score with their doubt, and the same done blind on what is already known."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtri

from phasewatch.monitor.emergence.checks import Axis, check_axis, check_chance, check_numbers, check_share
from phasewatch.monitor.emergence.curves import logistic_law, mean_and_spread
from phasewatch.monitor.emergence.several import forecast_of_columns
from phasewatch.monitor.errors import PhasewatchError, real_number

FEWEST = 6
"""A forecast takes at least this many points."""

FEWEST_BACKTEST = 6
"""A backtest hides the end of the points only as long as this many are left."""

CUTS = (0.4, 0.5, 0.6, 0.7, 0.8)
"""The shares of the points from which backtests forecast the others."""

WIDTH = 1.645
"""Standard deviations on either side of a 90 % interval."""

GROWTH = 0.6
"""The variance of a forecast grows with the distance by this share of what the backtests show. Their fits have fewer
points than the forecast's own. Chosen by the coverage on ladders of one recipe and on public models."""

SCATTER = 0.01
"""The least standard deviation of an accuracy between runs of one recipe; that of repeated small ladders."""

LAG = 0.25
"""Where the smooth score isn't trusted, models of one x may be ahead or behind by this share of the span of the points,
as one standard deviation. Chosen by the coverage on public models of different families."""

ONSET = 0.1
"""A score has left chance once it has made this share of the way from chance to 1."""

HORIZON = 1.0
"""An onset is looked for as far behind the last point as this many times the span of the points."""


@dataclass(frozen=True)
class Onset:
    """When a score leaves chance: a tenth of the way from chance to 1.

    Attributes:
        median: in the user's axis.
        low: between `low` and `high` it lies with 90 % probability; either may be infinite, for never within reach.
        high: the other end, later than `low`; on a falling axis the smaller number.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        def words(x: float) -> str:
            return f"{x:.4g}" if np.isfinite(x) else "beyond reach"

        return f"{words(self.median)} (90 % interval: {words(self.low)} to {words(self.high)})"


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
            lines.append("The smooth score explains little so far; the forecast rests on the axis alone.")
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
    targets = np.atleast_1d(check_numbers(call, "at", at))
    axis, u, score, guide, _ = _sorted(call, x, sharp, smooth, series, targets)
    mean, deviation, trust = predict(u, score, guide, axis.position(targets), chance)
    low, high = np.clip(mean - WIDTH * deviation, 0, 1), np.clip(mean + WIDTH * deviation, 0, 1)
    return Forecast(targets, mean, low, high, _onset(axis, u, score, guide, chance), trust, chance)


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
    targets = np.array([cut])
    axis, u, score, guide, order = _sorted(call, x, sharp, smooth, series, targets)
    known = u <= axis.position(targets)[0]
    if known.sum() < FEWEST or known.all():
        raise PhasewatchError(
            f"retrodict(cut={cut:g}) leaves {int(known.sum())} points up to the cut and {int((~known).sum())} behind "
            f"it; it takes {FEWEST} and 1. Move the cut."
        )
    names = None if series is None else [series[i] for i in order[known]]
    places = axis.value(u)
    earlier = None if guide is None else guide[known]
    blind = forecast(places[known], score[known], earlier, at=places[~known], chance=chance, series=names)
    truth = score[~known]
    slope, intercept = np.polyfit(u[known][-6:], score[known][-6:], 1)
    line = np.clip(slope * u[~known] + intercept, 0, 1)
    return Retrodiction(
        error=float(np.abs(blind.mean - truth).mean()),
        naive_error=float(np.abs(score[known][-1] - truth).mean()),
        linear_error=float(np.abs(line - truth).mean()),
        coverage=float(((blind.low <= truth) & (truth <= blind.high)).mean()),
        forecast=blind,
    )


def predict(
    u: np.ndarray, sharp: np.ndarray, smooth: np.ndarray | None, at: np.ndarray, chance: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean and standard deviation of the sharp score at positions, and the trust in the smooth score.

    Args:
        u: positions, shape (point,), not decreasing.
        sharp: shape (point,).
        smooth: shape (point,) or (point, column), or None.
        at: positions, shape (target,). Up to the last point the running mean of the points is interpolated.
        chance: the sharp score of a guess.

    Returns:
        Mean and standard deviation, shape (target,), and the trust.
    """
    span = float(u[-1] - u[0])
    distance = np.maximum(at - u[-1], 0.0)
    mean, spread, trust = mean_and_spread(u, sharp, smooth, at, chance)
    noise = max(_noise(u, sharp), SCATTER)
    lag = (1 - trust) * LAG * span
    behind, ahead = (logistic_law(u, sharp, at + shift, chance) for shift in (-lag, lag)) if lag > 0 else (mean, mean)
    growth = GROWTH * _growth(u, sharp, smooth, chance)
    variance = noise**2 + growth * distance + spread**2 + ((ahead - behind) / 2) ** 2
    half = 1 + round((1 - trust) * len(u) / 10)
    inside = at <= u[-1]
    mean = np.where(inside, np.interp(at, u, _running_mean(sharp, half)), mean)
    variance = np.where(inside, noise**2, variance)
    return np.clip(mean, 0, 1), np.sqrt(variance), trust


def _growth(u: np.ndarray, sharp: np.ndarray, smooth: np.ndarray | None, chance: float) -> float:
    """The variance of a forecast per unit of distance, from forecasts of later points by earlier ones."""
    ratios = []
    span = float(u[-1] - u[0])
    for share in CUTS:
        cut = round(share * len(u))
        if cut < FEWEST_BACKTEST or cut >= len(u):
            continue
        earlier = None if smooth is None else smooth[:cut]
        mean, _, _ = mean_and_spread(u[:cut], sharp[:cut], earlier, u[cut:], chance)
        ratios.append((mean - sharp[cut:]) ** 2 / (u[cut:] - u[cut - 1] + span / 40))
    if not ratios:
        return SCATTER / max(span, 1e-12)
    return float(np.median(np.concatenate(ratios))) / 0.455  # the median of a squared normal value


def _noise(u: np.ndarray, sharp: np.ndarray) -> float:
    """The standard deviation of points around the line between their neighbours."""
    width = np.maximum(u[2:] - u[:-2], 1e-12)
    share = (u[1:-1] - u[:-2]) / width
    off = sharp[1:-1] - (1 - share) * sharp[:-2] - share * sharp[2:]
    return float(np.sqrt(np.mean(off**2 / (1 + share**2 + (1 - share) ** 2))))


def _running_mean(values: np.ndarray, half: int) -> np.ndarray:
    """The mean over as many neighbours on both sides, fewer towards the ends so that they stay centred."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    i = np.arange(len(values))
    reach = np.minimum(half, np.minimum(i, len(values) - 1 - i))
    return (total[i + reach + 1] - total[i - reach]) / (2 * reach + 1)


def _onset(axis: Axis, u: np.ndarray, sharp: np.ndarray, smooth: np.ndarray | None, chance: float) -> Onset | None:
    """Where the forecast, drawn with its doubt, is below the onset's level for the last time."""
    level = chance + ONSET * (1 - chance)
    grid = np.linspace(u[0], u[-1] + HORIZON * (u[-1] - u[0]), 800)
    mean, deviation, _ = predict(u, sharp, smooth, grid, chance)
    quantiles = np.linspace(0.005, 0.995, 100)
    draws = mean + ndtri(quantiles)[:, None] * deviation  # (draw, position)
    below = draws < level
    last = len(grid) - 1 - np.argmax(below[:, ::-1], axis=1)
    never_below = ~below.any(axis=1)
    if never_below.mean() > 0.5:
        return None
    where = np.where(last == len(grid) - 1, np.inf, grid[last])
    where = np.where(never_below, grid[0], where)
    low, median, high = np.quantile(where, [0.05, 0.5, 0.95], method="nearest")
    if not np.isfinite(median):
        return None

    def value(position: float) -> float:
        return float(axis.value(np.array(position))) if np.isfinite(position) else (-np.inf if axis.falling else np.inf)

    return Onset(value(float(median)), value(float(low)), value(float(high)))


def _sorted(
    call: str, x: Any, sharp: Any, smooth: Any, series: Sequence[Any] | None, targets: np.ndarray
) -> tuple[Axis, np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
    """The checked arrays from early to late: the axis, positions, sharp, smooth, and the order of the points."""
    values, order = check_axis(call, x, least=FEWEST, series=series)
    score = check_share(call, "sharp", check_numbers(call, "sharp", sharp, shape=(len(values),)))
    check_moves(call, score)
    guide = None
    if smooth is not None:
        guide = check_numbers(call, "smooth", smooth)
        if guide.ndim not in (1, 2) or len(guide) != len(values):
            raise PhasewatchError(
                f"{call}(smooth=...) must have the shape ({len(values)},) or ({len(values)}, column); {guide.shape}."
            )
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


def check_moves(call: str, sharp: np.ndarray) -> None:
    """Refuse a score that is at its top from the first point on.

    Raises:
        PhasewatchError: if so.
    """
    if (sharp >= 1).all():
        raise PhasewatchError(
            f"{call}(sharp=...) is 1 at every point: all items are right from the start, and nothing is left to "
            "emerge. Start earlier, or use harder items."
        )


def _of_columns(x: Any, sharp: Any, smooth: Any, at: Any, chance: float) -> Forecast:
    columns, targets = np.asarray(x, dtype=float), np.asarray(at, dtype=float)
    if smooth is not None:
        raise PhasewatchError(
            "forecast(smooth=...) with several columns of x: a smooth score is known before the jump only; pass "
            "smooth=None, and what is known of the targets too as columns of x and at."
        )
    if targets.ndim != 2 or targets.shape[1] != columns.shape[1]:
        raise PhasewatchError(
            f"forecast(at=...) must have the {columns.shape[1]} columns of x, shape (target, column); {targets.shape}."
        )
    score = check_share("forecast", "sharp", check_numbers("forecast", "sharp", sharp, shape=(len(columns),)))
    check_moves("forecast", score)
    mean, deviation = forecast_of_columns(columns, score, targets, chance)
    low, high = np.clip(mean - WIDTH * deviation, 0, 1), np.clip(mean + WIDTH * deviation, 0, 1)
    return Forecast(targets, mean, low, high, None, 1.0, chance)
