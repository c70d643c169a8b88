"""What is known of an anchor before its chains start, and at which of their steps they are looked at."""

from dataclasses import dataclass

import numpy as np

from phasewatch.monitor.model.weights import Mask, Weights
from phasewatch.monitor.sampling.curvature import Surroundings
from phasewatch.monitor.sampling.settings import Sampler

LOOKS = 4
"""Draws at which a chain's curvature is measured, where ε is given. Each costs a gradient."""

FOLLOWED = 8
"""With κ given, curvature is measured at this many first steps and then every so many steps. Each costs a gradient."""

ROUNDS_TO_KAPPA = 3
"""With κ given, the first step is taken anew up to this often, with the ε that the curvature at its end asks for."""

PRODUCTS = 256
"""Draws at most at which displacements and gradients are multiplied with each other. It costs no gradient."""


@dataclass(frozen=True)
class Start:
    """An anchor, and what is known of it before a chain is run.

    Attributes:
        anchor: w*.
        masks: which weights move around it.
        reference: L_m(w*) on each minibatch, shape (minibatch,), float64.
        around: the loss around it.
        step_size: ε of the first step.
        gradient: ∇L(w*) of the weights that move, where all steps are of one minibatch and chains run together.
    """

    anchor: Weights
    masks: Mask
    reference: np.ndarray
    around: Surroundings
    step_size: float
    gradient: Weights | None = None


class Schedule:
    """The steps of a chain at which it is looked at.

    Args:
        sampler: the settings.

    Attributes:
        looks: where its curvature is measured.
        products: where its displacement and gradient are multiplied.
    """

    def __init__(self, sampler: Sampler) -> None:
        steps = sampler.burn_in + sampler.draws
        draws = range(sampler.burn_in, steps)
        self.looks = set(draws[:: -(-sampler.draws // LOOKS)])
        if sampler.target_kappa is not None:
            self.looks |= {step for step in range(steps) if step < FOLLOWED or step % FOLLOWED == 0}
        self.products = set(draws[:: -(-sampler.draws // PRODUCTS)])
