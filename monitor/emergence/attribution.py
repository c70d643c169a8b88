"""Where along the chain of scores predictability is lost."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from phasewatch.monitor.emergence.checks import Axis
from phasewatch.monitor.emergence.items import Items, check_items
from phasewatch.monitor.errors import PhasewatchError

FEWEST = 3
"""A correlation takes at least this many places along the axis."""

SURELY = 2.0
"""A fall of the mean correlation counts from this many standard errors on."""


@dataclass(frozen=True, eq=False)
class Attribution:
    """How each score of the chain goes with the axis.

    Attributes:
        correlation: of each score, the items' correlations with the axis, shape (item,); NaN where a score is constant.
            All scores are oriented so that better is more.
        undefined: of each score, the share of items for which it is constant.
        mean: of each score, the mean of the correlations that are defined.
        lost_at: the score at which the mean correlation falls most from the one before it; None if none surely falls.
        lost: by how much.
        error: the standard error of that fall, over items.
    """

    correlation: Mapping[str, np.ndarray]
    undefined: Mapping[str, float]
    mean: Mapping[str, float]
    lost_at: str | None
    lost: float
    error: float

    def __str__(self) -> str:
        lines = []
        for name, values in self.correlation.items():
            known = values[np.isfinite(values)]
            if not known.size:
                lines.append(f"{name}: constant for every item.")
                continue
            low, middle, high = np.quantile(known, [0.1, 0.5, 0.9])
            lines.append(
                f"{name}: correlation {self.mean[name]:.2f} on average (10 % of items below {low:.2f}, half below "
                f"{middle:.2f}, 10 % above {high:.2f}); undefined for {self.undefined[name]:.0%} of items."
            )
        if self.lost_at is None:
            lines.append("No step of the chain surely loses predictability.")
        else:
            lines.append(f"Most is lost on the way to {self.lost_at}: {self.lost:.2f} ± {self.error:.2f}.")
        return "\n".join(lines)


def attribute(items: Items) -> Attribution:
    """How strongly each score of the chain goes with the axis, item by item (Schaeffer et al. 2024, arXiv 2406.04391).

    Args:
        items: at three or more places; Pearson's correlations are with the logarithm of x where it spans a decade.

    Returns:
        The correlations, the share of items for which they are undefined, and the step that loses most.

    Raises:
        PhasewatchError: if there are fewer than three places, or all items are right from the start.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> step = np.geomspace(100, 100_000, 12)
    >>> wrong = rng.normal(-2, 0.5, (12, 200))
    >>> right = -4 + 0.25 * np.arange(12)[:, None] + rng.normal(0, 0.3, (12, 200))
    >>> found = attribute(Items(step, np.stack([np.minimum(right, -0.1), wrong], axis=2) - 0.5))
    >>> found.mean["log_p"] > 0.9, found.lost_at
    (True, 'accuracy')
    """
    check_items("attribute", items)
    if len(items.x) < FEWEST:
        raise PhasewatchError(
            f"attribute(items) has {len(items.x)} place{'s' if len(items.x) > 1 else ''} along the axis, and a "
            f"correlation takes {FEWEST}; read more checkpoints."
        )
    if (np.asarray(items.correct) >= 1).all():
        raise PhasewatchError(
            "attribute(items): all items are right from the start, so no accuracy goes with the axis."
        )
    u = Axis.of(items.x, falling=bool(items.x[-1] < items.x[0])).position(items.x)
    correlation = {name: _correlations(u, values) for name, values in items.per_item.items()}
    undefined = {name: float(np.isnan(values).mean()) for name, values in correlation.items()}
    mean = {name: float(np.nanmean(v)) if np.isfinite(v).any() else 0.0 for name, v in correlation.items()}
    names = list(correlation)
    falls = {after: mean[before] - mean[after] for before, after in pairwise(names)}
    lost_at = max(falls, key=falls.__getitem__)
    pair = correlation[names[names.index(lost_at) - 1]] - correlation[lost_at]
    known = pair[np.isfinite(pair)]
    error = float(known.std(ddof=1) / np.sqrt(len(known))) if len(known) > 1 else float("nan")
    if not falls[lost_at] > SURELY * error:
        return Attribution(correlation, undefined, mean, None, 0.0, error)
    return Attribution(correlation, undefined, mean, lost_at, falls[lost_at], error)


def _correlations(u: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Pearson's correlation of each column with the axis, shape (item,); NaN for a constant one."""
    x = (u - u.mean()) / np.linalg.norm(u - u.mean())
    off = values - values.mean(axis=0)
    size = np.linalg.norm(off, axis=0)
    constant = np.ptp(values, axis=0) == 0
    return np.where(constant, np.nan, x @ off / np.where(constant, 1.0, size))
