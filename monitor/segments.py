"""Smoothing a series against log step, and the monotone stages between its milestones. numpy and scipy alone."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.linalg import eigh

MOST_KNOTS = 80
"""A series of more points than this gets this many knots, so that a fit takes milliseconds."""

SLOWED = 0.5
"""Two stages of one sign are separate when the slope between them falls below this share of both their peaks."""

PART = 0.1
"""... and each of them makes up at least this share of the change."""

FLAT = 0.01
"""A plateau lasts while the mean slope to the milestone in it is below this share of the stage's peak slope."""

IDLE = 0.05
"""The first stage starts after the slow part, at most this share of it, that came before."""


def log_steps(steps: np.ndarray) -> np.ndarray:
    """Training steps as positions on a log axis.

    Step 0 lies one first gap before the first positive step, so that counting steps in another unit (thousands, tokens)
    shifts all positions alike; log(step + 1) would not.

    Args:
        steps: training steps, shape (point,), strictly increasing, not negative.

    Returns:
        Positions, shape (point,), strictly increasing.
    """
    steps = np.asarray(steps, dtype=float)
    positive = np.log(steps[steps > 0])
    if len(positive) == len(steps):
        return positive
    if len(positive) == 0:
        return np.zeros(len(steps))
    gap = positive[1] - positive[0] if len(positive) > 1 else 1.0
    return np.concatenate([[positive[0] - gap], positive])


@dataclass(frozen=True)
class Curve:
    """A series without its noise, and how well it is known.

    Attributes:
        x: positions, shape (point,).
        value: the smoothed series, shape (point,).
        slope: its derivative by position, shape (point,).
        noise: standard deviation of one observation around the curve.
        freedom: effective degrees of freedom, from 2 (a straight line) to the number of points (no smoothing).
        value_root: R with R Rᵀ the posterior covariance of `value`, shape (point, knot).
        slope_root: the same of `slope`.
    """

    x: np.ndarray
    value: np.ndarray
    slope: np.ndarray
    noise: float
    freedom: float
    value_root: np.ndarray
    slope_root: np.ndarray

    def change_error(self, start: int, end: int) -> float:
        """Standard error of `value[end] - value[start]`."""
        return float(np.linalg.norm(self.value_root[end] - self.value_root[start]))

    def slope_change_error(self, start: int, end: int) -> float:
        """Standard error of `slope[end] - slope[start]`."""
        return float(np.linalg.norm(self.slope_root[end] - self.slope_root[start]))


def smooth(x: np.ndarray, y: np.ndarray) -> Curve:
    """The cubic smoothing spline of a series, its stiffness chosen by restricted maximum likelihood.

    The spline minimises Σ(y − f)² + ρ·∫f″², which is the posterior mean of f under a prior of independent curvature;
    ρ maximises the likelihood of the data with the straight line integrated out (Wahba 1985). Cross-validation follows
    noise more often. In the basis that diagonalises both terms every ρ costs O(knots).

    Args:
        x: positions, shape (point,), strictly increasing, at least three.
        y: observations, shape (point,), finite.

    Returns:
        The curve at the same positions.
    """
    n = len(x)
    knots = _knots(x)
    spline = CubicSpline(knots, np.eye(len(knots)), bc_type="natural")
    basis, basis_slope, bend = spline(x), spline(x, 1), spline(knots, 2)
    gaps = np.diff(knots)
    mass = np.diag(np.append(gaps, 0) + np.append(0, gaps)) / 3 + np.diag(gaps, 1) / 6 + np.diag(gaps, -1) / 6
    roughness, vectors = eigh(bend.T @ mass @ bend, basis.T @ basis)
    roughness = roughness[2:].clip(min=np.finfo(float).tiny)  # the first two are the straight line's
    modes, modes_slope = basis @ vectors, basis_slope @ vectors

    level, scale = float(np.mean(y)), float(np.std(y))
    u = (y - level) / scale if scale > 0 else np.zeros(n)
    z = modes.T @ u
    left_over = max(float(u @ u - z @ z), 0.0)
    rho = np.geomspace(1e-3 / roughness[-1], 1e3 / roughness[0], 100)[:, None]
    kept_out = rho * roughness / (1 + rho * roughness)
    variance = (left_over + kept_out @ z[2:] ** 2) / (n - 2)
    rounding = np.finfo(float).eps ** 2
    best = int(np.argmin((n - 2) * np.log(variance + rounding) - np.log(kept_out).sum(axis=1)))

    shrink = np.concatenate([[1.0, 1.0], 1 - kept_out[best]])
    noise = scale * float(np.sqrt(variance[best]))
    return Curve(
        x=x,
        value=level + scale * modes @ (shrink * z),
        slope=scale * modes_slope @ (shrink * z),
        noise=noise,
        freedom=float(shrink.sum()),
        value_root=noise * modes * np.sqrt(shrink),
        slope_root=noise * modes_slope * np.sqrt(shrink),
    )


