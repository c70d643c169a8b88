"""What tells a jump of the metric from one of the model: numbers of the two curves' shapes."""

import numpy as np
from scipy.optimize import isotonic_regression

from phasewatch.monitor.emergence.links import fit_link, perfect_value
from phasewatch.monitor.trajectories.trajectory import Trajectory
from phasewatch.monitor.trajectories.transitions import find_transitions

WINDOW = 0.1
"""A jump is the part of a score's change that lies within this share of the axis."""

GRID = 200
"""Places along the axis at which monotone fits are compared."""

STEPS, DECADES = 1e5, 3.0
"""`find_transitions` reads whole steps on a logarithmic scale: the axis becomes steps that start at the first
number and span this many decades. Points less than 1.5e-6 of the axis apart count as one."""

SLOWEST = 0.02
"""Added to shares of the axis and of the change, so that a share of 0 has a logarithm: about the resolution of 50
points."""


def features(u: np.ndarray, sharp: np.ndarray, smooth: np.ndarray, chance: float) -> np.ndarray:
    """The numbers from which a verdict is made.

    Args:
        u: positions, shape (point,), increasing.
        sharp: shape (point,).
        smooth: shape (point,).
        chance: the sharp score of a guess.

    Returns:
        Shape (11,): the sharp score's jump (the largest share of its change within a tenth of the axis) and change (on
        the scale from chance to 1, and in standard deviations of its noise); the smooth score's jump, the share of its
        change within the sharp one's rise against the share of the axis that the rise takes, and its change in
        standard deviations of its noise; how steep the link between them is, how far it misses the points in the
        noise's standard deviations, and how much of the smooth score's course is left after the rise; and the two
        scores' `transition_speed`.
    """
    z = (u - u[0]) / max(float(u[-1] - u[0]), 1e-12)
    grid = np.linspace(0, 1, GRID)
    sharp_fit, smooth_fit = monotone(z, sharp, grid), monotone(z, smooth, grid)
    change, smooth_change = sharp_fit[-1] - sharp_fit[0], smooth_fit[-1] - smooth_fit[0]
    noise, smooth_noise = scatter(sharp), scatter(smooth)
    low, high = rise(sharp_fit)
    width = max(high - low, 1.5 / len(u))
    inside = abs(np.interp(high, grid, smooth_fit) - np.interp(low, grid, smooth_fit)) / max(abs(smooth_change), 1e-12)
    after = abs(smooth_fit[-1] - np.interp(high, grid, smooth_fit)) / max(abs(smooth_change), 1e-12)
    link = fit_link(smooth, sharp, chance, perfect_value(smooth, sharp))
    if link.perfect is None:
        steep = np.log(abs(link.shape) * max(float(np.ptp(smooth)), 1e-9) / 10 + 1e-3)
    else:
        steep = link.shape
    shapes = np.array(
        [
            jump(sharp_fit, grid),
            np.clip(change / (1 - chance), -1, 1),
            np.log(abs(change) / noise + 0.1),
            jump(smooth_fit, grid),
            np.log((inside + 0.02) / (width + 0.02)),
            np.log(abs(smooth_change) / smooth_noise + 0.1),
            np.clip(steep, -3, 4),
            np.log(link.error / noise + 0.1),
            after,
        ]
    )
    return np.append(shapes, [transition_speed(z, sharp), transition_speed(z, smooth)])


def transition_speed(u: np.ndarray, score: np.ndarray) -> float:
    """How steep the steepest transition is that `find_transitions` finds in a score.

    Args:
        u: positions, shape (point,), increasing.
        score: shape (point,).

    Returns:
        The logarithm of how much faster than a straight line it goes; 0 without a transition.

    >>> z = np.linspace(0, 1, 40)
    >>> round(transition_speed(z, z), 1), round(transition_speed(z, 1 / (1 + np.exp((0.5 - z) / 0.01))), 1)
    (0.0, 1.9)
    """
    z = (u - u[0]) / max(float(u[-1] - u[0]), 1e-12)
    steps, kept = np.unique(np.round(STEPS * np.exp(DECADES * np.log(10) * z)).astype(int), return_index=True)
    trajectory = Trajectory.from_values(steps, loss=np.zeros(len(steps)), llc=score[kept])
    span = max(float(np.ptp(score)), 1e-12)
    speeds = []
    for found in find_transitions(trajectory):
        start, end = np.interp([found.start, found.end], steps, z[kept])
        speeds.append(float(np.log((abs(found.change.value) / span + SLOWEST) / (end - start + SLOWEST))))
    return max(speeds, default=0.0)


def monotone(z: np.ndarray, score: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The monotone fit of a score, in the direction that fits it better, at places of the axis."""
    fits = [isotonic_regression(score, increasing=up).x for up in (True, False)]
    best = min(fits, key=lambda fit: float(np.sum((fit - score) ** 2)))
    return np.interp(grid, z, best)


def jump(fit: np.ndarray, grid: np.ndarray) -> float:
    """The largest share of a monotone curve's change within `WINDOW` of the axis."""
    total = abs(fit[-1] - fit[0])
    if total < 1e-12:
        return 0.0
    ahead = np.interp(np.minimum(grid + WINDOW, 1), grid, fit)
    return float(np.abs(ahead - fit).max() / total)


def rise(fit: np.ndarray) -> tuple[float, float]:
    """Where a monotone curve has made a tenth and nine tenths of its change, as shares of the axis."""
    total = fit[-1] - fit[0]
    if abs(total) < 1e-12:
        return 0.0, 1.0
    done = (fit - fit[0]) / total
    n = len(fit) - 1
    return float(np.argmax(done >= 0.1)) / n, float(np.argmax(done >= 0.9)) / n


def scatter(score: np.ndarray) -> float:
    """The noise of a score from its second differences, at least 0.003 of its range and never 0."""
    off = score[1:-1] - (score[:-2] + score[2:]) / 2
    return max(float(np.sqrt(np.median(off**2) / 0.455 / 1.5)), 0.003 * float(np.ptp(score)), 1e-6)
