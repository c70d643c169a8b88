"""How noisy each point of a series is, and how sharply its curve bends at each place. numpy alone."""

import math

import numpy as np

OUTLIER = 3.0
"""A point further than this many standard deviations from the curve counts less, the further the less.

The usual choice of robust fits. With 2, the simulated changes lie within their errors in 87 % instead of 94 % of cases;
without any weights, 2 % of the stages are lost (experiments/constants.py).
"""

WINDOW = 20
"""A point's noise is judged by a 20th of the points to either side, at least five. Half or double makes no difference
beyond chance (experiments/constants.py)."""

COUNTS = 4
"""The mean noise of the series counts as much as this many points when the noise around a point is judged.

With 1, 163 instead of 174 simulated transitions are confirmed; with 16, 1 % of the stages are lost
(experiments/constants.py).
"""

LEAST_BEND = 0.03
"""The curve may bend at each place at least this much, as a share of its root mean square curvature.

Keeps a long straight stretch from being taken for one that can't bend. A tenth makes no difference; with 0.3, 1 % of
the simulated stages are lost (experiments/constants.py).
"""

ROUNDING = float(np.finfo(float).eps)
"""No residual counts as smaller, in standard deviations of the series: below it they are rounding errors, whose ratios
can leave the range of a float."""


def first_guess(u: np.ndarray) -> np.ndarray:
    """A first guess of each point's noise: 1, and more if it is far from the median of the five points around it.

    "Far" is measured in typical differences of neighbours, as in Hampel's filter. The median of a monotone stretch is
    its middle point, so a steep rise is not taken for outliers. Without this, the first fit would follow the outliers,
    since it takes all points for equally noisy.

    Args:
        u: the series, in units of its standard deviation, shape (point,).

    Returns:
        Relative standard deviations, shape (point,).
    """
    near = np.lib.stride_tricks.sliding_window_view(np.pad(u, 2, mode="reflect"), 5)
    typical = typical_steps(u)
    off = np.abs(u - np.median(near, axis=1))
    return np.where(off > OUTLIER * typical, ((off / np.maximum(OUTLIER * typical, 1e-9)) ** 2).clip(1.0, 1e3), 1.0)


def typical_steps(u: np.ndarray) -> np.ndarray:
    """The median size of the differences of neighbours, among the ten to either side of each point, shape (point,)."""
    reach = min(10, len(u) - 1)
    steps = np.abs(np.diff(np.pad(u, (reach, reach + 1), mode="reflect")))
    return np.median(np.lib.stride_tricks.sliding_window_view(steps, 2 * reach + 1), axis=1)


def noise_of_rounding(u: np.ndarray) -> float:
    """The noise that rounding makes of a series on a grid, such as a share of right answers; 0 of any other.

    What was rounded is equally likely anywhere between two values, so it is their distance over √12; but no more than
    the differences of neighbours make of it (von Neumann 1941), which are small where the series seldom leaves a value.
    A series that changes once, all at once, is on no grid that could be known.

    Args:
        u: the series, in units of its standard deviation, shape (point,).

    Example:
        >>> round(noise_of_rounding(np.array([0.25, 0.25, 0.5, 0.25, 0.25, 0.75])) * 12**0.5, 9)
        0.25
    """
    exact = u.round(9)  # where floats have their rounding errors
    values = np.unique(exact)
    if np.count_nonzero(np.diff(exact)) < 2 or len(values) > len(u) / 2:
        return 0.0
    gaps = np.diff(values)
    multiples = gaps / gaps.min()
    if not np.allclose(multiples, multiples.round(), atol=1e-3):
        return 0.0
    return min(float(gaps.min()) / math.sqrt(12), math.sqrt(float(np.mean(np.diff(u) ** 2)) / 2))


def local_noise(residuals: np.ndarray, value_root: np.ndarray, noise: np.ndarray, least: float) -> np.ndarray:
    """The noise of each point relative to the others: that of the points around it, and more for an outlier.

    By iteratively reweighted means. A point that the curve follows closely has a small residual for that reason alone;
    its leverage corrects this.

    Args:
        residuals: the series minus its curve, in standard deviations of the series, shape (point,).
        value_root: R with R Rᵀ the posterior covariance of the curve, shape (point, knot).
        noise: the standard deviation of each point's noise as known so far, shape (point,).
        least: that of rounding, in standard deviations of the series.

    Returns:
        Relative standard deviations with a geometric mean of 1, shape (point,).
    """
    n = len(residuals)
    leverage = (value_root / noise.clip(min=ROUNDING)[:, None]) ** 2
    squares = residuals**2 / (1 - leverage.sum(axis=1)).clip(min=0.2) + ROUNDING**2
    everywhere = float(np.median(squares)) / 0.455  # the median of a squared normal value
    weights = np.ones(n)
    variance = squares
    first, last = _windows(n, max(5, n // WINDOW))
    for _ in range(8):
        variance = _local_mean(weights * squares, first, last, prior=everywhere, counts=COUNTS) + least**2
        weights = np.minimum(1, OUTLIER**2 * variance / squares) ** 2
        everywhere = float(np.exp(np.mean(np.log(variance))))
    noise = np.sqrt(variance / weights).clip(*(np.sqrt(np.median(variance)) * np.array([1e-3, 1e3])))
    return noise / np.exp(np.mean(np.log(noise)))


def local_bends(curvature: np.ndarray) -> np.ndarray:
    """The size of the curvature around each knot relative to the others.

    Args:
        curvature: the curve's second derivative at each knot, shape (knot,).

    Returns:
        Relative sizes with a geometric mean of 1, shape (knot,).
    """
    squares = np.ldexp(curvature, -np.frexp(np.abs(curvature).max())[1]) ** 2  # their sizes may have any unit
    around = _local_mean(squares, *_windows(len(squares), max(2, len(squares) // 20)), prior=0.0, counts=0)
    size = np.sqrt(around + LEAST_BEND**2 * around.mean() + ROUNDING**2)
    return size / np.exp(np.mean(np.log(size)))


def _windows(n: int, reach: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of n places, the first of its `reach` neighbours on both sides, and the one after the last."""
    i = np.arange(n)
    return np.maximum(i - reach, 0), np.minimum(i + reach + 1, n)


def _local_mean(values: np.ndarray, first: np.ndarray, last: np.ndarray, *, prior: float, counts: int) -> np.ndarray:
    """The mean over each window, and over `counts` values of `prior`."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[last] - total[first] + counts * prior) / (last - first + counts)
