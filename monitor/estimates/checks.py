"""What is measured beside the losses of the chains, to judge them by."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from phasewatch.monitor.estimates.uncertainty import standard_error

SPREAD = 30.0
"""Take curvatures to be spread evenly over this factor where the memory of chains tells what λ̂ lacks. Where they are
spread over 10 or 100, about half or nearly twice as much is missing at the same memory."""


class Checks(NamedTuple):
    """Numbers that say whether an estimate means what it says; NaN where one couldn't be had.

    A tuple, since reading a long run makes one for each point, five times as fast as a frozen dataclass.

    Attributes:
        step_size: ε as it was used, the mean over chains.
        kappa: κ = ε·(nβ·h + γ), the largest of any chain. 4 is unstable.
        unsettled: share of its λ̂ that even the steepest direction lacks on average, for want of steps of this κ.
        descent: nβ·‖∇L‖²/(2·max(h, γ/nβ)) at the snapshot: by how much nβ·L falls to the minimum along the steepest
            direction alone.
        descent_error: its standard error over minibatches.
        drop: −nβ·∇L(w*)·E[w − w*]/2: by how much nβ·L fell on the chains' way down the slope at the snapshot, in all
            directions; on a quadratic λ̂ is too small by it. NaN where minibatches blur the slope, and in chains that
            run in place, which keep no gradient of the snapshot.
        drop_error: its standard error.
        overshoot: what the length of the steps adds to λ̂ by `SGLD`, to first order:
            ε·nβ/8 · (E[∇L·(nβ·∇L + γ·(w − w*))] − nβ·tr Cov(∇L_m)); NaN for samplers without that error.
        overshoot_error: its standard error.
        noise: what the minibatches' gradient noise adds to λ̂: ε·nβ²/8 · tr Cov(∇L_m), times (1 + a)/(1 − a) with
            momentum a. Its size is taken along the chains, or at the snapshot where the model is large.
        noise_error: its standard error along the chains; 0 where its size is taken at the snapshot.
        held: −d log λ̂/d log γ, by how much of itself λ̂ falls with the localization: 0 where every direction that
            counts is much stiffer than γ, ½ where all are as stiff. λ̂ is too small by about held/(1 − held) of itself;
            see `localization_bias`. Directions that chains hadn't the time to reach are not in it. NaN for large
            models.
        held_error: its standard error.
        memory: ∇L in the last third of the steps times the mean δ of the middle third, as a share of ∇L·δ: how much of
            λ̂ is of directions that move so slowly that a third of the chain tells the next. NaN for large models.
        short: by how much of itself λ̂ is too small for the length of the chains, by their memory; see `share_lacking`.
        short_error: its standard error.
        below: share of the draws with a loss more than 1/nβ below the snapshot's own, where minibatches don't blur it.
        curvature: h, the largest absolute curvature met at the snapshot and along the chains.
    """

    step_size: float = math.nan
    kappa: float = math.nan
    unsettled: float = math.nan
    descent: float = math.nan
    descent_error: float = math.nan
    drop: float = math.nan
    drop_error: float = math.nan
    overshoot: float = math.nan
    overshoot_error: float = math.nan
    noise: float = math.nan
    noise_error: float = math.nan
    held: float = math.nan
    held_error: float = math.nan
    memory: float = math.nan
    short: float = math.nan
    short_error: float = math.nan
    below: float = math.nan
    curvature: float = math.nan

    @property
    def localization_bias(self) -> float:
        """By how much of itself λ̂ is too small for the localization, held/(1 − held).

        Exact where all directions that count are equally stiff; too small where many are softer than γ.
        """
        return self.held / (1 - self.held) if self.held < 1 else math.inf if self.held >= 1 else math.nan


@dataclass(frozen=True)
class ChainRecord:
    """What chains around a snapshot left behind; w − w* is δ, and means are over the draws that were looked at.

    Attributes:
        losses: L_m(w) at each draw, shape (chain, draw).
        reference: L_m(w*) on the same minibatches, shape (chain, draw).
        step_size: ε, shape (chain,).
        curvature: the largest that each chain met, shape (chain,).
        gradient_squares: mean of ‖∇L‖², shape (chain,).
        own_products: mean of δ·∇L, shape (chain,).
        along_slope: mean of ∇L(w*)·δ, shape (chain,); NaN where it isn't known.
        past_products: mean of ∇L·Σ ε·δ, the sum over the chain's steps so far, shape (chain,); NaN where it isn't
            known.
        memory: mean of ∇L over the last third of the steps times the mean of δ over the middle third, shape (chain,);
            NaN where it isn't known.
        noise: tr Cov(∇L_m) along the chain, shape (chain,); NaN where it isn't known.
    """

    losses: np.ndarray
    reference: np.ndarray
    step_size: np.ndarray
    curvature: np.ndarray
    gradient_squares: np.ndarray
    own_products: np.ndarray
    along_slope: np.ndarray
    past_products: np.ndarray
    memory: np.ndarray
    noise: np.ndarray

    @classmethod
    def together(cls, records: "list[ChainRecord]") -> "ChainRecord":
        """The records of chains that ran apart as one."""
        names = cls.__dataclass_fields__
        return cls(**{name: np.concatenate([getattr(record, name) for record in records]) for name in names})


def checks_of(
    record: ChainRecord,
    *,
    nbeta: float,
    gamma: float,
    kept: float,
    burn_in: int,
    draws: int,
    step_bias: bool,
    slope: float,
    slope_error: float,
    noise: float,
    alone: bool,
) -> Checks:
    """The checks of all chains around a snapshot.

    Args:
        record: of the chains.
        nbeta: nβ.
        gamma: γ.
        kept: a, the share of the velocity that a chain keeps.
        burn_in: steps before the draws.
        draws: steps that count.
        step_bias: whether the sampler has an error of the step size on a quadratic, as SGLD has.
        slope: ‖∇L‖² at the snapshot, without noise.
        slope_error: its standard error.
        noise: tr Cov(∇L_m) at the snapshot.
        alone: whether all steps are of one minibatch.

    Returns:
        The checks.
    """
    eps = record.step_size
    excess = nbeta * (record.losses - record.reference)
    gain = (1 + kept) / (1 - kept)
    along = float(record.noise.mean())
    heated = eps * nbeta**2 / 8 * gain * (record.noise if math.isfinite(along) else noise)
    held = _held(record, gamma, gain)
    own = float(record.own_products.mean())
    memory = record.memory / own if own > 0 else np.full(len(eps), math.nan)
    short, slope_of_short = share_lacking(float(memory.mean()), burn_in / (burn_in + draws))
    curvature = float(record.curvature.max())
    kappa = float((eps * (nbeta * record.curvature + gamma)).max())
    steepness = 2 * max(curvature, gamma / nbeta)
    longer = eps * (nbeta * record.gradient_squares + gamma * record.own_products - nbeta * noise)
    rate = min(kappa * gain, -math.log(kept) if kept else math.inf)
    return Checks(
        step_size=float(eps.mean()),
        curvature=curvature,
        kappa=kappa,
        unsettled=_unsettled(rate, burn_in, draws),
        descent=nbeta * slope / steepness if steepness else math.inf,
        descent_error=nbeta * slope_error / steepness if steepness else math.nan,
        drop=-nbeta * float(record.along_slope.mean()) / 2 if alone else math.nan,
        drop_error=nbeta * standard_error(record.along_slope) / 2 if alone else math.nan,
        overshoot=nbeta / 8 * float(longer.mean()) if step_bias else math.nan,
        overshoot_error=nbeta / 8 * standard_error(longer) if step_bias else math.nan,
        noise=float(heated.mean()),
        noise_error=standard_error(heated) if math.isfinite(along) else 0.0,
        held=float(held.mean()),
        held_error=standard_error(held),
        memory=float(memory.mean()),
        short=short,
        short_error=standard_error(memory) * slope_of_short,
        below=float((excess < -1).mean()) if alone else math.nan,
    )


def _unsettled(rate: float, burn_in: int, draws: int) -> float:
    """The share of its stationary λ̂ that a direction from 0 lacks, on average over the draws.

    Args:
        rate: at which its square relaxes, in one over steps; κ for plain steps, since E[w²] ∝ 1 − exp(−κ·t).
        burn_in: steps before the draws.
        draws: steps that count.
    """
    during = rate * draws
    return math.exp(-rate * burn_in) * (-math.expm1(-during) / during if during else 1.0)


def share_lacking(memory: float, burn_in: float) -> tuple[float, float]:
    """By how much of itself λ̂ is too small for the length of its chains, from how much they remember.

    A direction that relaxes x times within a chain has E[w²] ∝ 1 − exp(−x·t) at the part t of it, and E[w(t)·w(s)] ∝
    exp(−x·(t − s)/2) − exp(−x·(t + s)/2). How x is spread can't be told from one number: it is taken to be even in its
    logarithm, over a factor `SPREAD`. Directions much slower than the chain look flat, and aren't in it.

    Args:
        memory: ∇L over the last third of the chain times the mean δ over the middle third, as a share of ∇L·δ.
        burn_in: the share of the chain that doesn't count.

    Returns:
        The share of λ̂, and by how much it grows with the memory.

    Example:
        >>> round(share_lacking(0.31, burn_in=0.25)[0], 2)
        0.11
    """
    if math.isnan(memory):
        return math.nan, math.nan
    x = np.geomspace(0.2, 300 * SPREAD, 500)
    lacking = (np.exp(-x * burn_in) - np.exp(-x)) / (x * (1 - burn_in))
    remembered = -np.expm1(-x / 2) * (np.expm1(-x / 6) / (x / 6)) ** 2
    each = np.ones(int(np.searchsorted(x, SPREAD * x[0])))
    own = np.convolve(1 - lacking, each, "valid")
    memories = np.convolve(remembered, each, "valid")[::-1] / own[::-1]
    shares = np.convolve(lacking, each, "valid")[::-1] / own[::-1]
    found, further = np.interp([memory, memory + 0.01], memories, shares)
    return float(found), float(further - found) / 0.01


def _held(record: ChainRecord, gamma: float, gain: float) -> np.ndarray:
    """By how much of itself λ̂ falls with log γ, from how long the chains remember where they were.

    On a quadratic with a = nβ·h, displacements δ relax at the rate ε·(a + γ)/2·gain, so that nβ·E[∇L·δ'] summed over
    all earlier δ' and multiplied with ε·γ/2·gain is Σ a/(a + γ) · γ/(a + γ) = −2 dλ̂/d log γ: only soft directions
    remember for long enough to count. Independent directions average out, so its error falls with their number.

    Args:
        record: of the chains.
        gamma: γ.
        gain: how many times as fast momentum makes soft directions.

    Returns:
        Shape (chain,).
    """
    own = float(record.own_products.mean())
    if not own > 0:
        return np.full(len(record.own_products), math.nan)
    # With momentum, the sum over steps exceeds the integral over time by a part of the step multiplied with itself.
    itself = record.step_size * record.own_products * (gain - 1) / (2 * gain)
    return gamma * gain / 2 * (record.past_products - itself) / own
