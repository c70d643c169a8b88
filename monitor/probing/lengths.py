"""How many chains of how many draws bring λ̂ to an error, for the fewest gradients."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.special import stdtrit  # Student's t: degrees of freedom, then the probability of a smaller t

FEWEST_DRAWS = 10
"""Draws of a chain at least: checks of drift and mixing compare its halves."""


def student(chains: int) -> float:
    """Factor on the standard error of a mean of chains, so that ± 2 errors hold 95 %; see `standard_error`."""
    return float(stdtrit(chains - 1, 0.975)) / 2


def cheapest(
    per_chain: Sequence[float], draws: int, burn_in: int, error: float, counts: Iterable[int]
) -> tuple[int, int]:
    """The number of chains and of draws that cost the fewest gradients for an error.

    The variance of a chain's mean is taken to fall with its draws. Where they are correlated it falls more slowly, so
    fewer draws than those that were seen have at most the error that is predicted.

    Args:
        per_chain: the means of the chains that were seen, shape (chain,).
        draws: of each of them.
        burn_in: steps of a chain before its draws.
        error: what `uncertainty.standard_error` shall give, in the unit of the means; 0 for as many draws as were seen.
        counts: numbers of chains to choose from.

    Returns:
        Chains, and draws of each.

    Example:
        >>> cheapest((10.0, 11.0, 9.0, 10.0), draws=100, burn_in=20, error=0.8, counts=(4, 8))
        (8, 19)
    """
    variance = float(np.var(per_chain, ddof=1)) * draws
    found = []
    for chains in counts:
        enough = variance * student(chains) ** 2 / (chains * error**2) if error > 0 else draws
        needed = max(math.ceil(enough), FEWEST_DRAWS)
        found.append((chains * (burn_in + needed), chains, needed))
    _, chains, needed = min(found)
    return chains, needed
