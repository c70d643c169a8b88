"""The error of a mean over chains, which alone are independent."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit  # Student's t: degrees of freedom, then the probability of a smaller t


def standard_error(per_chain: Sequence[float] | np.ndarray) -> float:
    """The error of a mean over chains, s/√C · t/2, such that mean ± 2 · error has a coverage of 95 %.

    C is the number of chains, s the standard deviation of their means, and t Student's 97.5 % quantile for C − 1
    degrees of freedom: 12.7 for two chains, 3.2 for four, 2.3 for ten. Draws within a chain stay correlated for as long
    as its slowest direction takes, perhaps longer than the chain runs, so they don't count as evidence: the coverage
    holds whatever their correlation, and whatever trend the chains share. It does ask for means that are nearly
    Gaussian, as sums over many directions and draws are.

    Args:
        per_chain: the mean of each chain, shape (chain,); chains of different seeds, otherwise alike.

    Returns:
        The error in the unit of the means; NaN for fewer than two chains.

    Example:
        >>> round(standard_error([4.0, 6.0, 11.0]), 3)
        4.478
    """
    chains = len(per_chain)
    if chains < 2:
        return math.nan
    with np.errstate(over="ignore", invalid="ignore"):  # chains of 1e200 have an error that no float holds
        spread = np.std(per_chain, ddof=1)
    return float(spread / math.sqrt(chains) * stdtrit(chains - 1, 0.975) / 2)
