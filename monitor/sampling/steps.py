"""The steps of the samplers as pure functions, each beside its paper. They work element by element on any shape.

Letters: w are the weights, w* (`anchor`) the snapshot's, ∇L (`grad`) the gradient of the loss at w, z (`noise`)
standard normal, nβ, γ and ε as in `SGLD`. The density that is sampled is exp(−nβ·L(w) − γ/2·‖w − w*‖²).
"""

import math

from torch import Tensor


def sgld_step(
    w: Tensor, anchor: Tensor, grad: Tensor, noise: Tensor, *, nbeta: float, gamma: float, eps: float | Tensor
) -> Tensor:
    """One step of SGLD, w − ε/2·(nβ·∇L(w) + γ·(w − w*)) + √ε·z (Welling & Teh 2011; Lau et al. 2023, eq. 15).

    Args:
        w: where the chain is, any shape.
        anchor: w*, of a shape that broadcasts with `w`.
        grad: ∇L(w) on the step's minibatch, of the shape of `w`.
        noise: z, of the shape of `w`.
        nbeta: nβ.
        gamma: γ, the localization.
        eps: ε, the step size; a number, or of a shape that broadcasts with `w`.

    Returns:
        Where the chain goes, of the shape of `w`.

    Example:
        >>> import torch
        >>> w, anchor, grad, noise = (torch.tensor([value]) for value in (2.0, 1.0, 3.0, 0.5))
        >>> sgld_step(w, anchor, grad, noise, nbeta=10.0, gamma=4.0, eps=0.01)
        tensor([1.8800])
    """
    return w - eps / 2 * (nbeta * grad + gamma * (w - anchor)) + eps**0.5 * noise


def baoab_start(anchor: Tensor, noise: Tensor, *, eps: float | Tensor) -> Tensor:
    """Where a chain of `baoab_step` first asks for a gradient: half a step from w* with velocity z, w* + √ε/2·z.

    Args:
        anchor: w*, any shape.
        noise: z, the first velocity, of a shape that broadcasts with `anchor`.
        eps: ε, the step size.

    Returns:
        The first position.

    Example:
        >>> import torch
        >>> baoab_start(torch.tensor([1.0]), torch.tensor([0.5]), eps=0.04)
        tensor([1.0500])
    """
    return anchor + eps**0.5 / 2 * noise


def baoab_step(
    w: Tensor,
    velocity: Tensor,
    anchor: Tensor,
    grad: Tensor,
    noise: Tensor,
    *,
    nbeta: float,
    gamma: float,
    eps: float | Tensor,
    momentum: float,
) -> tuple[Tensor, Tensor]:
    """One step of underdamped Langevin dynamics in the BAOAB splitting (Leimkuhler & Matthews 2013).

    With the force F = −(nβ·∇L(w) + γ·(w − w*)), velocity p in units in which it is standard normal, and a the share of
    it that is kept: p ← p + √ε·F, w ← w + √ε/2·p, p ← a·p + √(1 − a²)·z, w ← w + √ε/2·p. For a = 0 these are the steps
    of Leimkuhler & Matthews, which only need the last step's z beside w. On a quadratic the positions have no error of
    the step size.

    Args:
        w: where the chain is, any shape.
        velocity: p, of the shape of `w`; for a = 0 the noise of the step before.
        anchor: w*, of a shape that broadcasts with `w`.
        grad: ∇L(w) on the step's minibatch, of the shape of `w`.
        noise: z, of the shape of `w`.
        nbeta: nβ.
        gamma: γ, the localization.
        eps: ε, the step size; a number, or of a shape that broadcasts with `w`.
        momentum: a, from 0 to below 1.

    Returns:
        Where the chain goes, and its velocity there.

    Example:
        >>> import torch
        >>> w, velocity, anchor, grad, noise = (torch.tensor([value]) for value in (2.0, -1.0, 1.0, 3.0, 0.5))
        >>> baoab_step(w, velocity, anchor, grad, noise, nbeta=10.0, gamma=4.0, eps=0.01, momentum=0.6)
        (tensor([1.6680]), tensor([-2.2400]))
    """
    force = -(nbeta * grad + gamma * (w - anchor))
    velocity = velocity + eps**0.5 * force
    w = w + eps**0.5 / 2 * velocity
    velocity = momentum * velocity + math.sqrt(1 - momentum**2) * noise
    return w + eps**0.5 / 2 * velocity, velocity
