"""What the surroundings of a snapshot look like before a chain is run: slope, curvature, and the minibatches' noise."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

ROUNDS = 4
"""Minibatches in a group, as far as there are as many."""

ITERATIONS = 8
"""Steps of the power iteration at a snapshot."""


class Target(Protocol):
    """What is sampled: the loss as a function of flat weights and of a minibatch's number, row by row."""

    @property
    def minibatches(self) -> int:
        """How many minibatches there are."""
        ...

    @property
    def whole(self) -> bool:
        """Whether the minibatches together are the loss that is sampled, and not a sample of it."""
        ...

    def prepare(self, rows: int) -> None:
        """Make ready for many calls of `losses_and_grads` with this many rows."""
        ...

    def losses(self, weights: Tensor, which: Tensor) -> Tensor:
        """Losses of shape (row,) at weights of shape (row, parameter), or all rows at one of shape (parameter,)."""
        ...

    def losses_and_grads(self, weights: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of shape (row,) and their gradients of shape (row, parameter)."""
        ...


class Refused(Exception):
    """The model can't take weights that the sampler went to."""


def attempt(target: Target, anchor: Tensor, weights: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    """`target.losses_and_grads(weights, which)` where the model may not take these weights.

    Args:
        target: the loss.
        anchor: weights that the model does take, shape (parameter,).
        weights: shape (row, parameter).
        which: minibatches, shape (row,).

    Returns:
        Losses and gradients.

    Raises:
        Refused: for an error that doesn't come up at the anchor; one that does is raised as it is.
    """
    try:
        return target.losses_and_grads(weights, which)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        target.losses_and_grads(anchor.expand(len(which), -1), which)
        raise Refused from error


@dataclass(frozen=True)
class Survey:
    """The loss around a snapshot.

    Attributes:
        curvature: h, the largest absolute eigenvalue of the Hessian; from below, by power iteration.
        direction: its eigenvector, shape (parameter,).
        gradient: ∇L on some of the minibatches, shape (parameter,); of the weights that are sampled.
        slope: ‖∇L‖², free of the minibatches' noise.
        slope_error: its standard error over minibatches.
        noise: tr Cov(∇L_m), the variance of a minibatch's gradient.
    """

    curvature: float
    direction: Tensor
    gradient: Tensor
    slope: float
    slope_error: float
    noise: float


def survey(
    target: Target,
    anchor: Tensor,
    mask: Tensor | None,
    *,
    means: int,
    rows: int,
    nbeta: float,
    gamma: float,
    generator: Generator,
) -> Survey:
    """Look around a snapshot; it costs `means` · (ROUNDS + ITERATIONS) gradients, and holds `means` of them.

    Args:
        target: the loss.
        anchor: w*, shape (parameter,).
        mask: 1 for the weights that are sampled and 0 for others, shape (parameter,); None for all.
        means: of how many groups of minibatches to compare the mean gradients.
        rows: minibatches at a time.
        nbeta: nβ.
        gamma: γ; with nβ it sets the distance over which curvature is measured, that of the chains.
        generator: on the anchor's device, for the power iteration's start.

    Returns:
        The survey; a curvature of NaN where the gradient isn't finite.

    Raises:
        Refused: if the model can't take weights close to the anchor.
    """
    means = min(means, target.minibatches)
    rounds = max(1, min(ROUNDS, target.minibatches // means))
    numbers = torch.arange(means * rounds, device=anchor.device).view(rounds, means)

    def gradients(at: Tensor, which: Tensor) -> Iterator[Tensor]:
        for some in which.split(rows):
            found = attempt(target, anchor, at.expand(len(some), -1), some)[1]
            yield found if mask is None else found.mul_(mask)

    def gradient(at: Tensor) -> Tensor:
        return functools.reduce(Tensor.add_, (some.sum(0) for some in gradients(at, numbers[0]))).div_(means)

    total, start = anchor.new_zeros(means, len(anchor)), anchor
    for number, which in enumerate(numbers):
        for into, some in zip(total.split(rows), gradients(anchor, which), strict=True):
            into += some
        start = total.mean(0) if number == 0 else start
    slope, slope_error, noise = _moments(
        total.div_(rounds), rounds, whole=target.whole and means * rounds == target.minibatches
    )
    del total
    if not start.isfinite().all():
        return Survey(math.nan, start, start, slope, slope_error, noise)

    direction = torch.randn(anchor.shape, generator=generator, dtype=anchor.dtype, device=anchor.device)
    direction = direction if mask is None else direction * mask
    tiny = torch.finfo(start.dtype).tiny
    along = start / start.norm().clamp_min(tiny)
    direction = along + direction / direction.norm().clamp_min(tiny).copysign(direction @ along)
    curvature, direction = steepest(gradient, anchor, start, direction, nbeta=nbeta, gamma=gamma, iterations=ITERATIONS)
    return Survey(curvature, direction, start, slope, slope_error, noise)


def steepest(
    gradient: Callable[[Tensor], Tensor],
    at: Tensor,
    grad: Tensor,
    direction: Tensor,
    *,
    nbeta: float,
    gamma: float,
    iterations: int,
) -> tuple[float, Tensor]:
    """The largest absolute curvature of a loss by power iteration on differences of gradients.

    The differences are taken over 1/√(nβ·h + γ), as far as chains go in that direction, so that kinks and higher
    orders count as much as they will for the chains.

    Args:
        gradient: ∇L at weights of shape (parameter,).
        at: where, shape (parameter,).
        grad: ∇L there, shape (parameter,).
        direction: to start from, shape (parameter,); with zero, all is flat.
        nbeta: nβ.
        gamma: γ.
        iterations: gradients to spend.

    Returns:
        The absolute curvature, NaN where a gradient isn't finite, and its direction, of length 1.
    """
    direction = direction / direction.norm().clamp_min(torch.finfo(direction.dtype).tiny)
    reach = torch.as_tensor(1e-3 * (1 + at.norm().item() / math.sqrt(at.numel())))
    curvature = at.new_zeros(())
    for _ in range(iterations):
        turned = (gradient(at + reach * direction) - grad) / reach
        if not turned.isfinite().all():
            return math.nan, direction
        curvature, direction = power_step(turned, curvature, direction)
        reach = reach_of(curvature, nbeta=nbeta, gamma=gamma)
    return curvature.item(), direction


def power_step(turned: Tensor, curvature: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """A step of power iteration, which stays where it is if the product can't be used.

    Args:
        turned: the Hessian times the direction, shape (..., parameter).
        curvature: the one so far, shape (...).
        direction: the one so far, shape (..., parameter), or one that broadcasts with `turned`.

    Returns:
        The length of the product, and its direction.
    """
    length = turned.norm(dim=-1)
    usable = length.isfinite() & (length > 0)
    turned = torch.where(usable.unsqueeze(-1), turned / length.unsqueeze(-1), direction)
    return torch.where(usable, length, curvature), turned


def reach_of(curvature: Tensor, *, nbeta: float, gamma: float) -> Tensor:
    """How far chains go in a direction of this curvature, 1/√(nβ·h + γ)."""
    return (nbeta * curvature + gamma).clamp_min(1e-12).rsqrt()


def _moments(grads: Tensor, rounds: int, *, whole: bool) -> tuple[float, float, float]:
    """‖∇L‖² without noise, its standard error, and tr Cov of one minibatch's gradient, from means of `rounds` each.

    Where they are of the `whole` of the minibatches, their mean has no noise.
    """
    products = (grads @ grads.T).double()
    rows = len(products)
    if rows == 1:
        return products.item(), 0.0, 0.0
    apart = (products.sum(1) - products.diagonal()) / (rows - 1)
    noise = max(rounds * (products.diagonal().mean() - apart.mean()).item(), 0.0)
    if whole:
        return products.mean().item(), 0.0, noise
    return apart.mean().item(), 2 * apart.std().item() / math.sqrt(rows), noise
