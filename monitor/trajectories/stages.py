"""The monotone stages of a curve between its milestones, and the intervals of their boundaries. numpy alone."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from phasewatch.monitor.trajectories.smoothing import UNKNOWN, Curve

SLOWED = 0.5
"""Two stages of one direction are separate if the slope between them falls below this share of both their peaks.

With 0.3, 4 % of the simulated stages are lost, and two of the published; with 0.7, 1 % more are found
(experiments/constants.py).
"""

PART = 0.03
"""A part of a stage counts as a stage of its own from this share of the whole change on.

A sixth of it makes no difference; with 0.1, 1 % of the simulated stages are lost (experiments/constants.py).
"""

MAY_SLOW = 0.7
"""A stage may be two stages if its slope falls below this share; its intervals then reach to where it does.

Widens intervals and changes no stage: with 0.5 they hold 0.3 % fewer of the simulated boundaries, with 0.9 0.5 % more
(experiments/constants.py).
"""

CERTAINLY_SLOWER = 1.645
"""Two stages of one direction may be one if the slope between them is not below those of both peaks by this many
standard errors; the intervals of their common boundary then reach over both. 95 % of a normal distribution lie below
it.

Without, 1.18 instead of 0.75 % of the simulated boundaries, and 0.97 instead of 0.75 % of the real ones, leave their
intervals when points are added (experiments/more_points.py).
"""

FLAT = 0.03
"""A plateau lasts while the mean slope from its milestone is below this share of the stage's mean slope.

With a tenth of it, 78 % instead of 86 % of the simulated boundaries lie in their intervals; with 0.1, 87 %
(experiments/constants.py).
"""

MOSTLY = 2 / 3
"""A stage is cut to its jumps if together they make at least this share of its change.

