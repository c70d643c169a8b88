"""How far λ̂ moved between two estimates, and how well that is known."""

from dataclasses import dataclass

import numpy as np

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.estimates.estimate import Estimate
from phasewatch.monitor.estimates.uncertainty import standard_error


@dataclass(frozen=True)
class Difference:
    """How far λ̂ moved between two estimates.

    Attributes:
        value: the later λ̂ minus the earlier one.
        error: `value ± 2 * error` holds the mean of `value` over seeds in 95 % of cases; see `standard_error`.

    Example:
        >>> Difference(value=4.0, error=0.5).error
        0.5
    """

    value: float
    error: float


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

    Example:
        >>> import phasewatch as pw
        >>> settings = {"nbeta": 60.0, "rhat": 1.0, "ess": 50.0, "health": pw.Health.OK}
        >>> earlier = pw.Estimate(11.0, 12.7, per_chain=(1.0, 21.0), **settings)
        >>> later = pw.Estimate(15.0, 12.7, per_chain=(5.0, 25.0), **settings)
        >>> pw.difference(later, earlier)
        Difference(value=4.0, error=0.0)
    """
    if abs(later.nbeta - earlier.nbeta) > 0:  # False for the NaN of a csv, which doesn't know its nβ
        raise PhasewatchError(
            f"difference(later, earlier) got estimates at nβ {later.nbeta:g} and {earlier.nbeta:g}, "
            "which don't measure the same thing; measure both with one sampler."
        )
    chains = len(later.per_chain), len(earlier.per_chain)
    if chains[0] != chains[1] or chains[0] < 2:
        raise PhasewatchError(
            f"difference(later, earlier) got estimates of {chains[0]} and {chains[1]} chains; "
            "it takes the difference chain by chain, so both need the same two or more in per_chain."
        )
    return Difference(later.value - earlier.value, standard_error(np.subtract(later.per_chain, earlier.per_chain)))
