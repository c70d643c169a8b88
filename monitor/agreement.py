"""Whether chains agree that something changed. numpy and scipy alone."""

import math

import numpy as np
from scipy.special import stdtr  # Student's t: degrees of freedom, then t


def disagreement(differences: np.ndarray) -> float:
    """The probability that chains which don't change would seem to rise as surely as these, by the surer of two tests.

    Student's t takes the differences for Gaussian; Wilcoxon's signed ranks only for symmetric, so that a single stray
    chain weighs as much as its rank. The latter can't fall below 2 ** -chains.

    Args:
        differences: of each chain, shape (chain,), at least two.

    Returns:
        A one-sided p-value.
    """
    chains = len(differences)
    error = float(np.std(differences, ddof=1)) / math.sqrt(chains)
    mean = float(np.mean(differences))
    if error == 0:
        return 0.0 if mean > 0 else 1.0
    return min(float(stdtr(chains - 1, -mean / error)), _signed_rank(differences))


def _signed_rank(differences: np.ndarray) -> float:
    ranks = np.argsort(np.argsort(np.abs(differences))) + 1
    probability = np.ones(1)  # of each sum of the ranks of those that rose, when each sign is a coin's
    for rank in range(1, len(differences) + 1):
        none = np.zeros(rank)
        probability = (np.append(probability, none) + np.append(none, probability)) / 2
    return float(probability[int(ranks[differences > 0].sum()) :].sum())
