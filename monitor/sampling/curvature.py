"""The loss around a snapshot before a chain is run: its slope, its largest curvature, and its minibatches' noise.

All of it is worked out in the parameters and the gradients of the model itself, so that it takes no memory of the
model's size beside those and the snapshot's weights.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from phasewatch.monitor.model.gradients import Vector, clear_gradients, gradients, square
from phasewatch.monitor.model.weights import Mask, mask_of
from phasewatch.monitor.sampling.position import Position
from phasewatch.monitor.sampling.random_streams import groups_of
from phasewatch.monitor.sampling.target import Target

MINIBATCHES = 8
"""Most minibatches whose gradients tell slope and noise. Each costs a gradient; both errors fall with their root."""

ITERATIONS = 8
"""Steps of the power iteration, of two gradients each. After 8 of them the largest curvature is 6 to 7 %
too low where a spectrum goes on evenly below it, and less where it stands apart (tests/monitor/sampling)."""

ALTERNATING = 2
"""Minibatches that the power iteration takes in turn, so that none of them alone sets its direction."""


@dataclass(frozen=True)
class Surroundings:
    """The loss around a snapshot.

    Attributes:
        curvature: h, the largest absolute eigenvalue of the Hessian, from below; NaN where a gradient isn't finite.
        slope: ‖∇L‖² over the sampled weights, free of the minibatches' noise.
        slope_error: its standard error over minibatches.
        noise: tr Cov(∇L_m), the variance of a minibatch's gradient.
    """

    curvature: float
    slope: float
    slope_error: float
    noise: float


def look_around(
    target: Target, position: Position, masks: Mask, *, nbeta: float, gamma: float, generator: Generator
) -> Surroundings:
    """Look around a snapshot. It costs 24 gradients at most, and leaves the parameters at the snapshot.

    Args:
        target: the loss.
        position: of the parameters, which are at w*.
        masks: which weights are sampled.
        nbeta: nβ.
        gamma: γ; with nβ it sets the distance over which curvature is measured, that of the chains.
        generator: on the anchor's device, for the power iteration's start.

    Returns:
        What there is to see.
    """
    slope, slope_error, noise = _moments(target, masks)
    if not math.isfinite(slope):
        return Surroundings(math.nan, slope, slope_error, noise)
    curvature = _largest_curvature(target, position, masks, nbeta=nbeta, gamma=gamma, generator=generator)
    _return(position, groups_of(target.vector.sizes))
    return Surroundings(curvature, slope, slope_error, noise)


def _moments(target: Target, masks: Mask) -> tuple[float, float, float]:
    """‖∇L‖² without noise, its standard error, and tr Cov of one minibatch's gradient.

    The mean gradient of one half of the minibatches is multiplied with each one of the other half, so that their noise
    averages out. Where the minibatches together are the loss, and no more than are looked at, their mean has
    no noise. Of others a part will do, whose noise is larger as its samples are fewer.
    """
    count = min(target.minibatches, MINIBATCHES)
    exact = count == 1 or (target.whole and count == target.minibatches)
    first = count if exact else count // 2
    clear_gradients(target.parameters)
    squares: list[Tensor] = []
    products: list[Tensor] = []

    def see(grad: Tensor, held: Tensor | None) -> None:
        squares[-1] += square(grad)
        if products and held is not None:
            products[-1] += torch.dot(grad.flatten(), held.flatten())

    vector = target.vector
    zero = torch.zeros((), dtype=torch.float64, device=target.parameters[0].device)
    for number in range(first):
        squares.append(zero.clone())
        with vector.intercepted(masks, see, add=True):
            target.add_gradient(number, part=not exact)
    if exact:
        total = sum((square(grad) for grad in vector.counted(list(gradients(target.parameters, None)))), zero)
        slope = float(vector.total(total)) / first**2
        return slope, 0.0, max(float(vector.total(torch.stack(squares)).mean()) - slope, 0.0)
    for number in range(first, count):
        squares.append(zero.clone())
        products.append(zero.clone())
        with vector.intercepted(masks, see, add=False):
            target.add_gradient(number, part=not exact)
    along = vector.total(torch.stack(products)) / first
    slope = float(along.mean())
    error = math.sqrt(2) * float(along.std()) / math.sqrt(len(along)) if len(along) > 1 else math.inf
    return slope, error, target.share * max(float(vector.total(torch.stack(squares)).mean()) - slope, 0.0)


def _largest_curvature(
    target: Target, position: Position, masks: Mask, *, nbeta: float, gamma: float, generator: Generator
) -> float:
    """The largest absolute curvature by power iteration on central differences of gradients.

    The direction v is kept as the parameters' displacement from w*, and its product with the Hessian is a gradient,
    (∇L(w* + r·v) − ∇L(w* − r·v)) / 2r. The differences are taken over r = 1/√(nβ·h + γ), as far as chains go in that
    direction, so that kinks and higher orders count as much as they will for the chains.
    """
    parameters, minibatches = target.parameters, min(ALTERNATING, target.minibatches)
    vector = target.vector
    groups = groups_of(vector.sizes)
    _start_direction(vector, masks, generator)
    curvatures, reach = [0.0], 1e-3 * (1 + vector.norm(position.weights) / math.sqrt(vector.size))
    for iteration in range(ITERATIONS):
        number = iteration % minibatches
        length = vector.norm(list(gradients(parameters, None)))
        if not math.isfinite(length):
            return math.nan
        if length == 0:
            break
        _move_along_the_gradients(parameters, position, groups, reach / length)
        clear_gradients(parameters)
        target.add_gradient(number, part=True)
        _mirror(position, groups)
        target.add_gradient(number, -1.0, part=True)
        product = vector.norm(list(gradients(parameters, masks))) / (2 * reach)
        if not math.isfinite(product):
            return math.nan
        curvatures.append(product or curvatures[-1])
        reach = reach_of(curvatures[-1], nbeta=nbeta, gamma=gamma)
    clear_gradients(parameters)
    return max(curvatures[-minibatches:])


@torch.no_grad()
def _move_along_the_gradients(
    parameters: Sequence[Tensor], position: Position, groups: Sequence[Sequence[int]], distance: float
) -> None:
    """To w* + distance · the gradients that are held."""
    grads = list(gradients(parameters, None))
    for group in groups:
        origin = [position.origin(k) for k in group]
        along = [grads[k].to(weight.dtype) for k, weight in zip(group, origin, strict=True)]
        position.put(group, torch._foreach_add(origin, along, alpha=distance))  # pyright: ignore[reportPrivateImportUsage]


@torch.no_grad()
def _mirror(position: Position, groups: Sequence[Sequence[int]]) -> None:
    """To the other side of w*."""
    for group in groups:
        across = torch._foreach_mul([position.origin(k) for k in group], 2)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_sub_(across, [position.weights[k] for k in group])  # pyright: ignore[reportPrivateImportUsage]
        position.put(group, across)


@torch.no_grad()
def _return(position: Position, groups: Sequence[Sequence[int]]) -> None:
    """To w*."""
    for group in groups:
        position.put(group, [position.origin(k) for k in group])


def _start_direction(vector: Vector, masks: Mask, generator: Generator) -> None:
    """Turn the gradients that are held into their direction plus a random one of about the same length."""
    length = vector.norm(list(gradients(vector.parameters, masks))) or 1.0
    for number, grad in enumerate(gradients(vector.parameters, None)):
        noise, mask = vector.noise(number, generator, grad), mask_of(masks, number)
        grad.div_(length).add_(noise if mask is None else noise.mul_(mask), alpha=vector.size**-0.5)


def reach_of(curvature: float, *, nbeta: float, gamma: float) -> float:
    """How far chains go in a direction of this curvature, 1/√(nβ·h + γ)."""
    return max(nbeta * curvature + gamma, 1e-12) ** -0.5
