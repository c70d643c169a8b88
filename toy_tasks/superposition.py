"""The toy model of superposition with two hidden dimensions, whose plateaus and their complexity are known.

f(x) = ReLU(Wᵀ W x + b) reads c features through two hidden dimensions and reconstructs them from inputs with one
feature on: x = μ·eᵢ, i uniform, μ uniform on [0, 1] (Elhage et al. 2022; Chen et al. 2023, arXiv 2310.06301). Regular
k-gons, k columns of W at equal angles and lengths, are critical points, and training stays near one for a while before
it falls to the next. A feature outside the polygon has a zero column; it is "+" if its bias is positive, 1/(2c), and
dead otherwise. Known, as loss and learning coefficient λ:

    c = 5: 4-gon 0.06667, 5-gon 0.01583 (λ 7)
    c = 6: 5-gon 0.06874 (λ 7), 5+-gon 0.06180 (λ 8.5), 6-gon 0.04819 (λ 8.5)

The paper lists the losses; each λ is half the number of directions in which the population loss curves. A 4-gon's
outputs stay on the kink of the ReLU, where that doesn't hold.

Measured with `training` on ten seeds each, about 0.2 ms a step: with c = 5 all of them are at the 5-gon by step 1,600.
With c = 6 nine end at the 5+-gon by step 2,500, four of them after a rest within 0.001 of the 5-gon's loss (from step
630 to 1,580 at the longest), which makes λ rise from 7 to 8.5; one ends at the 6-gon.
"""

import math
from collections.abc import Iterator

import torch
from torch import Generator, Tensor, nn
from torch.autograd.functional import hessian, jacobian

from phasewatch.toy_tasks.steps import steps


class SuperpositionData:
    """Inputs x = μ·eᵢ. Called as `data(generator, batch_size)`, it returns x of shape (batch, feature).

    Args:
        features: c.
    """

    def __init__(self, features: int) -> None:
        self.features = features

    def __call__(self, generator: Generator, batch_size: int) -> Tensor:
        """Draw a batch on the generator's device."""
        which = torch.randint(self.features, (batch_size, 1), generator=generator, device=generator.device)
        size = torch.rand(batch_size, 1, generator=generator, device=generator.device)
        return torch.zeros(batch_size, self.features, device=generator.device).scatter(1, which, size)


class SuperpositionModel(nn.Module):
    """f(x) = ReLU(Wᵀ W x + b).

    Args:
        features: c.
        dtype: of the weights.
    """

    def __init__(self, features: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, features, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(features, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct x of shape (batch, feature)."""
        return (x @ self.weight.mT @ self.weight + self.bias).relu()


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Squared error summed over the features, mean over the batch (not halved, as in the paper)."""
    return (model(batch) - batch).square().sum(-1).mean()


def training(model: nn.Module, data: SuperpositionData, *, seed: int = 0) -> Iterator[int]:
    """Train a model in place: SGD, learning rate 0.1, batch 1,024, every sample seen once.

    Args:
        model: such as `SuperpositionModel(6)`.
        data: where the batches are drawn from.
        seed: of the batches, which are drawn on the model's device.

    Yields:
        The number of steps taken so far, after each of them, without end.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    yield from steps(model, loss, data, optimizer, 1024, seed)


def population_loss(weight: Tensor, bias: Tensor) -> Tensor:
    """The expectation of the loss over the data, in closed form (Chen et al. 2023, lemma 3.1).

    Output j answers to input μ·eᵢ with ReLU(g·μ + b), which is linear in μ on the share φ of [0, 1] where it isn't 0.

    Args:
        weight: W, shape (2, feature).
        bias: b, shape (feature,).

    Returns:
        A scalar.
    """
    gain = weight.mT @ weight
    at_one, at_zero = (gain + bias).relu(), bias.relu().expand_as(gain)
    flat = gain == 0
    share = torch.where(flat, (bias > 0).to(gain), (at_one - at_zero) / torch.where(flat, 1.0, gain))
    squares = share * (at_one.square() + at_one * at_zero + at_zero.square()) / 3
    # On the diagonal g ≥ 0, so that the share is the upper end of [0, 1]
    u, v, phi = at_one.diagonal(), at_zero.diagonal(), share.diagonal()
    with_input = phi * ((1 - phi) * (u + v) / 2 + phi * (2 * u + v) / 6)
    return (squares.sum() + (1 / 3 - 2 * with_input).sum()) / len(bias)


def polygon(features: int, k: int, *, positive: int = 0) -> SuperpositionModel:
    """The critical point that is a regular k-gon.

    Args:
        features: c.
        k: corners, at least 4 and at most c.
        positive: how many of the c − k other features have the positive bias 1/(2c); the rest are dead, with bias −1/2.

    Returns:
        The model, float64.

    Raises:
        ValueError: if there are too few features.
    """
    if not 4 <= k <= features or not 0 <= positive <= features - k:
        raise ValueError(
            f"polygon(features={features}, k={k}, positive={positive}): k must lie from 4 to the number of features, "
            "and positive from 0 to what is left of them."
        )
    angles = 2 * math.pi * torch.arange(k, dtype=torch.float64) / k
    directions = torch.stack((angles.cos(), angles.sin()))
    if k == 4:  # the corners don't disturb each other
        length, bias = 1.0, 0.0
        directions = directions.round()
    else:
        length, bias = _critical_size(directions)
    model = SuperpositionModel(features, dtype=torch.float64)
    with torch.no_grad():
        model.weight.zero_()
        model.weight[:, :k] = length * directions
        model.bias[:k] = bias
        model.bias[k : k + positive] = 1 / (2 * features)
        model.bias[k + positive :] = -0.5
    return model


def _critical_size(directions: Tensor) -> tuple[float, float]:
    """Length and bias of the corners, by Newton's method: other features don't change what is best for these."""

    def polygon_loss(size: Tensor) -> Tensor:
        return population_loss(size[0] * directions, size[1].expand(directions.shape[1]))

    size = torch.tensor([1.2, -0.3], dtype=torch.float64)
    for _ in range(50):
        size = size - torch.linalg.solve(hessian(polygon_loss, size), jacobian(polygon_loss, size))
    return size[0].item(), size[1].item()


def local_llc(model: SuperpositionModel, tolerance: float = 1e-9) -> float:
    """Half the rank of the population loss's Hessian: λ at a minimum where every other direction is flat.

    Args:
        model: at a minimum, float64, away from the kinks of its ReLUs.
        tolerance: eigenvalues below it count as 0.

    Returns:
        λ.

    Raises:
        ValueError: if an eigenvalue is negative (a saddle has no learning coefficient), or the loss isn't smooth there.
    """
    features = model.bias.numel()
    weight = model.weight.detach()
    if ((weight.mT @ weight).abs() + model.bias.detach().abs() < tolerance).any():
        raise ValueError("local_llc: an output stays on the kink of its ReLU, where half a rank isn't λ.")

    def flat_loss(flat: Tensor) -> Tensor:
        return population_loss(flat[: 2 * features].reshape(2, features), flat[2 * features :])

    flat = torch.cat((weight.flatten(), model.bias.detach())).double()
    values = torch.linalg.eigvalsh(hessian(flat_loss, flat))
    if values[0] < -tolerance:
        raise ValueError(f"local_llc: a saddle, whose Hessian has the eigenvalue {values[0]:.2g}, and not a minimum.")
    return int((values > tolerance).sum()) / 2
