"""Which snapshots of a series are measured next, where the points so far say that its boundaries lie."""

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from phasewatch.monitor.errors import real_number, whole_number
from phasewatch.monitor.trajectories.transitions import Transition

FIRST = 16
"""How many snapshots are measured first, evenly among those of the series, and both ends. The published type A is found
from about 17 points on."""

ELSEWHERE = 0.25
"""What a gap counts for that touches no boundary's interval, so that a transition is found that nothing shows yet."""

SLOWING = 0.5
"""What a gap counts for that touches only a boundary between two stages of one direction. Where the direction changes
comes first: on stored curves with 24 to 64 points that found more (experiments/coarse_to_fine.py)."""

WIDEST = 1 / 32
"""Before the budget is spent, measuring ends only when no gap is a larger share of the series than this, in
snapshots."""


@dataclass(frozen=True)
class Aim:
    """How much is measured of a series, and how well its boundaries have to be known.

    Attributes:
        budget: how many snapshots are measured, those measured before included; None for as many as it takes.
        within: a boundary is known well enough when the end of its interval is at most this many times its start; None
            for as well as the snapshots can tell.

    Raises:
        PhasewatchError: if the budget is below 2, or `within` isn't above 1.
    """

    budget: int | None = None
    within: float | None = None

    def __post_init__(self) -> None:
        if self.budget is not None:
            object.__setattr__(self, "budget", whole_number("replay(budget=...)", self.budget, least=2))
        if self.within is not None:
            hint = "such as 1.2 for a fifth"
            object.__setattr__(self, "within", real_number("replay(within=...)", self.within, above=1, hint=hint))

    def leaves_open(self, interval: tuple[int, int], unmeasured: Sequence[int]) -> bool:
        """Whether a boundary isn't known well enough, and another snapshot could tell.

        Args:
            interval: in which it lies, as training steps.
            unmeasured: the steps that aren't measured, increasing.
        """
        low, high = interval
        if self.within is not None and high <= self.within * low:
            return False
        return held(interval, unmeasured) > 0


def held(interval: tuple[int, int], steps: Sequence[int]) -> int:
    """How many of some steps, increasing, an interval holds."""
    return bisect_right(steps, interval[1]) - bisect_left(steps, interval[0])


def boundaries(found: Sequence[Transition]) -> list[tuple[int, int]]:
    """The intervals of the starts and ends of transitions; where one ends and the next starts counts twice."""
    return [interval for t in found for interval in (t.start_interval, t.end_interval)]


def first_steps(steps: Sequence[int], most: int = FIRST + 2) -> list[int]:
    """The steps to measure first: evenly by their rank, which follows the user's own choice, and both ends.

    Args:
        steps: of the series, increasing.
        most: how many.

    Example:
        >>> first_steps(range(0, 1000, 10))[:4], len(first_steps(range(0, 1000, 10)))
        ([0, 60, 120, 170], 18)
    """
    ranks = np.linspace(0, len(steps) - 1, most).round().astype(int)
    return [steps[i] for i in dict.fromkeys(ranks.tolist())]


def next_step(
    waiting: Collection[int], measured: Collection[int], found: Sequence[Transition], aim: Aim | None = None
) -> int | None:
    """The step that tells most about where the boundaries are.

    The one furthest from every measured one is chosen, counted in snapshots: the middle of a gap, or the first or the
    last of all. A gap counts in full if it touches the interval of a boundary that isn't known well enough, or lies
    behind the last transition, where the next one may have begun; for a half if that boundary lies between two stages
    of one direction; else for a quarter. So does one that touches the interval of a start before the first point, or of
    an end behind the last, since no snapshot says where that is.

    Args:
        waiting: steps to choose from.
        measured: steps that have a point.
        found: the transitions of the points.
        aim: how well boundaries have to be known; None for as well as the snapshots can tell.

    Returns:
        One of those that wait; None if there is none. The earliest if nothing is measured.

    Example:
        >>> next_step([2, 3, 4, 5, 6], measured=[1, 7], found=[])
        4
    """
    waiting = set(waiting).difference(measured)
    if not waiting:
        return None
    if not measured:
        return min(waiting)
    steps = sorted(waiting.union(measured))
    known = [i for i, step in enumerate(steps) if step not in waiting]
    gaps = [(i, j, (i + j) // 2, min((i + j) // 2 - i, j - (i + j) // 2)) for i, j in pairwise(known) if j - i > 1]
    if known[0] > 0:
        gaps.append((-1, known[0], 0, known[0]))
    if known[-1] + 1 < len(steps):
        gaps.append((known[-1], len(steps), len(steps) - 1, len(steps) - 1 - known[-1]))
    sought = _sought(sorted(waiting), steps[known[0]], steps[known[-1]], found, aim or Aim())

    def worth(gap: tuple[int, int, int, int]) -> tuple[float, int]:
        i, j, middle, distance = gap
        first, last = steps[max(i, 0)], steps[min(j, len(steps) - 1)]
        share = max((share for low, high, share in sought if low < last and high > first), default=ELSEWHERE)
        return (distance * share, middle)

    return steps[max(gaps, key=worth)[2]]


def _sought(
    unmeasured: Sequence[int], first: int, last: int, found: Sequence[Transition], aim: Aim
) -> list[tuple[int, int, float]]:
    """Between which steps another point is worth most, and how much."""
    rises = [t.change.value > 0 for t in found]
    sought = []
    for i, t in enumerate(found):
        for (low, high), other in ((t.start_interval, i - 1), (t.end_interval, i + 1)):
            if low > first and high < last and aim.leaves_open((low, high), unmeasured):
                alike = 0 <= other < len(found) and rises[other] == rises[i]
                sought.append((low, high, SLOWING if alike else 1.0))
    return [*sought, (found[-1].end, unmeasured[-1] + 1, 1.0)] if found else sought


def is_enough(steps: Sequence[int], measured: Collection[int], found: Sequence[Transition], aim: Aim) -> bool:
    """Whether every boundary is known well enough, and no gap is left that a transition could hide in.

    Args:
        steps: of the series, increasing.
        measured: those that are measured, or can't be.
        found: the transitions of the points.
        aim: how well boundaries have to be known.
    """
    unmeasured = [step for step in steps if step not in measured]
    if any(aim.leaves_open(interval, unmeasured) for interval in boundaries(found)):
        return False
    ranks = [-1, *(i for i, step in enumerate(steps) if step in measured), len(steps)]
    return max(b - a for a, b in pairwise(ranks)) <= max(WIDEST * len(steps), 1)
