"""Tests of whether chains agree that something changed. numpy and scipy alone."""

import functools
import math

import numpy as np
from scipy.special import stdtr  # Student's t: degrees of freedom, then t


def p_value_of_a_rise(differences: np.ndarray, variance: float | None = None, freedom: float | None = None) -> float:
    """The p-value of chains that rise, under the hypothesis that none changes: the smaller one of two tests.

    Student's t assumes that the differences are Gaussian. Wilcoxon's signed-rank test assumes only that they are
    symmetric, so that a single stray chain counts no more than its rank; its p-value can't fall below 2 ** -chains.

    Args:
        differences: later minus earlier of each chain, shape (chain,), at least two.
        variance: the variance of one chain's difference by chance; that of `differences` if None.
        freedom: the degrees of freedom with which `variance` is known; chains - 1 if None.

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
    """The variance, between chains, of a change from the first place to the last.

    A few chains determine the variance of one difference badly. If the chains drift in independent steps, it is the
    sum of the variances of the parts, which have more degrees of freedom together (Satterthwaite 1946). The estimates
    from the whole, its halves and its quarters are averaged, weighted by their degrees of freedom: a drift that
    reverts makes the sum of the parts too large, one that goes on makes it too small.

    Args:
        along: λ̂ of each chain at 2, 3 or 5 places evenly spaced from start to end, shape (place, chain).

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
    """The probability of each sum of the ranks of the chains that rose, if each sign is + or − with probability 1/2."""
    probability = np.ones(1)
    for rank in range(1, chains + 1):
        none = np.zeros(rank)
        probability = (np.append(probability, none) + np.append(none, probability)) / 2
    return probability


def _signed_rank(differences: np.ndarray) -> float:
    ranks = np.argsort(np.argsort(np.abs(differences))) + 1
    return float(_rank_sums(len(differences))[int(ranks[differences > 0].sum()) :].sum())
