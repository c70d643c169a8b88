"""The moment at which a score that has long risen turns, found without looking ahead."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression

from phasewatch.monitor.emergence.checks import check_axis, check_numbers

FEWEST = 8
"""No alarm before this many points: the noise isn't known yet."""

THRESHOLD = 4.5
"""The alarm rings when a rise and a fall explain the points better than a rise alone by this much: the difference of
the sums of squares in units of the noise's variance. A lower one rings sooner and more often for nothing
(`_FALSE_ALARMS`). Chosen so that it rings within 30,000 of 143,000 steps after a peak that the noise doesn't hide."""

RISEN = 5.0
"""A score can turn only once it has risen by this many standard deviations of the noise; before, it has no peak."""

RECENT = 12
"""The noise is that of the last so many points: early in training a score moves more from point to point."""

REACH = 30
"""A peak is looked for among the last so many points."""

_FALSE_ALARMS = ((4.5, 0.29), (6.0, 0.15), (8.0, 0.09), (10.0, 0.05), (12.0, 0.045), (16.0, 0.04), (30.0, 0.02))
"""The largest statistic of a series, and the share of series that never fall and reach it by chance, of those that rise
by one standard deviation of the white noise per doubling. Flat ones reach it about twice as often.
By simulation, experiments/bench_emergence.py."""


@dataclass(frozen=True)
class Reversal:
    """A score that turned.

    Attributes:
        peak: where it was highest, in the user's axis, as known when the series ends.
        fall: how far the last points lie below the peak, in the score's unit, both smoothed.
        alarm: where it was first known, from the points up to there alone.
        false_alarm: the probability that a series that doesn't fall looks so much as if it did, at any of its points.
    """

    peak: float
    fall: float
    alarm: float
    false_alarm: float

    def __str__(self) -> str:
        return (
            f"It turned: highest at {self.peak:.6g}, and {self.fall:.3g} lower at the end. The alarm rang at "
            f"{self.alarm:.6g}; a series that doesn't fall looks like this in {self.false_alarm:.1%} of cases."
        )


def reversal(x: Any, log_likelihood: Any) -> Reversal | None:
    """Whether a watched score has turned after its rise, judged at each point by those up to it.

    The points are fitted by a curve that never falls, and by one that rises to a peak and then falls (isotonic
    regression, both by least squares). The alarm rings at the first point at which the second is better by more than
    noise would make it; the noise is the scatter of points around the line between their neighbours. It is taken back,
    and can ring again, if later points are explained by a rise alone.

    Args:
        x: steps, tokens or compute, shape (point,), rising; or a falling loss.
        log_likelihood: of the watched behaviour, or any score that should rise, shape (point,).

    Returns:
        The reversal, or None if there is none so far.

    Raises:
        PhasewatchError: if the axis repeats or turns, or a value isn't finite.

    >>> import numpy as np
    >>> step = np.arange(1, 41) * 1000
    >>> rises = -4 + np.log(step / 1000) / 2 + 0.02 * np.random.default_rng(0).normal(size=40)
    >>> reversal(step, rises) is None
    True
    >>> found = reversal(step, rises - 0.03 * np.maximum(np.arange(40) - 25, 0))
    >>> bool(25_000 < found.alarm <= 32_000)
    True
    """
    values, _ = check_axis("reversal", x, least=2)
    score = check_numbers("reversal", "log_likelihood", log_likelihood, shape=(len(values),))
    alarm, largest = None, 0.0
    for points in range(len(score), FEWEST - 1, -1):  # from the end, as an alarm that was taken back doesn't count
        statistic = turned(values[:points], score[:points])
        if statistic <= THRESHOLD:
            break
        alarm, largest = points - 1, max(largest, statistic)
    if alarm is None:
        return None
    peak, fitted = _rise_and_fall(score)
    levels, chances = np.array(_FALSE_ALARMS).T
    chance = float(np.exp(np.interp(largest, levels, np.log(chances))))
    return Reversal(float(values[peak]), float(fitted[peak] - fitted[-1]), float(values[alarm]), chance)


def turned(x: np.ndarray, score: np.ndarray) -> float:
    """How much better a rise and a fall explain the points than a rise alone, in the noise's variance.

    Args:
        x: shape (point,), rising or falling.
        score: shape (point,).

    Returns:
        The statistic; 0 if the last points are the highest, or the score hasn't risen yet.
    """
    rise = isotonic_regression(score).x
    rising = float(np.sum((score - rise) ** 2))
    if rising == 0:
        return 0.0
    share = (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
    off = score[1:-1] - (1 - share) * score[:-2] - share * score[2:]
    squares = (off**2 / (1 + share**2 + (1 - share) ** 2))[-RECENT:]
    variance = float(np.median(squares)) / 0.455  # the median of a squared normal value
    if rise[-1] - rise[0] < RISEN * variance**0.5:
        return 0.0
    _, fitted = _rise_and_fall(score)
    return (rising - float(np.sum((score - fitted) ** 2))) / max(variance, 1e-300)


def _rise_and_fall(score: np.ndarray) -> tuple[int, np.ndarray]:
    """The peak's index and the best curve that rises up to it and falls behind it."""
    best, peak, curve = np.inf, len(score) - 1, isotonic_regression(score).x
    best = float(np.sum((score - curve) ** 2))
    for last in range(max(len(score) - 1 - REACH, 0), len(score) - 1):
        up, down = isotonic_regression(score[: last + 1]).x, isotonic_regression(score[last + 1 :], increasing=False).x
        off = float(np.sum((score[: last + 1] - up) ** 2) + np.sum((score[last + 1 :] - down) ** 2))
        if off < best and up[-1] >= down[0]:
            best, peak, curve = off, last, np.concatenate([up, down])
    return peak, curve
