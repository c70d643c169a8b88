"""Forecasts from several known scores of a model, such as other benchmarks, in place of one axis."""

import numpy as np
from scipy.optimize import least_squares
from scipy.special import expit, logit

from phasewatch.monitor.emergence.curves import direct_law
from phasewatch.monitor.errors import PhasewatchError

FEWEST = 8
"""Fewer models than this don't tell a direction among several scores."""

SHRINKAGE = 0.3
"""Standard deviations of the score that a column's weight may differ from the others' mean weight at the cost of one
point's error of as much. Chosen on tasks held out below a threshold of compute."""

SCATTER = 0.03
"""The least standard deviation between models of equal scores."""


def forecast_of_columns(
    x: np.ndarray, sharp: np.ndarray, at: np.ndarray, chance: float
) -> tuple[np.ndarray, np.ndarray]:
    """The sharp score by two curves of the columns (after Ruan et al. 2024, arXiv 2405.10938).

    One is the direct law along a single direction, in which each column counts by its correlation with the sharp score
    (the first step of partial least squares); one is a logistic curve from chance to 1 with a weight for each column,
    held near their mean. A missing value is the mean of the model's others.

    Args:
        x: shape (model, column), NaN where missing.
        sharp: shape (model,).
        at: shape (target, column), NaN where missing.
        chance: the sharp score of a guess.

    Returns:
        Mean and standard deviation, shape (target,).

    Raises:
        PhasewatchError: if there are fewer than eight models, or a column has no spread.
    """
    if len(x) < FEWEST:
        raise PhasewatchError(f"forecast(x=...) with several columns takes at least {FEWEST} models; {len(x)} came.")
    known = ~np.isnan(x)
    if (known.sum(axis=0) < 2).any() or not np.isfinite(x[known]).all():
        raise PhasewatchError("forecast(x=...) has a column with fewer than two finite values; leave it out.")
    centre, scale = np.nanmean(x, axis=0), np.nanstd(x, axis=0)
    if (scale == 0).any():
        raise PhasewatchError("forecast(x=...) has a column whose values are all equal; leave it out.")
    z, later = _filled((x - centre) / scale), _filled((at - centre) / scale)
    target = logit(np.clip(sharp, 0.02, 0.98))
    along = z.T @ (target - target.mean()) / (np.maximum(np.linalg.norm(z - z.mean(axis=0), axis=0), 1e-12))
    weights = np.maximum(along, 0.0)
    if not weights.any():
        weights = np.ones(z.shape[1])
    weights = weights / weights.sum()
    direction, ahead = z @ weights, later @ weights
    both = np.concatenate([direction, ahead])
    single = direct_law(direction, sharp, both)
    several = _ridge(z, sharp, np.concatenate([z, later]), chance)
    mean = (single + several) / 2
    n = len(sharp)
    noise = max(float(np.std(mean[:n] - sharp)), SCATTER)
    lag = float(np.std(direction)) * np.sqrt(max(1 - np.corrcoef(direction, target)[0, 1] ** 2, 0.0))
    sooner, later_on = (direct_law(direction, sharp, ahead + shift) for shift in (lag, -lag))
    spread = (single - several)[n:] / 2
    return np.clip(mean[n:], 0, 1), np.sqrt(noise**2 + spread**2 + ((sooner - later_on) / 2) ** 2)


def _filled(z: np.ndarray) -> np.ndarray:
    """With the mean of a row's known values where one is missing, and 0 in a row without any."""
    known = ~np.isnan(z)
    mean = np.where(known, z, 0.0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    return np.where(known, z, mean[:, None])


def _ridge(z: np.ndarray, sharp: np.ndarray, at: np.ndarray, chance: float) -> np.ndarray:
    def residuals(free: np.ndarray) -> np.ndarray:
        fit = chance + (1 - chance) * expit(free[0] + z @ free[1:]) - sharp
        return np.concatenate([fit, SHRINKAGE * (free[1:] - free[1:].mean())])

    start = np.concatenate([[-2.0], np.full(z.shape[1], 1.0 / z.shape[1])])
    free = least_squares(residuals, start, max_nfev=300).x
    return chance + (1 - chance) * expit(free[0] + at @ free[1:])
