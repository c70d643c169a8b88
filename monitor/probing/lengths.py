"""How many chains of how many draws bring λ̂ to an error, for the fewest gradients."""

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from scipy.special import stdtrit  # Student's t: degrees of freedom, then the probability of a smaller t

from phasewatch.monitor.probing.calibration import Trial
from phasewatch.monitor.probing.proposals import CHAINS
from phasewatch.monitor.sampling.chains import gradients_of_a_point
from phasewatch.monitor.sampling.settings import Sampler

FEWEST_DRAWS = 10
"""Draws of a chain at least: checks of drift and mixing compare its halves."""

LENGTHENED = 4
"""The draws of a chain for an error are at most so many times the trial's, whose chains say how well they are known."""


def student(chains: int) -> float:
    """Factor on the standard error of a mean of chains, so that ± 2 errors hold 95 %; see `standard_error`."""
    return float(stdtrit(chains - 1, 0.975)) / 2


def cheapest(variance: float, draws: int, burn_in: int, error: float, counts: Iterable[int]) -> tuple[int, int]:
    """The number of chains and of draws that cost the fewest gradients for an error.

    The variance of a chain's mean is taken to fall with its draws. Where they are correlated it falls more slowly, so
    fewer draws than those that were seen have at most the error that is predicted.

    Args:
        variance: of the means of the chains that were seen.
        draws: of each of them.
        burn_in: steps of a chain before its draws.
        error: what `uncertainty.standard_error` shall give, in the unit of the means; 0 for as many draws as were seen.
        counts: numbers of chains to choose from.

    Returns:
        Chains, and draws of each.

    Example:
        >>> cheapest(0.7, draws=100, burn_in=20, error=0.8, counts=(4, 8))
        (8, 20)
    """
    found = []
    for chains in counts:
        enough = variance * draws * student(chains) ** 2 / (chains * error**2) if error > 0 else draws
        needed = max(math.ceil(enough), FEWEST_DRAWS)
        found.append((chains * (burn_in + needed), chains, needed))
    _, chains, needed = min(found)
    return chains, needed


def of_length(trial: Trial, room: float, error: float) -> Sampler:
    """A trial's setting with as many chains and draws as bring the errors to a share of the largest λ̂.

    The errors' root mean square, that is: which of a few snapshots has the largest one, so few chains can't tell.

    Args:
        trial: the setting, and how far its chains are apart.
        room: gradient evaluations that a point may take.
        error: a share of λ̂.

    Returns:
        The setting; where the room isn't enough, that with the smallest error within it.
    """
    sampler = trial.sampler
    levels = [point.llc for point in trial.points if point.llc.health.has_level] or [trial.points[-1].llc]
    variance = float(np.mean([np.var(estimate.per_chain, ddof=1) for estimate in levels]))
    wanted = error * max(abs(estimate.value) for estimate in levels)
    chains, draws = cheapest(variance, sampler.draws, sampler.burn_in, wanted, CHAINS)
    draws = min(draws, LENGTHENED * sampler.draws)
    if _fits(sampler, chains, draws, room):
        return replace(sampler, chains=chains, draws=draws)
    most = range(FEWEST_DRAWS, draws * chains)
    longest = {c: max((d for d in most if _fits(sampler, c, d, room)), default=0) for c in CHAINS}
    possible = [c for c in CHAINS if longest[c]]
    if not possible:
        return sampler
    chains = min(possible, key=lambda c: student(c) ** 2 / (c * longest[c]))
    return replace(sampler, chains=chains, draws=longest[chains])


def of_chains(trial: Trial, room: float, error: float) -> Sampler:
    """The same by more chains of the trial's length alone.

    Args:
        trial: the setting.
        room: gradient evaluations that a point may take.
        error: a share of λ̂ at the last snapshot.

    Returns:
        The setting.
    """
    sampler, last = trial.sampler, trial.points[-1].llc
    spread = float(np.std(last.per_chain, ddof=1))
    chosen = CHAINS[0]
    for chains in CHAINS:
        if chains > CHAINS[0] and not _fits(sampler, chains, sampler.draws, room):
            break
        chosen = chains
        if spread / math.sqrt(chains) * student(chains) <= error * abs(last.value):
            break
    return replace(sampler, chains=chosen)


def _fits(sampler: Sampler, chains: int, draws: int, room: float) -> bool:
    given = replace(sampler, chains=chains, draws=draws)
    return gradients_of_a_point(given, chains * (sampler.burn_in + draws)) <= room
