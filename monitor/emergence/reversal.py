"""The moment at which a score that has long risen turns, found without looking ahead."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression

from phasewatch.monitor.emergence.checks import Axis, check_axis, check_numbers

FEWEST = 12
"""No alarm before this many points: the noise isn't known yet."""

THRESHOLD = (0.15, 0.74)
"""Intercept and slope of the alarm's threshold in the logarithm of the number of points near the top: more points have
more chances to look like a fall. Chosen so that a flat series of white noise, of 16 to 40 points, rings at some time
once in four or five times, and a rising one once in ten; it has rung at its end once in twenty or less."""

EARLY = 0.74
"""The alarm rings at this share of the threshold: simulated falls of half a nat then ring within 30,000 of 143,000
steps (median, experiments/reversals.py), and most flat series at some time. At all of the threshold it is sure."""

RELEASE = 0.63
"""An alarm that rang is taken back below this share of the threshold; one higher point after a fall isn't enough."""

SURE = 0.25
"""An alarm is sure, and worth a red flag, if at most this share of flat series look like it at some time."""

FEWEST_NEAR = 10
"""Fewer points near the top count as this many: three points that fall by chance in a steep rise aren't a reversal."""

CLIP = 2.0
"""A difference between two points counts as at most this many standard deviations of the noise, so that no spike rings
alone. Of 0.7 to 4 and none at all, this one was soonest at an equal rate of false alarms."""

RISEN = 5.0
"""A score can turn only once it has risen by this many standard deviations of the noise; before, it has no peak. Points
within as many of the top are near it."""

LEAST_RECENT = 8
"""The noise is that of the points near the top, of so many at least: early in training a score moves more from point to
point."""

SPIKE = 3.0
"""A second difference counts in the noise's variance as at most this many times the median's variance."""

REACH = 256
"""A fall is looked for among the last so many points."""

_FALSE_ALARMS = (
    (0.6, 0.72),
    (0.74, 0.6),
    (0.8, 0.51),
    (0.9, 0.34),
    (1.0, 0.215),
    (1.1, 0.113),
    (1.2, 0.055),
    (1.3, 0.031),
    (1.5, 0.005),
    (1.7, 0.001),
)
"""The largest statistic of a series, and the share of 1000 flat series of white noise, of 16 to 40 points, that reach
it by chance at any of their points. experiments/reversals.py has other shapes, noises and axes."""


@dataclass(frozen=True)
class Reversal:
    """A score that turned.

    Attributes:
        peak: where it was highest, in the user's axis, as known when the series ends.
        fall: how far the last points lie below the peak, in the score's unit, both smoothed.
        alarm: where the alarm rang, from the points up to there alone.
        false_alarm: the probability that a flat series looks so much as if it fell, at any of its points. The alarm
            rings early, and is surer with each point that confirms it.
    """

    peak: float
    fall: float
    alarm: float
    false_alarm: float

    @property
    def is_sure(self) -> bool:
        """Whether noise alone rarely looks like this; a red flag is raised only then."""
        return self.false_alarm <= SURE

    def __str__(self) -> str:
        it_turned = "It turned" if self.is_sure else "It may have turned"
        return (
            f"{it_turned}: highest at {self.peak:.6g}, and {self.fall:.3g} lower at the end. "
            f"The alarm rang at {self.alarm:.6g}; a flat series looks like this at some time in "
            f"{self.false_alarm:.1%} of cases."
        )


