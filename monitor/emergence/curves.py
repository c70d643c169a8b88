"""How scores go on along an axis: the curves that a forecast is made of. Positions increase from early to late."""

import numpy as np
from scipy.optimize import least_squares
from scipy.special import expit

from phasewatch.monitor.emergence.links import fit_link, perfect_value

RATES = np.concatenate([[0.01], np.geomspace(0.1, 12.0, 16)])
"""Rates at which a smooth score's gap may shrink, in 1 / the span of the points. The first is all but a straight line;
the last is over within a quarter of the span."""

TAIL = 3
"""The direct law of an axis is fitted to the last 1/TAIL of the points, at least `FEWEST_TAIL`: an accuracy follows it
only once it is off chance. Chosen on small ladders held against the next size."""

FEWEST_TAIL = 6

OUTLYING = 0.05
"""An accuracy farther than this from the logistic curve counts as an outlier, such as a small model trained on far more
tokens than others of its compute. Chosen with and without such models."""

TRUSTED = (0.4, 0.8)
"""Below the first share of variance explained the smooth score has no say in a forecast, above the second it has all
that it can have. The share is that of the axis in the smooth score times that of the smooth score in the sharp one.
Chosen between public models, where families scatter (0.1 to 0.4 before a jump), and ladders of one recipe (above
0.9)."""


def explained(values: np.ndarray, fitted: np.ndarray) -> float:
    """The share of variance that a fit explains, between 0 and 1, for shape (point,)."""
    total = float(np.sum((values - values.mean()) ** 2))
    return max(0.0, 1 - float(np.sum((values - fitted) ** 2)) / total) if total > 0 else 0.0


