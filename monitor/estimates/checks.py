"""What is measured beside the losses of the chains, to judge them by."""

import math
from dataclasses import dataclass

import numpy as np

from phasewatch.monitor.estimates.uncertainty import standard_error

LARGEST_PRODUCT = 1e100
"""Products of displacement and gradient above this are left out of `Checks.held`, since their squares overflow."""

QUADRATIC = 0.7, 1.4
"""`Checks.held` is only given where half of the mean product of displacement and gradient, which is λ̂ on a quadratic,
is between these multiples of λ̂: elsewhere its formula doesn't hold. How they were chosen is not recorded."""


@dataclass(frozen=True)
class Checks:
    """Numbers that say whether an estimate means what it says; NaN where one couldn't be had.

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
        noise: what the minibatches' gradient noise adds to λ̂, by its size at the snapshot: ε·nβ²/8 · tr Cov(∇L_m),
            times (1 + a)/(1 − a) with momentum a. Noise that grows away from the snapshot adds more.
        held: −d log λ̂/d log γ, the share of λ̂ that the localization holds back: 0 where every direction that counts is
            much stiffer than γ, ½ where all are as stiff. Directions that the chains have gone only a part of the way
            in add to it.
        held_error: its standard error; NaN, as `held`, where the loss is too far from quadratic to tell, or the chains
            don't all run together.
        held_at_most: γ·E‖w − w*‖²/(nβ·E[∇L·(w − w*)]), the most that `held` can be of chains that have settled.
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
    noise: float = math.nan
    held: float = math.nan
    held_error: float = math.nan
    held_at_most: float = math.nan
    below: float = math.nan
    curvature: float = math.nan


@dataclass(frozen=True)
class ChainRecord:
    """What chains around a snapshot left behind; w − w* is δ, and means are over the draws that were looked at.

    Attributes:
        losses: L_m(w) at each draw, shape (chain, draw).
        reference: L_m(w*) on the same minibatches, shape (chain, draw).
        step_size: ε, shape (chain,).
        curvature: the largest that each chain met, shape (chain,).
        gradient_squares: mean of ‖∇L‖², shape (chain,).
        displacement_squares: mean of ‖δ‖², shape (chain,).
        own_products: mean of δ·∇L, shape (chain,).
        along_slope: mean of ∇L(w*)·δ, shape (chain,); NaN where it isn't known.
        products: δ_c·∇L_d of all pairs of chains at each draw, shape (draw, chain, chain); None where chains didn't run
            together.
    """

    losses: np.ndarray
    reference: np.ndarray
    step_size: np.ndarray
    curvature: np.ndarray
    gradient_squares: np.ndarray
    displacement_squares: np.ndarray
    own_products: np.ndarray
    along_slope: np.ndarray
    products: np.ndarray | None = None

    @classmethod
    def together(cls, records: "list[ChainRecord]") -> "ChainRecord":
        """The records of chains that ran apart as one."""
        if len(records) == 1:
            return records[0]
        names = [name for name in cls.__dataclass_fields__ if name != "products"]
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
    eps, own = record.step_size, float(record.own_products.mean())
    excess = nbeta * (record.losses - record.reference)
    held, held_error = math.nan, math.nan
    if record.products is not None and np.abs(record.products).max() < LARGEST_PRODUCT:
        held, held_error = _held(nbeta * record.products, float(excess.mean()), alone=alone)
    gain = (1 + kept) / (1 - kept)
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
        noise=float(eps.mean()) * nbeta**2 * noise / 8 * gain,
        held=held,
        held_error=held_error,
        held_at_most=gamma * float(record.displacement_squares.mean()) / (nbeta * own) if own > 0 else math.nan,
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


def _held(products: np.ndarray, value: float, *, alone: bool) -> tuple[float, float]:
    """The share of λ̂ that the localization holds back, and its standard error by leaving out a chain at a time.

    On a quadratic with a = nβ·h, independent chains c and d have E[δ_c·∇_c] = Σ a/(a + γ) = 2λ̂ and
    E[(δ_c·∇_d)·(δ_d·∇_c)] = ½ Var(δ_c·∇_c) = Σ a²/(a + γ)², and −dλ̂/d log γ is half of the difference of the two.

    Args:
        products: δ_c·∇_d of the chains' displacements with nβ times their gradients, shape (draw, chain, chain).
        value: λ̂; a loss for which it isn't nearly half the first of these isn't nearly quadratic.
        alone: whether all steps are of one minibatch; the noise of others is in that variance.

    Returns:
        The share and its error, NaN where they can't be had.
    """
    chains = products.shape[1]
    own = np.trace(products.mean(0))
    if chains < 3 or own <= 0 or value <= 0 or not QUADRATIC[0] < own / chains / (2 * value) < QUADRATIC[1]:
        return math.nan, math.nan

    diagonal = np.einsum("tcc->tc", products)
    between = np.einsum("tcd,tdc->cd", products, products)
    np.fill_diagonal(between, 0)
    of_all = between.sum() / 2

    def share(kept: np.ndarray, squares: float) -> float:
        count = kept.shape[1] * (kept.shape[1] - 1) / 2
        if alone:
            squares, count = squares + kept.var(ddof=1) * kept.size / 2, count + kept.shape[1]
        return float(1 - squares / len(kept) / count / kept.mean())

    left_out = [share(np.delete(diagonal, out, axis=1), of_all - between[out].sum()) for out in range(chains)]
    return share(diagonal, of_all), float(np.std(left_out) * math.sqrt(chains - 1))
