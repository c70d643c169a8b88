"""When a score leaves chance."""

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

from phasewatch.monitor.emergence.checks import Axis
from phasewatch.monitor.emergence.prediction import predict

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


def find_onset(axis: Axis, u: np.ndarray, sharp: np.ndarray, smooth: np.ndarray | None, chance: float) -> Onset | None:
    """Where the forecast, drawn with its doubt, is below the onset's level for the last time.

    Args:
        axis: of the positions.
        u: positions, shape (point,), not decreasing.
        sharp: shape (point,).
        smooth: shape (point,) or (point, column), or None.
        chance: the sharp score of a guess.

    Returns:
        The onset; None if the score is above the level from the first point on, or more likely not within reach.
    """
    level = chance + ONSET * (1 - chance)
    grid = np.linspace(u[0], u[-1] + HORIZON * (u[-1] - u[0]), 800)
    mean, deviation, _ = predict(u, sharp, smooth, grid, chance, is_loss=axis.falling)
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
    around = int(np.searchsorted(u, median))
    if around < len(u):  # a crossing between two points may lie anywhere between them
        low, high = min(low, u[max(around - 1, 0)]), max(high, u[around])

    def value(position: float) -> float:
        return float(axis.value(np.array(position))) if np.isfinite(position) else (-np.inf if axis.falling else np.inf)

    return Onset(value(float(median)), value(float(low)), value(float(high)))