Otherwise a jump is a part of a longer rise, whose start and end are found as those of any other.
"""

DRAWS = 100
"""How many curves are drawn from the posterior for an interval. With 30 the intervals hold 1 % fewer boundaries."""

Interval = tuple[int, int]


@dataclass(frozen=True)
class Segment:
    """A stage as indices into its curve, all inclusive.

    Attributes:
        start: where it begins.
        end: where it is over; a stage may end where the next one starts.
        start_interval: between which two indices `start` lies with 95 % probability.
        end_interval: the same of `end`.
    """

    start: int
    end: int
    start_interval: Interval
    end_interval: Interval


def stages(curve: Curve, holds: Callable[[int, int], bool], surely: Callable[[np.ndarray], bool]) -> list[Segment]:
    """The monotone stages of a curve that hold up, by increasing position.

    Milestones are first the extrema of the curve. The smallest stage that does not hold is absorbed by its neighbours,
    until all hold. Then each stage is split where it slows down between two stretches that hold by themselves, what
    consists mostly of jumps is cut to them, and the plateaus at the two ends of each stage are cut off. The intervals
    come from doing the last again, for each milestone, on curves drawn from the posterior; that of a stage that may be
    two reaches to where the other would begin, and that between two stages that may be one reaches over both. A jump
    has the intervals that it was found with.

    Args:
        curve: the smoothed series.
        holds: whether the change between two indices is large and sure enough to count.
        surely: whether a weighted sum of the curve's slopes, weights of shape (point,), is surely above zero.

    Returns:
        The stages, by increasing position.
    """
    holds = functools.cache(holds)  # all but the neighbours of what was absorbed are asked again
    parts = [
        part
        for stage in _monotone(curve.value, holds)
        for piece in _split_at_slow_downs(curve, *stage, holds, surely)
        for part in _cut_to_jumps(curve, *piece, holds)
    ]
    if not parts:
        return []
    z = UNKNOWN * np.random.default_rng(0).normal(size=(DRAWS, curve.value_root.shape[1]))
    z = np.concatenate([np.zeros((1, z.shape[1])), z])  # the first of the draws is the curve itself
    values, slopes = curve.value + z @ curve.value_root.T, curve.slope + z @ curve.slope_root.T
    found = [_that_may_be_two(_segment(curve, values, slopes, parts, k), curve) for k in range(len(parts))]
    return _that_may_be_one(found, [_may_be_one(curve, *pair) for pair in pairwise(parts)])


def _monotone(value: np.ndarray, holds: Callable[[int, int], bool]) -> list[tuple[int, int]]:
    rises = np.sign(np.diff(value))
    turns = [i for i in range(1, len(rises)) if rises[i] * rises[i - 1] < 0]
    marks = [0, *turns, len(value) - 1]
    while len(marks) > 1:
        weak = [k for k in range(len(marks) - 1) if not holds(marks[k], marks[k + 1])]
        if not weak:
            break
        k = min(weak, key=lambda k: abs(value[marks[k + 1]] - value[marks[k]]))
        # A weak stage at either end of the series has no second neighbour to join: its outer mark goes alone.
        if k == 0:
            del marks[0]
        elif k == len(marks) - 2:
            del marks[-1]
        else:
            del marks[k : k + 2]
    return list(pairwise(marks))


def _split_at_slow_downs(
    curve: Curve, start: int, end: int, holds: Callable[[int, int], bool], surely: Callable[[np.ndarray], bool]
) -> Iterator[tuple[int, int]]:
    speed, dip = _dips(curve, start, end)
    slowest = 1 + np.flatnonzero((dip[1:-1] <= np.minimum(dip[:-2], dip[2:])) & (dip[1:-1] <= SLOWED))
    for i in slowest[np.argsort(dip[slowest])]:
        middle = start + int(i)
        if _slows_down(curve, speed, start, int(i), surely) and holds(start, middle) and holds(middle, end):
            yield from _split_at_slow_downs(curve, start, middle, holds, surely)
            yield from _split_at_slow_downs(curve, middle, end, holds, surely)
            return
    yield start, end


def _cut_to_jumps(curve: Curve, start: int, end: int, holds: Callable[[int, int], bool]) -> Iterator[tuple[int, int]]:
    """The jumps of a stage, and what else holds and is no plateau beside them; the stage if it isn't mostly jumps."""
    change = curve.value[end] - curve.value[start]

    def share(first: int, last: int) -> float:
        return float((curve.value[last] - curve.value[first]) / change)

    def slope(first: int, last: int) -> float:
        return share(first, last) / float(curve.x[last] - curve.x[first])

    jumps = [(jump.start, jump.end) for jump in curve.jumps if start <= jump.start and jump.end <= end]
    jumps = [jump for jump in jumps if share(*jump) > 0 and holds(*jump)]
    if sum(share(*jump) for jump in jumps) < MOSTLY:
        yield start, end
        return
    least = FLAT * min(slope(*jump) for jump in jumps)
    for part in pairwise([start, *(boundary for jump in jumps for boundary in jump), end]):
        if part in jumps or (part[0] < part[1] and slope(*part) >= least and holds(*part)):
            yield part


