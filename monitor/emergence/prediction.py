"""A forecast's mean and doubt at positions along an axis."""

import numpy as np

from phasewatch.monitor.emergence.curves import logistic_law, mean_and_spread

FEWEST_BACKTEST = 6
"""A backtest hides the end of the points only as long as this many are left."""

CUTS = (0.4, 0.5, 0.6, 0.7, 0.8)
"""The shares of the points from which backtests forecast the others."""

GROWTH = 0.6
"""The variance of a forecast grows with the distance by this share of what the backtests show. Their fits have fewer
points than the forecast's own. Chosen by the coverage on ladders of one recipe and on public models."""

DRIFT = 0.03
"""A law is off by this much (one standard deviation) at a distance of one span of the points, and in proportion beyond:
few points can agree by chance, and what they all miss shows only far away. Chosen by the coverage on ladders from 8
models on, along compute."""

LOSS_DRIFT = 0.06
"""The same along a loss, where all laws miss on one side: a score speeds up as the loss comes near its floor. Chosen by
the coverage of the larger ones of a ladder up to 1B from its 8 to 12 smaller ones; it holds for 3B and 7B as well."""

SCATTER = 0.01
"""The least standard deviation of an accuracy between runs of one recipe; that of repeated small ladders."""

LAG = 0.3
"""Where the smooth score isn't trusted, models of one x may be ahead or behind by this share of the span of the points,
as one standard deviation. Chosen by the coverage on public models of different families."""

WIDEST = 4.0
"""Between the points, the mean is over a tenth of them on both sides where the noise's variance is at least 1/4 of the
score's, and over fewer where it is less; over none where the points lie on a curve."""


def predict(
    u: np.ndarray, sharp: np.ndarray, smooth: np.ndarray | None, at: np.ndarray, chance: float, *, is_loss: bool
) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean and standard deviation of the sharp score at positions, and the trust in the smooth score.

    Args:
        u: positions, shape (point,), not decreasing.
        sharp: shape (point,).
        smooth: shape (point,) or (point, column), or None.
        at: positions, shape (target,). Up to the last point the running mean of the points is interpolated.
        chance: the sharp score of a guess.
        is_loss: whether the axis is a falling loss.

    Returns:
        Mean and standard deviation, shape (target,), and the trust.
    """
    span = float(u[-1] - u[0])
    distance = np.maximum(at - u[-1], 0.0)
    mean, spread, trust = mean_and_spread(u, sharp, smooth, at, chance)
    noise = max(_noise(u, sharp), SCATTER)
    lag = (1 - trust) * LAG * span
    behind, ahead = (logistic_law(u, sharp, at + shift, chance) for shift in (-lag, lag)) if lag > 0 else (mean, mean)
    growth = GROWTH * _growth(u, sharp, smooth, chance)
    variance = (
        noise**2
        + growth * distance
        + ((LOSS_DRIFT if is_loss else DRIFT) * distance / max(span, 1e-12)) ** 2
        + spread**2
        + ((ahead - behind) / 2) ** 2
    )
    scattered = min(1.0, WIDEST * noise**2 / max(float(np.var(sharp)), 1e-12))
    half = round(scattered * len(u) / 10)
    inside = at <= u[-1]
    mean = np.where(inside, np.interp(at, u, _running_mean(sharp, half)), mean)
    variance = np.where(inside, noise**2, variance)
    return np.clip(mean, 0, 1), np.sqrt(variance), trust


def _growth(u: np.ndarray, sharp: np.ndarray, smooth: np.ndarray | None, chance: float) -> float:
    """The variance of a forecast per unit of distance, from forecasts of later points by earlier ones."""
    ratios = []
    span = float(u[-1] - u[0])
    for share in CUTS:
        cut = round(share * len(u))
        if cut < FEWEST_BACKTEST or cut >= len(u):
            continue
        earlier = None if smooth is None else smooth[:cut]
        mean, _, _ = mean_and_spread(u[:cut], sharp[:cut], earlier, u[cut:], chance)
        ratios.append((mean - sharp[cut:]) ** 2 / (u[cut:] - u[cut - 1] + span / 40))
    if not ratios:
        return SCATTER / max(span, 1e-12)
    return float(np.median(np.concatenate(ratios))) / 0.455  # the median of a squared normal value


def _noise(u: np.ndarray, sharp: np.ndarray) -> float:
    """The standard deviation of points around the line between their neighbours."""
    width = np.maximum(u[2:] - u[:-2], 1e-12)
    share = (u[1:-1] - u[:-2]) / width
    off = sharp[1:-1] - (1 - share) * sharp[:-2] - share * sharp[2:]
    return float(np.sqrt(np.mean(off**2 / (1 + share**2 + (1 - share) ** 2))))


def _running_mean(values: np.ndarray, half: int) -> np.ndarray:
    """The mean over as many neighbours on both sides, fewer towards the ends so that they stay centred."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    i = np.arange(len(values))
    reach = np.minimum(half, np.minimum(i, len(values) - 1 - i))
    return (total[i + reach + 1] - total[i - reach]) / (2 * reach + 1)
