"""Where a series may jump: all of a rise or fall between two neighbouring points, or a few. numpy alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from phasewatch.monitor.trajectories.noise import typical_steps

MOST_GAPS = 5
"""A rise or fall along a straight line over more gaps between neighbouring points than this is no jump.

With 3, intervals hold 97.5 instead of 97.8 % of the boundaries of simulated jumps of 10 and 30 times the noise. These
and 60 flat runs of 200 points with noise of correlation 0.8 are what this and the next constants were varied on.
"""

MOST_ROUND = 8
"""The same of a rise or fall with round corners, whose middle is half as steep again. With 5, intervals hold 96.6 %."""

LONGEST = 12
"""Rises with round corners over up to so many gaps are tried, so that a longer one is not taken for a jump.

Without those above 8, 2 more of the flat runs have a transition.
"""

STANDS_OUT = 5
"""A jump is suspected where a step is larger than this many typical differences of the neighbours around it.

Saves time. With 4 nothing changes; with 6, intervals hold 97.2 %.
"""

BESIDE = 4
"""The steps over so many gaps on both sides are compared with one that is suspected. Saves time; 2 changes little."""

STEEPER = 0.33
"""A jump is suspected where those are at most this share as steep. Saves time; 0.2 and 0.5 change nothing."""

MOST_SUSPECTS = 8
"""At most so many places are looked around. Saves time; with 1 nothing changes in curves with one jump."""

LEAST_HEIGHT = 7.0
"""A jump is at least this many standard deviations of the noise high.

Without it, 2 more of the flat runs have a transition; with 9, intervals hold 93.1 %.
"""

PLATEAU = 0.07
"""The curve right before and after a jump is at most this share as steep, so that a steep part of a rise is none.

With 0.1, 6 instead of 5 of the flat runs have a transition; with 0.03, two jumps over 3 gaps among 60 points are both
found in 8 instead of 18 of 20 curves.
"""


class Place(NamedTuple):
    """Where a jump may be, and how it may look.

    Attributes:
        start: the last point before it, an index.
        end: the first point after it.
        is_round: whether its corners are round, as those of 3s² − 2s³; else it is a straight line.
    """

    start: int
    end: int
    is_round: bool


@dataclass(frozen=True)
class Jump:
    """A change too abrupt for a smooth curve.

    Attributes:
        place: the likeliest.
        start_interval: between which two indices `start` lies with 95 % probability.
        end_interval: the same of `end`.
    """

    place: Place
    start_interval: tuple[int, int]
    end_interval: tuple[int, int]

    @property
    def start(self) -> int:
        """The last point before it, an index."""
        return self.place.start

    @property
    def end(self) -> int:
        """The first point after it."""
        return self.place.end

    @property
    def is_abrupt(self) -> bool:
        """Whether it is short enough for a jump."""
        return self.end - self.start <= (MOST_ROUND if self.place.is_round else MOST_GAPS)


def rises(at: np.ndarray, x: np.ndarray, places: Sequence[Place]) -> np.ndarray:
    """Jumps from 0 to 1 at some positions, shape (position, place); `x` are those of the points."""
    s, is_round, _ = _done(at, x, places)
    return np.where(is_round, s * s * (3 - 2 * s), s)


def rise_slopes(x: np.ndarray, places: Sequence[Place]) -> np.ndarray:
    """Their slopes at the points; where a straight line begins or ends, the mean of both sides."""
    s, is_round, length = _done(x, x, places)
    beside = (np.diff(s, axis=0, prepend=0.0) > 0) + (0.0 + (np.diff(s, axis=0, append=1.0) > 0))
    return np.where(is_round, 6 * s * (1 - s), beside / 2) / length


def _done(at: np.ndarray, x: np.ndarray, places: Sequence[Place]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    start, end, is_round = np.array(places).T
    length = x[end] - x[start]
    return np.clip((at[:, None] - x[start]) / length, 0, 1), is_round > 0, length


def suspects(u: np.ndarray) -> list[Place]:
    """Where a series may jump: it stands out from the steps of the points around, and is steeper than on both sides.

    A step is the difference of the means of two points on either side of up to `MOST_GAPS` gaps.

    Args:
        u: the series, shape (point,).

    Returns:
        The last point before each and the first one after, the steepest first.
    """
    typical, pairs = typical_steps(u), (u[1:] + u[:-1]) / 2
    found = []
    for gaps in range(1, min(MOST_GAPS, len(u) - 4) + 1):
        before = np.arange(len(pairs) - gaps - 1)
        after = before + gaps + 1
        far, width = np.abs(pairs[after] - pairs[before]), gaps + 1
        earlier, later = np.maximum(before - BESIDE, 0), np.minimum(after + BESIDE, len(pairs) - 1)
        slope = np.maximum(np.abs(pairs[before] - pairs[earlier]), np.abs(pairs[later] - pairs[after])) / BESIDE
        suspicious = (far > STANDS_OUT * typical[before + 1]) & (slope * width <= STEEPER * far)
        found += [(far[i] / width, int(i) + 1, int(i) + 1 + gaps) for i in np.flatnonzero(suspicious)]
    return [Place(start, end, False) for _, start, end in sorted(found, reverse=True)]


def least_gain(points: int) -> float:
    """By how much a jump must raise the log-likelihood of so many points, in nats.

    As much as picking its place, of so many for each point, and its height (Schwarz 1978) raise it by chance.
    """
    return math.log((MOST_GAPS + LONGEST - 2) * points) + math.log(points) / 2


def near(place: Place, points: int) -> list[Place]:
    """Where a jump may be that seems to be at some place."""
    first, last = max(place.start - MOST_GAPS, 1), min(place.end + MOST_GAPS, points - 2)
    lengths = [*((gaps, False) for gaps in range(1, MOST_GAPS + 1)), *((gaps, True) for gaps in range(3, LONGEST + 1))]
    return [
        Place(start, start + gaps, is_round)
        for start in range(first, last)
        for gaps, is_round in lengths
        if start + gaps <= last
    ]


def likeliest(places: Sequence[Place], likelihoods: np.ndarray) -> Jump:
    """The likeliest of several places of one jump, with the intervals that hold 95 % of them.

    Args:
        places: of which one is right.
        likelihoods: the log-likelihood of each, shape (place,).
    """
    weights = np.exp(likelihoods - likelihoods.max())
    place = places[int(np.argmax(weights))]
    starts, ends, _ = np.array(places).T
    (first, latest), (earliest, last) = _interval(starts, weights), _interval(ends, weights)
    softer = (place.end - place.start) // 4 if place.is_round else 0  # corners may be softer than those that are tried
    return Jump(place, (first - softer, latest), (earliest, last + softer))


def _interval(indices: np.ndarray, weights: np.ndarray) -> tuple[int, int]:
    order = np.argsort(indices, kind="stable")
    below = np.cumsum(weights[order]) / weights.sum()
    low, high = np.searchsorted(below, [0.025, 0.975])
    return int(indices[order[low]]), int(indices[order[high]])


def stands_on_plateaus(x: np.ndarray, value: np.ndarray, jump: Jump) -> bool:
    """Whether a curve is much steeper along a jump than right before and after it."""
    first, last = jump.start - 1, jump.end + 1
    slopes = np.diff(value[[first, jump.start, jump.end, last]]) / np.diff(x[[first, jump.start, jump.end, last]])
    return bool(np.abs(slopes[[0, 2]]).max() <= PLATEAU * abs(slopes[1]))
