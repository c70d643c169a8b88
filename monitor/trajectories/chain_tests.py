"""Whether chains agree that something changed. numpy and scipy alone."""

import functools
import math

import numpy as np
from scipy.special import stdtr  # Student's t: degrees of freedom, then t


def p_value_of_a_rise(differences: np.ndarray, variance: float | None = None, freedom: float | None = None) -> float:
    """The probability that chains which don't change would seem to rise as surely as these, by the surer of two tests.

    Student's t takes the differences for Gaussian; Wilcoxon's signed ranks only for symmetric, so that a single stray
    chain weighs as much as its rank. The latter can't fall below 2 ** -chains.

    Args:
        differences: of each chain, shape (chain,), at least two.
        variance: of one chain's difference by chance; by default that of these.
        freedom: the degrees of freedom with which `variance` is known.

    Returns:
        A one-sided p-value.
    """
    chains = len(differences)
    if variance is None or freedom is None:
        variance, freedom = float(np.var(differences, ddof=1)), chains - 1
    mean = float(np.mean(differences))
    if variance == 0:
        return 0.0 if mean > 0 else 1.0
    return min(float(stdtr(freedom, -mean / math.sqrt(variance / chains))), _signed_rank(differences))


def variance_of_a_change(along: np.ndarray) -> tuple[float, float]:
    """By how much one chain's change differs from another's by chance, from what chains did along the way.

    A few chains know the variance of one difference badly. If their wanders are sums of independent steps, it is the
    sum of the variances of the parts, which have more degrees of freedom together (Satterthwaite 1946). The whole, its
    halves and its quarters are averaged by theirs: a wander that comes back makes the parts' sum too large, one that
    goes on makes it too small.

    Args:
        along: of each chain, at 2, 3 or 5 places evenly spaced from start to end, shape (place, chain).

    Returns:
        The variance of a chain's change from the first place to the last, and its degrees of freedom.
    """
    variances, freedoms, parts = [], [], 1
    while parts < len(along):
        of_parts = np.diff(along[:: (len(along) - 1) // parts], axis=0).var(axis=1, ddof=1)
        total, squares = float(of_parts.sum()), float((of_parts**2).sum())
        variances.append(total)
        freedoms.append((along.shape[1] - 1) * (total**2 / squares if squares > 0 else 1.0))
        parts *= 2
    return float(np.average(variances, weights=freedoms)), sum(freedoms)


@functools.cache
def _rank_sums(chains: int) -> np.ndarray:
    """The probability of each sum of the ranks of those that rose, when each chain's sign is a coin's."""
    probability = np.ones(1)
    for rank in range(1, chains + 1):
        none = np.zeros(rank)
        probability = (np.append(probability, none) + np.append(none, probability)) / 2
    return probability


def _signed_rank(differences: np.ndarray) -> float:
    ranks = np.argsort(np.argsort(np.abs(differences))) + 1
    return float(_rank_sums(len(differences))[int(ranks[differences > 0].sum()) :].sum())
