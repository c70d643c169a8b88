"""From smooth scores to sharp ones: fitted links, and two that need no fit."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares
from scipy.special import expit, logit

from phasewatch.monitor.emergence.checks import (
    as_numbers,
    check_chance,
    check_log_p,
    check_numbers,
    check_share,
    check_smooth,
)
from phasewatch.monitor.errors import PhasewatchError

FEWEST = 4
"""A link has two fitted numbers; fewer points than this don't say how well it fits."""


@dataclass(frozen=True)
class Link:
    """A curve from a smooth score to a sharp one, through chance at one end and 1 at the other.

    Where the smooth score has a perfect value, the sharp score is 1 there: `chance + (1 - chance) * exp(-a * d**b)`
    with d the distance to the perfect value (0 for a log-likelihood, bits per byte, a loss or a Brier score; 1 for a
    probability). Elsewhere it is a logistic curve. Of a score with a column for each item or group of items, the mean
    over columns is taken after the curve, so that the spread of the items shapes the link.

    Attributes:
        perfect: the value of the smooth score at which the sharp one is 1; None for the logistic curve.
        scale: log a, or the logistic curve's intercept.
        shape: log b, or the logistic curve's slope per unit of the smooth score.
        chance: the sharp score of a guess.
        error: standard deviation of the sharp score around the curve, on the points of the fit.
    """

    perfect: float | None
    scale: float
    shape: float
    chance: float
    error: float

    @classmethod
    def fit(cls, smooth: Any, sharp: Any, *, chance: float | None = None) -> "Link":
        """Fit a link by least squares.

        Args:
            smooth: shape (point,), or (point, column) with a column for each item or group of items.
            sharp: an accuracy or exact match between 0 and 1, shape (point,).
            chance: the sharp score of a guess.

        Returns:
            The link.

        Raises:
            PhasewatchError: if there are fewer than four points, or an argument is not as described.

        >>> import numpy as np
        >>> log_p = np.linspace(-6, -0.5, 12)
        >>> link = Link.fit(log_p, np.exp(-0.3 * (-log_p) ** 1.2), chance=0.0)
        >>> round(float(link(-1.0)), 3)  # exp(-0.3)
        0.741
        """
        call = "Link.fit"
        chance = check_chance(call, chance)
        smooth = check_smooth(call, smooth)
        if len(smooth) < FEWEST:
            raise PhasewatchError(f"{call}(smooth=...) has {len(smooth)} points, and a link takes {FEWEST}.")
        sharp = check_share(call, "sharp", check_numbers(call, "sharp", sharp, shape=(len(smooth),)))
        return fit_link(smooth, sharp, chance, perfect_value(smooth, sharp))

    def __call__(self, smooth: Any) -> np.ndarray:
        """The sharp score at values of the smooth one: shape (point,), or (point, column) if it was fitted so."""
        return _curve(as_numbers("Link", "smooth", smooth), self.perfect, self.scale, self.shape, self.chance)

    def __str__(self) -> str:
        if self.perfect is None:
            form = f"a logistic curve with slope {self.shape:.3g}"
        else:
            form = f"{self.chance:g} + {1 - self.chance:g} exp(-{np.exp(self.scale):.3g} d^{np.exp(self.shape):.3g})"
            form += f", d the distance to {self.perfect:g}"
        return f"The sharp score follows the smooth one as {form}, within {self.error:.3f}."


def perfect_value(smooth: np.ndarray, sharp: np.ndarray) -> float | None:
    """The value of a smooth score at which nothing is left to improve, if its range and direction tell one.

    Args:
        smooth: shape (point,) or (point, column).
        sharp: shape (point,).

    Returns:
        0 for scores that are never positive, and for positive ones that fall while the sharp one rises; 1 for those
        between 0 and 1 that rise with it; else None.
    """
    if (smooth <= 0).all():
        return 0.0
    if (smooth < 0).any():
        return None
    level = smooth if smooth.ndim == 1 else smooth.mean(axis=1)
    together = float(np.sum((level - level.mean()) * (sharp - sharp.mean())))
    if together < 0 or (together == 0 and level[-1] < level[0]):
        return 0.0
    return 1.0 if smooth.max() <= 1 else None


def fit_link(smooth: np.ndarray, sharp: np.ndarray, chance: float, perfect: float | None) -> Link:
    """`Link.fit` of checked arrays."""
    rise = np.clip((sharp - chance) / (1 - chance), 0.02, 0.98)
    level = smooth if smooth.ndim == 1 else smooth.mean(axis=1)
    if perfect is None:
        slope, intercept = _line(level, logit(rise))
        starts = [(intercept, slope)]
    else:
        distance = np.log(np.maximum(np.abs(level - perfect), 1e-9))
        slope, intercept = _line(distance, np.log(-np.log(rise)))
        exponent = float(np.log(np.clip(slope, 0.1, 20.0)))
        centre = float(np.mean(np.log(-np.log(rise)) - np.exp(exponent) * distance))
        starts = [(centre, exponent), (float(-np.mean(distance)), 0.0)]

    def residuals(free: np.ndarray) -> np.ndarray:
        return _curve(smooth, perfect, free[0], free[1], chance) - sharp

    best = min((least_squares(residuals, start, max_nfev=200) for start in starts), key=lambda found: found.cost)
    error = float(np.sqrt(2 * best.cost / max(len(sharp) - 2, 1)))
    return Link(perfect, float(best.x[0]), float(best.x[1]), chance, error)


