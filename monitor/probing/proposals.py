"""Settings that a calibration proposes: from ε, γ and nβ to chains that are long enough to settle."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

from phasewatch.monitor.probing.trials import rounded
from phasewatch.monitor.sampling.chains import gradients_of_a_point
from phasewatch.monitor.sampling.settings import Sampler

KAPPA = 1.0
"""Start from κ = ε·(nβ·h + γ) = 1, h the largest curvature at any snapshot: a quarter of what is unstable."""

KAPPA_WITH_MOMENTUM = 0.5
"""The same for chains that keep momentum, which run on to where the curvature is larger."""

SETTLING = 2.0
"""The burn-in in units of the relaxation time of the softest directions, 1/(ε·γ) steps without momentum."""

CHAINS = 4, 6, 8, 10, 12, 16
"""Numbers of chains to choose from; trials have the fewest."""

CHAINS_OF_A_CURVE = 6
"""Chains of the trials for a curve: fewer make the error less certain, and more burn in for longer."""

DRAWS, DRAWS_OF_A_CURVE = 2.0, 2.5
"""Draws of a trial's chain over its burn-in."""

LEAST_BURN_IN = 10
"""Steps of burn-in below which a trial is too short to judge."""


@dataclass(frozen=True)
class Proposals:
    """Settings that differ in step size, γ, nβ, and the chains' number and length alone.

    Attributes:
        kind: what they have in common: the sampler's class, its batch size and its momentum.
        of_a_curve: whether they are for several snapshots.
        allowed: gradient evaluations that a point of the first trial may take.
    """

    kind: Sampler
    of_a_curve: bool
    allowed: float

    def keeping(self, momentum: float) -> Self:
        """The same with another momentum."""
        return replace(self, kind=replace(self.kind, momentum=rounded(momentum)))  # pyright: ignore[reportCallIssue]

    @property
    def gain(self) -> float:
        """How many times sooner chains settle than without momentum, for as many times the noise."""
        return self.kind.noise_gain

    @property
    def kappa(self) -> float:
        """κ to start from."""
        return KAPPA_WITH_MOMENTUM if self.kind.velocity_kept else KAPPA

    @property
    def shortest(self) -> int:
        """The fewest steps of burn-in."""
        kept = self.kind.velocity_kept
        return max(LEAST_BURN_IN, math.ceil(SETTLING / -math.log(kept)) if kept else 0)

    @cached_property
    def longest(self) -> int:
        """The most steps of burn-in that a point of the first trial may take."""
        burn_in = self.shortest
        while self.most(burn_in + 1) <= self.allowed:
            burn_in += 1
        return burn_in

    def most(self, burn_in: int) -> int:
        """What a point with this burn-in takes, however many minibatches are kept."""
        sampler = self.of(1.0, 0.0, 1.0, burn_in)
        return gradients_of_a_point(sampler, sampler.chains * (sampler.burn_in + sampler.draws))

    def of(self, eps: float, gamma: float, nbeta: float, burn_in: int) -> Sampler:
        """A setting with this burn-in, and draws and chains as all trials have them."""
        return replace(
            self.kind,
            step_size=rounded(eps),
            localization=rounded(gamma),
            nbeta=rounded(nbeta),
            chains=CHAINS_OF_A_CURVE if self.of_a_curve else CHAINS[0],
            burn_in=burn_in,
            draws=max(math.ceil((DRAWS_OF_A_CURVE if self.of_a_curve else DRAWS) * burn_in), 4),
        )

    def settled(self, eps: float, gamma: float, nbeta: float) -> Sampler:
        """Of a length to settle in, twice the first trial's at most; γ is raised where that isn't enough."""
        burn_in = max(self.shortest, min(round(SETTLING / (eps * gamma * self.gain)), 2 * self.longest))
        return self.of(eps, max(gamma, 0.9 * self.weakest(eps, burn_in)), nbeta, burn_in)

    def weakest(self, eps: float, burn_in: int) -> float:
        """The localization whose chains settle in a burn-in, and no less."""
        return SETTLING / (eps * burn_in * self.gain)

    def first(self, nbeta: float, curvature: float) -> Sampler:
        """κ as it should be at the sharpest snapshot, and γ such that chains settle in the longest burn-in.

        Args:
            nbeta: nβ.
            curvature: the largest at any snapshot.
        """
        eps = (self.kappa - self.weakest(1.0, self.longest)) / (nbeta * curvature)
        return self.settled(eps, self.weakest(eps, self.longest), nbeta)

    def relaxations(self, sampler: Sampler) -> float:
        """How many relaxation times of the softest directions the burn-in of a setting is."""
        assert sampler.step_size is not None
        return sampler.burn_in * sampler.step_size * sampler.localization * self.gain