def direct_law(u: np.ndarray, sharp: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The accuracy by -log(accuracy) as a power law of the axis (Krajewski et al. 2025, arXiv 2512.08894).

    Args:
        u: positions, shape (point,), increasing.
        sharp: accuracy, shape (point,).
        at: positions to predict, shape (target,).

    Returns:
        Accuracy, shape (target,); it never falls.
    """
    y = np.log(-np.log(np.clip(sharp, 0.01, 0.99)))
    spread = float(np.sum((u - u.mean()) ** 2))
    slope = min(float(np.sum((u - u.mean()) * y)) / spread, 0.0) if spread > 0 else 0.0
    return np.exp(-np.exp(np.clip(y.mean() + slope * (at - u.mean()), -50, 50)))


def logistic_law(u: np.ndarray, sharp: np.ndarray, at: np.ndarray, chance: float) -> np.ndarray:
    """The accuracy by a logistic curve from chance to 1, fitted robustly; shapes as in `direct_law`."""
    centre, scale = float(u.mean()), float(u.std()) or 1.0
    z = (u - centre) / scale

    def residuals(free: np.ndarray) -> np.ndarray:
        return chance + (1 - chance) * expit(free[0] + free[1] * z) - sharp

    robust = {"loss": "soft_l1", "f_scale": OUTLYING, "max_nfev": 200}
    fits = (least_squares(residuals, start, **robust) for start in ((-2.0, 1.0), (-4.0, 3.0), (-1.0, 0.3)))
    intercept, slope = min(fits, key=lambda found: found.cost).x
    return chance + (1 - chance) * expit(intercept + max(float(slope), 0.0) * (at - centre) / scale)


def smooth_law(u: np.ndarray, smooth: np.ndarray, at: np.ndarray, perfect: float | None) -> np.ndarray:
    """A smooth score by its gap as rest + amount * exp(-rate * u), a power law where u is a logarithm.

    With a perfect value, the gap is the distance to it and the rest is at least 0. For each of the rates, amount and
    rest follow by least squares, weighted twice against outliers; the best rate counts.

    Args:
        u: positions, shape (point,), increasing.
        smooth: shape (point,) or (point, column), each column by itself.
        at: positions to predict, shape (target,).
        perfect: the score's perfect value, if it has one.

    Returns:
        Shape (target,) or (target, column).
    """
    columns = smooth[:, None] if smooth.ndim == 1 else smooth
    sign = -1.0 if perfect is not None and perfect >= columns.max() else 1.0
    gap = sign * (columns - (perfect or 0.0))
    span = float(u[-1] - u[0]) or 1.0
    fading = np.exp(-RATES[:, None] * (u - u[0]) / span)  # (rate, point)
    later = np.exp(-RATES[:, None] * (at - u[0]) / span)
    weights = np.ones_like(gap)
    predicted = np.zeros((len(at), gap.shape[1]))
    for _ in range(3):
        rest, amount = _amounts(fading, gap, weights, floor=perfect is not None)
        fitted = rest[:, None, :] + amount[:, None, :] * fading[:, :, None]
        off = np.abs(gap - fitted)
        best = np.argmin((weights * off**2).sum(axis=1), axis=0)
        column = np.arange(gap.shape[1])
        residual = off[best, :, column].T
        predicted = rest[best, column] + amount[best, column] * later[best].T
        typical = 1.5 * np.median(residual, axis=0) + 1e-12
        weights = np.minimum(1.0, typical / np.maximum(residual, 1e-12))
    predicted = (perfect or 0.0) + sign * predicted
    return predicted[:, 0] if smooth.ndim == 1 else predicted


def _amounts(fading: np.ndarray, gap: np.ndarray, weights: np.ndarray, *, floor: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rest and amount for each rate and column, both of shape (rate, column)."""
    total = weights.sum(axis=0)
    mean_f = fading @ weights / total
    mean_g = (weights * gap).sum(axis=0) / total
    both = fading @ (weights * gap) / total
    squares = fading**2 @ weights / total
    amount = (both - mean_f * mean_g) / np.maximum(squares - mean_f**2, 1e-15)
    rest = mean_g - amount * mean_f
    if floor:
        through_zero = both / np.maximum(squares, 1e-15)
        amount, rest = np.where(rest < 0, through_zero, amount), np.maximum(rest, 0.0)
    return rest, amount


def through_smooth(
    u: np.ndarray, sharp: np.ndarray, smooth: np.ndarray, at: np.ndarray, chance: float
) -> tuple[np.ndarray, float]:
    """The sharp score by the smooth one's own course and a link between the two.

    Args:
        u: positions, shape (point,), increasing.
        sharp: shape (point,).
        smooth: shape (point,) or (point, column).
        at: positions to predict, shape (target,).
        chance: the sharp score of a guess.

    Returns:
        The sharp score, shape (target,), and how far the smooth score is to be trusted, between 0 and 1.
    """
    perfect = perfect_value(smooth, sharp)
    link = fit_link(smooth, sharp, chance, perfect)
    course = smooth_law(u, smooth, np.concatenate([u, at]), perfect)
    known, later = course[: len(u)], course[len(u) :]
    level, fitted = (smooth, known) if smooth.ndim == 1 else (smooth.mean(axis=1), known.mean(axis=1))
    share = explained(level, fitted) * explained(sharp, link(smooth))
    return link(later), float(np.clip((share - TRUSTED[0]) / (TRUSTED[1] - TRUSTED[0]), 0, 1))


def mean_and_spread(
    u: np.ndarray, sharp: np.ndarray, smooth: np.ndarray | None, at: np.ndarray, chance: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """The weighted mean of the laws, how far they disagree, and the trust in the smooth score.

    The direct law counts once, the way through the smooth score as often as it is trusted, and the logistic law twice
    as often as it isn't: before a jump, the ends at chance and 1 say more than any trend. Without a smooth score, how
    well the logistic law explains the points takes the place of the trust.

    Args:
        u: positions, shape (point,), increasing.
        sharp: shape (point,).
        smooth: shape (point,) or (point, column), or None.
        at: positions to predict, shape (target,).
        chance: the sharp score of a guess.

    Returns:
        The mean and the standard deviation between the laws, shape (target,), and the trust between 0 and 1.
    """
    tail = max(FEWEST_TAIL, len(u) // TAIL)
    laws = [direct_law(u[-tail:], sharp[-tail:], at)]
    if smooth is None:
        share = explained(sharp, logistic_law(u, sharp, u, chance))
        trust, weights = float(np.clip((share - TRUSTED[0]) / (TRUSTED[1] - TRUSTED[0]), 0, 1)), [1.0]
    else:
        through, trust = through_smooth(u, sharp, smooth, at, chance)
        laws, weights = [*laws, through], [1.0, trust]
    if trust < 1:
        laws, weights = [*laws, logistic_law(u, sharp, at, chance)], [*weights, 2 * (1 - trust)]
    shares = np.array(weights) / np.sum(weights)
    mean = shares @ np.array(laws)
    return mean, np.sqrt(shares @ (np.array(laws) - mean) ** 2), trust
