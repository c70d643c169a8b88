"""How well λ̂, or the difference of two, is known: judged by the chains, which alone are independent. No torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit  # Student's t: degrees of freedom, then the probability of a smaller t

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.estimates.estimate import Estimate


@dataclass(frozen=True)
class Difference:
    """How far λ̂ moved between two estimates.

    Attributes:
        value: the later λ̂ minus the earlier one.
        error: `value ± 2 * error` holds the mean of `value` over seeds in 95 % of cases; see `standard_error`.
    """

    value: float
    error: float


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
    """
    chains = len(per_chain)
    if chains < 2:
        return math.nan
    return float(np.std(per_chain, ddof=1) / math.sqrt(chains) * stdtrit(chains - 1, 0.975) / 2)


def difference(later: Estimate, earlier: Estimate) -> Difference:
    """The change of λ̂ between two checkpoints measured by one probe, with an error of its own.

    Chain c of both estimates saw the same minibatches and the same noise, which cancel in its own difference: the error
    is that of the chains' differences, often many times smaller than the two levels' errors. Estimates of different
    seeds are compared just as validly; there is only nothing that cancels.

    Args:
        later: the estimate to subtract from.
        earlier: the estimate to subtract.

    Returns:
        The difference; NaN if either estimate failed.

    Raises:
        PhasewatchError: the two differ in nβ or in their number of chains, or have fewer than two.
    """
    if abs(later.nbeta - earlier.nbeta) > 0:  # False for the NaN of a csv, which doesn't know its nβ
        raise PhasewatchError(
            f"difference(later, earlier) got estimates at nβ {later.nbeta:g} and {earlier.nbeta:g}, "
            "which don't measure the same thing; measure both with one SGLD(nbeta=...)."
        )
    chains = len(later.per_chain), len(earlier.per_chain)
    if chains[0] != chains[1] or chains[0] < 2:
        raise PhasewatchError(
            f"difference(later, earlier) got estimates of {chains[0]} and {chains[1]} chains; "
            "it takes the difference chain by chain, so both need the same two or more in per_chain."
        )
    return Difference(later.value - earlier.value, standard_error(np.subtract(later.per_chain, earlier.per_chain)))
