"""What is measured beside the losses of the chains, to judge them by. No torch."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Checks:
    """Numbers that say whether an estimate means what it says; NaN where one couldn't be had.

    Attributes:
        step_size: ε as it was used, the mean over chains.
        kappa: κ = ε·(nβ·h + γ), the largest of any chain. 4 is unstable.
        unsettled: share of its λ̂ that even the steepest direction lacks on average, for want of steps of this κ.
        descent: nβ·‖∇L‖²/(2·max(h, γ/nβ)) at the snapshot, the nats that the steepest direction alone leaves to
            descend.
        descent_error: its standard error over minibatches.
        slid: −nβ·∇L(w*)·E[w − w*]/2, the nats that the chains found by following the slope at the snapshot, in all
            directions; on a quadratic λ̂ is too small by it. NaN where minibatches blur the slope.
        slid_error: its standard error.
        overshoot: what the length of the steps adds to λ̂ by method="sgld", to first order:
            ε·nβ/8 · (E[∇L·(nβ·∇L + γ·(w − w*))] − nβ·tr Cov(∇L_m)); NaN for other methods.
        noise: what the minibatches' gradient noise adds to λ̂, by its size at the snapshot: ε·nβ²/8 · tr Cov(∇L_m),
            times (1 + a)/(1 − a) with momentum a. Noise that grows away from the snapshot adds more.
        held: −d log λ̂/d log γ, the share of λ̂ that the localization holds back: 0 where every direction that counts is
            much stiffer than γ, ½ where all are as stiff. Directions that the chains have gone only a part of the way
            in add to it.
        held_error: its standard error; NaN, as `held`, where the loss is too far from quadratic to tell, or memory
            holds only some of the chains at a time.
        pull: γ·E‖w − w*‖²/(nβ·E[∇L·(w − w*)]), the most that `held` can be of chains that have settled.
        below: share of the draws with a loss more than a nat (1/nβ) below the snapshot's own, where minibatches don't
            blur it.
        curvature: h, the largest absolute curvature met at the snapshot and along the chains.
    """

    step_size: float = math.nan
    kappa: float = math.nan
    unsettled: float = math.nan
    descent: float = math.nan
    descent_error: float = math.nan
    slid: float = math.nan
    slid_error: float = math.nan
    overshoot: float = math.nan
    noise: float = math.nan
    held: float = math.nan
    held_error: float = math.nan
    pull: float = math.nan
    below: float = math.nan
    curvature: float = math.nan
