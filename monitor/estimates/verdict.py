"""From the paired losses of the chains to an estimate with an error and a verdict. No torch."""

import math

import numpy as np
from arviz_stats.base.array import array_stats
from scipy.special import stdtrit  # Student's t: degrees of freedom, then the probability of a smaller t

from phasewatch.monitor.estimates.checks import Checks
from phasewatch.monitor.estimates.estimate import Estimate, Health
from phasewatch.monitor.estimates.uncertainty import standard_error

TRACE_LENGTH = 100

IMPLAUSIBLE = 1.0
"""More λ̂ than this for each parameter, twice what there can be at a minimum, is chains that left it."""

TOLERATED_DRIFT = 0.05
"""Change along the chains, as a share of the estimate, that is no reason for doubt."""

DRIFT_CONFIDENCE = 0.995
"""Probability below which a larger change than that may still be chance ..."""

DISAGREEMENT = 1.5
"""Split R-hat above which the chains are called unmixed; drifting ones are named as such first."""

SUSPICION = 1.25, 0.985
"""... and the probability that is enough for a rise of chains with a split R-hat above the first of these."""

TOLERATED_BELOW = 0.02
"""Share of the draws that may lie more than a nat below the snapshot, further than rounding takes them."""

NATS = 1.0
"""Descent left in the steepest direction, in units of λ̂, that is no reason for doubt."""

TOLERATED_DESCENT = 0.1
"""The same as a share of the estimate, where that is more; and the share that the chains may have slid, in nats."""

UNSTABLE = 2.5
"""κ beyond which the chains overshoot so far that little keeps them from diverging, which they do at 4."""

TOLERATED_BIAS = 0.05
"""Share of the estimate that the length of the steps or the minibatches' noise may add, or the localization take."""

TOO_SMALL = 0.02
"""κ below which chains that have not settled or disagree are called too slow rather than too short."""

TOLERATED_LACK = 0.05
"""Share of its λ̂ that even the steepest direction may lack for want of steps, others lacking more."""

TOLERATED_SHORT = 0.055
"""Share of itself by which λ̂ may be too small for the length of the chains, as their memory tells. Where chains lack
10 % of λ̂ nearly all show more, and where they lack 2 % nearly none (experiments/planted_biases.py)."""


def estimate_from_losses(
    losses: np.ndarray,
    reference: np.ndarray,
    *,
    nbeta: float,
    parameters: int,
    checks: Checks = Checks(),  # noqa: B008 - it is frozen
) -> Estimate:
    """λ̂ = nβ · mean(L_m(w) − L_m(w*)), the losses paired on the same minibatches (Lau et al. 2023, eq. 7).

    Args:
        losses: L_m(w), shape (chain, draw).
        reference: L_m(w*) on the same minibatches, shape (chain, draw).
        nbeta: nβ.
        parameters: how many parameters were sampled; λ is at most half of it.
        checks: what else was measured.

    Returns:
        The estimate; its error is that of a mean over independent chains, however correlated their draws are.

    Example:
        >>> losses = np.array([[2.0, 2.5, 2.25, 2.25], [3.0, 3.5, 3.25, 3.25]])
        >>> reference = np.array([[1.5, 1.5, 2.0, 2.0], [2.0, 3.0, 3.0, 3.0]])
        >>> estimate_from_losses(losses, reference, nbeta=8.0, parameters=10).per_chain
        (4.0, 4.0)
    """
    finite = np.isfinite(losses).all() and np.isfinite(reference).all()
    paired: np.ndarray = nbeta * (losses - reference) if finite else np.full(losses.shape, math.nan)
    per_chain = paired.mean(axis=1)
    value = float(per_chain.mean())
    if not math.isfinite(value) or value > IMPLAUSIBLE * parameters:
        nowhere = (math.nan,) * len(losses)
        return Estimate(math.nan, math.nan, nowhere, nbeta, math.nan, math.nan, Health.DIVERGED, checks=checks)
    rhat, ess = mixing(paired)
    error = standard_error(per_chain)
    health = verdict(paired, error, rhat, checks)
    thinned = paired[:, :: math.ceil(paired.shape[1] / TRACE_LENGTH)]
    trace = tuple(tuple(chain) for chain in thinned.tolist()) if health.doubtful else ()
    return Estimate(value, error, tuple(per_chain.tolist()), nbeta, rhat, ess, health, trace, checks)


def mixing(paired: np.ndarray) -> tuple[float, float]:
    """Split R-hat and effective sample size (Vehtari et al. 2021) of values of shape (chain, draw).

    Chains that don't move carry one draw each; they agree perfectly in one place, and not at all in several.
    """
    if np.ptp(paired, axis=1).max() == 0:
        return (1.0 if np.ptp(paired) == 0 else math.inf), float(len(paired))
    rhat = np.asarray(array_stats.rhat(paired, chain_axis=0, draw_axis=1, method="split"))
    ess = np.asarray(array_stats.ess(paired, chain_axis=0, draw_axis=1, method="mean"))
    return rhat.item(), max(ess.item(), 1.0)


def drift(paired: np.ndarray) -> tuple[float, float]:
    """Mean change from the first half of the draws to the second, and its standard error over chains.

    Args:
        paired: shape (chain, draw).

    Returns:
        The change and its standard error, in units of λ̂.
    """
    half = paired.shape[1] // 2
    change = paired[:, half:].mean(axis=1) - paired[:, :half].mean(axis=1)
    return float(change.mean()), float(change.std(ddof=1) / math.sqrt(len(change)))


def verdict(
    paired: np.ndarray,
    error: float,
    rhat: float,
    checks: Checks = Checks(),  # noqa: B008 - it is frozen
) -> Health:
    """Judge finite paired losses, in units of λ̂, of shape (chain, draw).

    Stationary chains are called drifting in one to two of a hundred times at most, however few or slow they are: the
    change is judged by Student's t over the chains, which are independent where neighbouring draws are not. Directions
    on their way from the snapshot raise the loss and set the chains apart, so where there are signs of both, less of
    each is asked for. A check that is NaN accuses nobody.
    """
    value = float(paired.mean())
    change, change_error = drift(paired)

    def by_chance(error: float, confidence: float) -> float:
        return float(stdtrit(len(paired) - 1, confidence)) * error

    moved = abs(change) > TOLERATED_DRIFT * abs(value) + by_chance(change_error, DRIFT_CONFIDENCE)
    rising = change > TOLERATED_DRIFT * abs(value) + by_chance(change_error, SUSPICION[1]) and rhat > SUSPICION[0]
    if value < -2 * error or checks.below > TOLERATED_BELOW:
        return Health.NEGATIVE
    tolerated = TOLERATED_DESCENT * abs(value)
    if checks.descent - 2 * checks.descent_error > max(NATS, tolerated):
        return Health.OFF_MINIMUM
    if checks.drop - 2 * checks.drop_error > tolerated:
        return Health.OFF_MINIMUM
    biased = TOLERATED_BIAS * abs(value)
    if checks.kappa > UNSTABLE or checks.overshoot - checks.overshoot_error > biased:
        return Health.OVERSTEPPING
    if checks.noise - checks.noise_error > biased:
        return Health.NOISY
    short = Health.CREEPING if checks.kappa < TOO_SMALL else None
    if checks.unsettled > TOLERATED_LACK or moved or rising:
        return short or Health.DRIFTING
    if rhat > DISAGREEMENT:
        return short or Health.UNMIXED
    if checks.localization_bias - checks.held_error > TOLERATED_BIAS:
        return Health.LOCALIZED
    if checks.short > TOLERATED_SHORT:
        return Health.SHORT
    return Health.OK
