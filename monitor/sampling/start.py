"""What is known of an anchor before its chains start, and at which of their steps they are looked at."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from phasewatch.monitor.model.weights import Mask, Weights
from phasewatch.monitor.sampling.curvature import Surroundings
from phasewatch.monitor.sampling.position import Position
from phasewatch.monitor.sampling.settings import Sampler

LOOKS = 2
"""Draws at which a chain's curvature is measured, where ε is given. Each costs a gradient."""

FOLLOWED = 8
"""With κ given, curvature is measured at this many first steps and then every so many steps. Each costs a gradient."""

ROUNDS_TO_KAPPA = 3
"""With κ given, the first step is taken anew up to this often, with the ε that the curvature at its end asks for."""

PRODUCTS = 256
"""Draws at most at which displacements and gradients are multiplied with each other. It costs no gradient."""

LARGE = 10**7
"""Parameters from which not all draws are compared with the snapshot, but as many as `MOST_ON_REFERENCES` allows. The
loss of so many directions scatters little from draw to draw, and neighbouring draws are alike."""

MOST_ON_REFERENCES = 0.03
"""Share of the chains' gradients that L(w*) on their minibatches may cost around a large model."""

FEWEST_COMPARED = 8
"""Draws of a chain that are compared with the snapshot at least, if there are as many."""


@dataclass(frozen=True)
class Start:
    """An anchor, and what is known of it before a chain is run.

    Attributes:
        anchor: w*.
        position: of the model's own parameters, which are at w*.
        masks: which weights move around it.
        reference: L_m(w*) on each minibatch, shape (minibatch,), float64; NaN where it isn't needed.
        around: the loss around it.
        step_size: ε of the first step.
        gradient: ∇L(w*) of the weights that move, where all steps are of one minibatch and chains run together.
    """

    anchor: Weights
    position: Position
    masks: Mask
    reference: np.ndarray
    around: Surroundings
    step_size: float
    gradient: Weights | None = None


class Schedule:
    """The steps of a chain at which it is looked at.

    Args:
        sampler: the settings.
        orders: the minibatch of each chain at each step, shape (chain, step), on the CPU.
        minibatches: how many there are.
        parameters: how many the model has.

    Attributes:
        orders: as given.
        compared: where its loss is compared with the snapshot's on the same minibatch.
        references: the minibatches on which the snapshot's loss is needed.
        looks: where its curvature is measured.
        products: where its displacement and gradient are multiplied.
        sums: whether its displacements are summed up; not for a large model, where that takes as much memory as the
            weights.
        middle: the middle third of its steps, burn-in included.
        late: those of `products` after it, where the chain's gradient is multiplied with its mean displacement there.
    """

    def __init__(self, sampler: Sampler, orders: Tensor, minibatches: int, parameters: int) -> None:
        steps = sampler.burn_in + sampler.draws
        draws = range(sampler.burn_in, steps)
        self.orders = orders
        large = parameters >= LARGE
        self.compared = draws[:: _stride(sampler, orders) if large else 1]
        self.references: Sequence[int] = (
            orders[:, list(self.compared)].unique().tolist() if large else range(minibatches)
        )
        self.looks = set(draws[:: -(-sampler.draws // LOOKS)])
        if sampler.target_kappa is not None:
            self.looks |= {step for step in range(steps) if step < FOLLOWED or step % FOLLOWED == 0}
        self.products = set(self.compared[:: -(-len(self.compared) // PRODUCTS)])
        self.sums = not large
        self.middle = range(steps // 3, 2 * steps // 3)
        self.late = {step for step in self.products if step >= self.middle.stop}

    @property
    def share_of_middle(self) -> float:
        """Factor from a mean over `products` of sums over `middle` to a mean over `late` of means over `middle`."""
        return len(self.products) / (len(self.late) * len(self.middle)) if self.late and self.middle else math.nan


def _stride(sampler: Sampler, orders: Tensor) -> int:
    """Every how many draws a large model's loss is compared with the snapshot's."""
    stride, most = 1, 3 * MOST_ON_REFERENCES * orders.numel()
    while (
        sampler.draws // (stride + 1) >= FEWEST_COMPARED and len(orders[:, sampler.burn_in :: stride].unique()) > most
    ):
        stride += 1
    return stride