def reversal(x: Any, log_likelihood: Any) -> Reversal | None:
    """Whether a watched score has turned after its rise, judged at each point by those up to it.

    Of the last k points, for each k from 3 on, all pairs are compared, as in the test of Mann (1945) and Kendall: the
    sum of how far the earlier lies above the later, in standard deviations of the noise and clipped, is large in a
    fall. The alarm rings at the first point at which it is larger than noise would make it; the noise is the scatter of
    points around the line between their neighbours. It rings before it is sure (`is_sure` tells), and is taken back,
    and can ring again, if later points are explained without a fall.

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
    u = Axis.of(values, falling=bool(values[-1] < values[0])).position(values)
    found: list[float] = []
    for points in range(len(score), FEWEST - 1, -1):  # from the end, as an alarm that was taken back doesn't count
        found.append(turned(u[:points], score[:points]))
        if found[-1] < RELEASE:
            break
    first = rings_since(np.array(found[::-1]))
    if first is None:
        return None
    alarm = len(score) - len(found) + first
    peak, fitted = _rise_and_fall(score)
    levels, chances = np.array(_FALSE_ALARMS).T
    chance = float(np.exp(np.interp(max(found), levels, np.log(chances))))
    return Reversal(float(values[peak]), float(fitted[peak] - fitted[-1]), float(values[alarm]), chance)


def rings_since(statistics: np.ndarray, early: float = EARLY, release: float = RELEASE) -> int | None:
    """Where the alarm that still rings at the end began.

    Args:
        statistics: of the points so far, at each point, shape (point,); see `turned`.
        early: where the alarm rings.
        release: below which it is taken back.

    Returns:
        The index, or None if it doesn't ring.
    """
    low = np.flatnonzero(statistics < release)
    start = int(low[-1]) + 1 if len(low) else 0
    rang = np.flatnonzero(statistics[start:] >= early)
    return start + int(rang[0]) if len(rang) else None


def turned(u: np.ndarray, score: np.ndarray) -> float:
    """How surely the last points fall.

    Args:
        u: positions, shape (point,), increasing.
        score: shape (point,).

    Returns:
        The largest sum over the pairs of the last points, in units of the alarm's threshold, which is 1; 0 if the score
        hasn't risen yet.
    """
    level = isotonic_regression(score).x
    noise, near = 0.0, max(LEAST_RECENT, len(score) // 4)
    for _ in range(2):  # the noise of the points near the top, which are those that are near by their noise
        noise = max(_noise(u, score, near), 1e-6 * float(np.ptp(score)))
        near = int((level > level[-1] - RISEN * noise).sum())
    if noise == 0 or near == len(score):
        return 0.0
    last = score[-REACH:] / noise
    above = np.triu(np.clip(last[:, None] - last, -CLIP, CLIP))  # of the earlier point above the later one
    sums = above.sum(axis=1)[::-1].cumsum()
    k = np.arange(3, len(last) + 1)
    return float((sums[k - 1] / np.sqrt(k * (k**2 - 1) / 3)).max()) / (
        THRESHOLD[0] + THRESHOLD[1] * np.log(max(near, FEWEST_NEAR))
    )


def _noise(u: np.ndarray, score: np.ndarray, last: int) -> float:
    """The standard deviation of the last points around the line between their neighbours; a spike counts little."""
    share = (u[1:-1] - u[:-2]) / (u[2:] - u[:-2])
    off = score[1:-1] - (1 - share) * score[:-2] - share * score[2:]
    squares = (off**2 / (1 + share**2 + (1 - share) ** 2))[-max(LEAST_RECENT, last) :]
    typical = float(np.median(squares)) / 0.455  # the median of a squared normal value
    return float(np.sqrt(np.mean(np.minimum(squares, SPIKE * typical))))


def _rise_and_fall(score: np.ndarray) -> tuple[int, np.ndarray]:
    """The peak's index and the best curve that rises up to it and falls behind it, of the medians of three points."""
    ends = score[[0, -1]]
    middle = np.median(np.lib.stride_tricks.sliding_window_view(score, 3), axis=1)
    score = np.concatenate([ends[:1], middle, ends[1:]])
    curve = isotonic_regression(score).x
    best, first, last = float(np.sum((score - curve) ** 2)), len(score) - 1, len(score) - 1
    for top in range(max(len(score) - 1 - REACH, 0), len(score) - 1):
        up, down = isotonic_regression(score[: top + 1]).x, isotonic_regression(score[top + 1 :], increasing=False).x
        off = float(np.sum((score[: top + 1] - up) ** 2) + np.sum((score[top + 1 :] - down) ** 2))
        if up[-1] < down[0] or off > best * (1 + 1e-9):
            continue
        if off < best * (1 - 1e-9):
            best, first, curve = off, top, np.concatenate([up, down])
        last = top
    return (first + last + 1) // 2, curve  # of equal ones the middle