def _knots(x: np.ndarray) -> np.ndarray:
    """At most `MOST_KNOTS` of the positions, evenly by index.

    Curvature between positions h apart weighs 1/h³: two snapshots a step apart, late in a long run, would take all the
    digits that the rest needs. Knots closer together than 1/10,000 of the whole are left out.
    """
    chosen = x[np.unique(np.linspace(0, len(x) - 1, min(len(x), MOST_KNOTS)).round().astype(int))]
    knots = [chosen[0]]
    for position in chosen[1:]:
        if position - knots[-1] >= 1e-4 * (x[-1] - x[0]):
            knots.append(position)
    return np.array(knots) if len(knots) > 2 else x[[0, len(x) // 2, -1]]


def wanders(y: np.ndarray) -> bool:
    """Whether neighbours in a series are more alike than in white noise (von Neumann's ratio, at the 5 % level).

    The mean squared difference of neighbours over the variance is 2 ± √(4(n − 2)/(n² − 1)) for independent values, and
    less for anything that moves slowly against the spacing of its points.
    """
    n, around = len(y), y - y.mean()
    spread = float(around @ around)
    if spread == 0:
        return False
    ratio = float(np.sum(np.diff(y) ** 2)) / spread
    return bool((2 - ratio) / np.sqrt(4 * (n - 2) / (n**2 - 1)) > 1.645)


def stages(curve: Curve, holds: Callable[[int, int], bool]) -> list[tuple[int, int]]:
    """The monotone stages of a curve that hold up, by increasing position.

    Milestones are first the extrema of the curve. The smallest stage that does not hold is absorbed by its neighbours,
    until all hold. Then each stage is split where it slows down between two stretches that hold by themselves, and the
    plateaus at its two ends are cut off.

    Args:
        curve: the smoothed series.
        holds: whether the change between two indices is large and sure enough to count.

    Returns:
        (start, end) as indices into the curve, end inclusive; a stage may end where the next one starts.
    """
    parts = [
        part for start, end in _monotone(curve.value, holds) for part in _split_at_slow_downs(curve, start, end, holds)
    ]
    return [_without_plateaus(curve, *part, opens=number == 0) for number, part in enumerate(parts)]


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
    curve: Curve, start: int, end: int, holds: Callable[[int, int], bool]
) -> Iterator[tuple[int, int]]:
    speed = curve.slope[start : end + 1] * np.sign(curve.value[end] - curve.value[start])
    before, after = np.maximum.accumulate(speed), np.maximum.accumulate(speed[::-1])[::-1]
    dip = speed / np.minimum(before, after).clip(min=1e-9 * np.abs(speed).max())
    for i in np.argsort(dip):
        if dip[i] > SLOWED:
            break
        middle = start + int(i)
        peaks = start + int(np.argmax(speed[: i + 1])), middle + int(np.argmax(speed[i:]))
        clear = all(
            abs(curve.slope[peak] - curve.slope[middle]) > 3 * curve.slope_change_error(middle, peak) for peak in peaks
        )
        parts = np.abs(curve.value[[start, end]] - curve.value[middle])
        large = parts.min() >= PART * abs(curve.value[end] - curve.value[start])
        if clear and large and holds(start, middle) and holds(middle, end):
            yield from _split_at_slow_downs(curve, start, middle, holds)
            yield from _split_at_slow_downs(curve, middle, end, holds)
            return
    yield start, end


def _without_plateaus(curve: Curve, start: int, end: int, *, opens: bool) -> tuple[int, int]:
    """Cut the flat ends off a stage.

    A milestone is where the curve itself turns or slows down, so little is flat there. The first stage has none before
    it, and starts when it gets going.
    """
    speed = np.abs(curve.slope[start : end + 1]).max()
    whole = abs(curve.value[end] - curve.value[start])
    length = curve.x[end] - curve.x[start]

    def flat(i: int, milestone: int, *, outermost: bool) -> bool:
        change = abs(curve.value[i] - curve.value[milestone])
        distance = abs(curve.x[i] - curve.x[milestone])
        slow = change <= max(FLAT * speed * distance, curve.change_error(i, milestone))
        idle = change <= IDLE * whole and change / whole <= distance / length / 4
        return slow or (outermost and idle)

    first = max((i for i in range(start, end) if flat(i, start, outermost=opens)), default=start)
    last = min((i for i in range(first + 1, end + 1) if flat(i, end, outermost=False)), default=end)
    return first, last