def _curve(smooth: np.ndarray, perfect: float | None, scale: float, shape: float, chance: float) -> np.ndarray:
    if perfect is None:
        rise = expit(scale + shape * smooth)
    else:
        distance = np.log(np.maximum(np.abs(smooth - perfect), 1e-12))
        rise = np.exp(-np.exp(np.clip(scale + np.exp(np.clip(shape, -3, 4)) * distance, -50, 50)))
    if smooth.ndim == 2:
        rise = rise.mean(axis=1)
    return chance + (1 - chance) * rise


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope and intercept by least squares; flat where all x are equal."""
    spread = float(np.sum((x - x.mean()) ** 2))
    slope = float(np.sum((x - x.mean()) * (y - y.mean())) / spread) if spread > 0 else 0.0
    return slope, float(y.mean() - slope * x.mean())


def choice_accuracy(log_odds: Any) -> float | np.ndarray:
    """The accuracy between two choices from the items' log odds of the right one. Nothing is fitted.

    The ranked answer is right where the log odds are above 0; a tie is right half of the time.

    Args:
        log_odds: log p(right) - log p(wrong), shape (item,) or (step, item).

    Returns:
        The share of right items; shape (step,) for two axes.

    Raises:
        PhasewatchError: if it is no array of that shape with at least one item, or has NaN.

    >>> choice_accuracy([2.0, 0.4, -1.0, 0.0])
    0.625
    """
    log_odds = check_numbers("choice_accuracy", "log_odds", log_odds)
    if log_odds.ndim not in (1, 2) or log_odds.shape[-1] == 0:
        raise PhasewatchError(
            f"choice_accuracy(log_odds=...) must have the shape (item,) or (step, item); {log_odds.shape} came."
        )
    right = (np.sign(log_odds) + 1) / 2
    return float(right.mean()) if right.ndim == 1 else right.mean(axis=1)


def exact_match(token_log_p: Any) -> float:
    """The share of items that greedy decoding gets right, from the log p of their right tokens. Nothing is fitted.

    A token is right under greedy decoding if no other has a higher probability: surely above 1/2, and perhaps below.
    The right tokens' probabilities at one position are a sample of the model's own, each as often as its size says if
    the model is calibrated; so the mean over items of 1[p >= m] / p counts the tokens per item that have at least m.
    Where that count is 1, m separates the largest token from the rest. At each position the smaller of that m and 1/2
    is the threshold; an item is right if all its tokens reach theirs, and in part where one lies at it.
    Reading p**L as exact match (Schaeffer et al. 2023, arXiv 2304.15004) is for sampled answers. Of a model that is
    less sure than it is right, as one in the middle of a fast rise can be, the share comes out too low: by 0.04 to 0.08
    on simulated items where its logits are 1.4 times too small. Log p alone can't mend that, since it looks like that
    of a calibrated model which wavers between a few tokens; where a file says which answers were greedy, as
    lm-evaluation-harness does, use that.

    Args:
        token_log_p: natural log p of each right token given the right ones before it, shape (item, token); NaN behind
            the end of a shorter answer.

    Returns:
        The share, between 0 and 1.

    Raises:
        PhasewatchError: if it isn't of that shape, an item has no token, or a log p is above 0.

    >>> import numpy as np
    >>> round(exact_match(np.log([[0.9, 0.8], [0.9, 0.1], [0.7, 0.95], [0.8, 0.7]])), 2)
    0.76
    """
    log_p = as_numbers("exact_match", "token_log_p", token_log_p)
    if log_p.ndim != 2 or 0 in log_p.shape or np.isnan(log_p).all(axis=1).any():
        raise PhasewatchError(
            f"exact_match(token_log_p=...) must have the shape (item, token) with a token in each item; {log_p.shape} "
            "came, or an item without tokens."
        )
    there = ~np.isnan(log_p)
    p = np.exp(check_log_p("exact_match", "token_log_p", np.where(there, log_p, 0.0)))
    right = np.ones(len(p))
    for own, of_token in zip(p.T, there.T, strict=True):
        if of_token.any():
            right[of_token] *= _largest(own[of_token])
    return float(right.mean())


def _largest(p: np.ndarray) -> np.ndarray:
    """How likely each probability at a position is the largest there: 1 above the threshold, a part of 1 at it."""
    levels, level, counts = np.unique(-p, return_inverse=True, return_counts=True)
    tokens = counts / np.maximum(-levels, 1e-300) / len(p)
    before = np.cumsum(tokens) - tokens
    return np.where(p > 0.5, 1.0, np.clip((1 - before) / tokens, 0, 1)[level])