def _dips(curve: Curve, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """The slope along a stage, in its direction, and as a share of the lower of the peaks before and after.

    The share is infinite where too little of the stage's change lies to one side.
    """
    value = curve.value[start : end + 1]
    speed = curve.slope[start : end + 1] * np.sign(value[-1] - value[0])
    before, after = np.maximum.accumulate(speed), np.maximum.accumulate(speed[::-1])[::-1]
    dip = speed / np.minimum(before, after).clip(min=1e-9 * np.abs(speed).max())
    parts = np.minimum(np.abs(value - value[0]), np.abs(value - value[-1]))
    return speed, np.where(parts >= PART * abs(value[-1] - value[0]), dip, np.inf)


def _slows_down(curve: Curve, speed: np.ndarray, start: int, dip: int, surely: Callable[[np.ndarray], bool]) -> bool:
    """Whether the mean slope around a dip of the speed is surely less than those around the peaks on both its sides.

    "Around" is the stretch where the speed is nearer to that of the dip, or of the peak. The mean over a stretch is
    known far better than the slope at a point.
    """
    sign = np.sign(speed @ curve.slope[start : start + len(speed)])
    for peak in (int(np.argmax(speed[: dip + 1])), dip + int(np.argmax(speed[dip:]))):
        nearer_the_peak = speed > (speed[peak] + speed[dip]) / 2
        slow, fast = (_mean_slope(curve.x, *(start + j for j in _run(nearer_the_peak, k))) for k in (dip, peak))
        if not surely(sign * (fast - slow)):
            return False
    return True


def _run(flags: np.ndarray, i: int) -> tuple[int, int]:
    """First and last index of the run of equal flags that contains i."""
    other = np.flatnonzero(flags != flags[i])
    before, after = other[other < i], other[other > i]
    return (int(before[-1]) + 1 if len(before) else 0), (int(after[0]) - 1 if len(after) else len(flags) - 1)


def _mean_slope(x: np.ndarray, first: int, last: int) -> np.ndarray:
    """The weights, shape (point,), that make a mean of the slopes at some points."""
    weights = np.zeros(len(x))
    if first == last:
        weights[first] = 1
    else:
        gaps = np.diff(x[first : last + 1])
        weights[first : last + 1] = (np.append(gaps, 0) + np.append(0, gaps)) / (2 * (x[last] - x[first]))
    return weights


def _segment(curve: Curve, values: np.ndarray, slopes: np.ndarray, parts: list[tuple[int, int]], k: int) -> Segment:
    """A stage without the plateaus at its two ends, with intervals from the same on each of the drawn curves.

    A jump has the intervals that it was found with.

    Args:
        curve: of which it is a stage.
        values: the curve, then draws of it, shape (curve, point).
        slopes: their derivatives, shape (curve, point).
        parts: the stages between milestones, as (start, end).
        k: which of them.
    """
    x, n, (start, end) = curve.x, len(curve.x), parts[k]
    jump_starts = {jump.start: jump.start_interval for jump in curve.jumps}
    jump_ends = {jump.end: jump.end_interval for jump in curve.jumps}
    fixed = jump_starts.keys() | jump_ends.keys()
    first, last = np.full(len(values), start), np.full(len(values), end)
    if k > 0 and parts[k - 1][1] == start and start not in fixed:
        first = _milestone(values, slopes, parts[k - 1], parts[k])
    if k + 1 < len(parts) and parts[k + 1][0] == end and end not in fixed:
        last = _milestone(values, slopes, parts[k], parts[k + 1])
    starts = _off_the_plateau(x, values, first, end)
    # The same, seen from the other end
    ends = n - 1 - _off_the_plateau(-x[::-1], values[:, ::-1], n - 1 - last, n - 1 - start)
    found = Segment(int(starts[0]), max(int(ends[0]), int(starts[0]) + 1), _interval(starts, n), _interval(ends, n))
    if start in jump_starts:
        found = replace(found, start=start, start_interval=_and_the_next(*jump_starts[start], n))
    if end in jump_ends:
        found = replace(found, end=end, end_interval=_and_the_next(*jump_ends[end], n))
    return found


def _that_may_be_two(stage: Segment, curve: Curve) -> Segment:
    """Extend the intervals of a stage that slows down, but too little or too unsurely to be split, to where it does.

    The larger of the two parts is taken for the stage, so that the smaller one, before or after it, extends the
    interval of the start or of the end.
    """
    value = curve.value[stage.start : stage.end + 1]
    slow = np.flatnonzero(_dips(curve, stage.start, stage.end)[1] <= MAY_SLOW)
    early = np.abs(value[slow] - value[0]) < np.abs(value[slow] - value[-1])
    starts, ends = stage.start + slow[early], stage.start + slow[~early]
    (first, latest), (earliest, last) = stage.start_interval, stage.end_interval
    return replace(
        stage,
        start_interval=(first, int(max([latest, *starts]))),
        end_interval=(int(min([earliest, *ends])), last),
    )


def _may_be_one(curve: Curve, before: tuple[int, int], after: tuple[int, int]) -> bool:
    """Whether two parts that meet rise, or fall, both, and don't certainly slow down between."""
    (start, middle), (other, end) = before, after
    if any(middle in (jump.start, jump.end) for jump in curve.jumps):
        return False
    changes = np.diff(curve.value[[start, middle, end]])
    if middle != other or changes[0] * changes[1] < 0:
        return False

    def certainly(weights: np.ndarray) -> bool:
        error = UNKNOWN * np.linalg.norm(weights @ curve.slope_root)
        return bool(weights @ curve.slope > CERTAINLY_SLOWER * error)

    speed = curve.slope[start : end + 1] * np.sign(changes[0])
    return not _slows_down(curve, speed, start, middle - start, certainly)


def _that_may_be_one(found: list[Segment], may_be_one: list[bool]) -> list[Segment]:
    """Extend the intervals of the boundaries between neighbours that may be one to where both start and end."""
    found = list(found)
    for k in range(len(may_be_one)):
        if may_be_one[k]:
            first, last = found[k].start_interval[0], found[k + 1].start_interval[1]
            found[k + 1] = replace(found[k + 1], start_interval=(first, last))
    for k in reversed(range(len(may_be_one))):
        if may_be_one[k]:
            first, last = found[k].end_interval[0], found[k + 1].end_interval[1]
            found[k] = replace(found[k], end_interval=(first, last))
    return found


def _milestone(values: np.ndarray, slopes: np.ndarray, before: tuple[int, int], after: tuple[int, int]) -> np.ndarray:
    """Where two stages meet, shape (curve,): the extremum between their middles, or the slowest between their peaks."""
    rise = np.sign(np.diff(values[0][[*before, *after]])[[0, 2]])
    if rise[0] != rise[1]:
        lo, hi = (_halfway(values[0], *part) for part in (before, after))
        return lo + np.argmax(rise[0] * values[:, lo : hi + 1], axis=1)
    speed = rise[0] * slopes[0]
    lo = before[0] + int(np.argmax(speed[before[0] : before[1] + 1]))
    hi = after[0] + int(np.argmax(speed[after[0] : after[1] + 1]))
    return lo + np.argmin(np.abs(slopes[:, lo : hi + 1]), axis=1)


def _halfway(value: np.ndarray, start: int, end: int) -> int:
    half = (value[start] + value[end]) / 2
    return start + int(np.argmin(np.abs(value[start : end + 1] - half)))


def _off_the_plateau(x: np.ndarray, values: np.ndarray, milestone: np.ndarray, end: int) -> np.ndarray:
    """The last index, up to the middle of the stage that ends at `end`, that lies on the milestone's plateau."""
    rows = np.arange(len(values))
    at = values[rows, milestone]
    whole, length = np.abs(values[:, end] - at), np.maximum(x[end] - x[milestone], 1e-300)
    change, distance = np.abs(values - at[:, None]), x - x[milestone][:, None]
    i = np.arange(len(x))
    flat = (change * length[:, None] <= FLAT * whole[:, None] * distance) & (i >= milestone[:, None]) & (i < end)
    return np.where(flat.any(axis=1), len(x) - 1 - np.argmax(flat[:, ::-1], axis=1), milestone)


def _interval(indices: np.ndarray, n: int) -> Interval:
    """95 % of the draws, and up to the next points, since a boundary may lie between two."""
    low, high = np.quantile(indices[1:], [0.025, 0.975])
    low, high = min(low, indices[0]), max(high, indices[0])
    return _and_the_next(int(np.floor(low)), int(np.ceil(high)), n)


def _and_the_next(low: int, high: int, n: int) -> Interval:
    return max(low - 1, 0), min(high + 1, n - 1)
