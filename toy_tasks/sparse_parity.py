"""Sparse parity: a perceptron that must find the few bits whose product is the label (Barak et al. 2022).

Nothing but the product of all k relevant bits says anything about the label, so that the loss stays at chance while
the network looks for them, and then falls at once. The search isn't blind (arXiv 2207.08799): all along, the gradient
is a little larger on the relevant bits, and the weights on them grow while neither loss nor accuracy shows it.

Measured with the defaults and `training` on three seeds, about 2 ms a step: loss and accuracy are at chance (1.00 and
0.50) up to step 1,300, 1,500 and 2,200. By then the relevant bits have gone from 0.06 to 0.07 of the squared movement
to 0.16, 0.20 and 0.21 of it. The loss falls within the next 500 steps, past shelves where half and three quarters of
the error are left.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from phasewatch.toy_tasks.steps import steps

Batch = tuple[Tensor, Tensor]
Metric = Callable[[nn.Module, Batch], float]


@dataclass(frozen=True)
class SparseParityData:
    """Uniform bits of ±1, and the product of the first k of them.

    Called as `data(generator, batch_size)`, it returns bits of shape (batch, n) and labels of ±1 of shape (batch,).
    Which bits are relevant makes no difference to a network that starts the same to all of them.

    Attributes:
        bits: n.
        relevant: k.
    """

    bits: int = 50
    relevant: int = 3

    def __call__(self, generator: Generator, batch_size: int) -> Batch:
        """Draw a batch on the generator's device."""
        shape = (batch_size, self.bits)
        x = 2.0 * torch.randint(2, shape, generator=generator, device=generator.device) - 1
        return x, x[:, : self.relevant].prod(-1)


class ParityMLP(nn.Module):
    """A hidden layer of ReLUs and one output; 5,201 parameters with the defaults.

    Args:
        bits: n.
        hidden: size of the hidden layer.
    """

    def __init__(self, bits: int = 50, hidden: int = 100) -> None:
        super().__init__()
        self.hidden = nn.Linear(bits, hidden)
        self.output = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """An output of shape (...,), whose sign is the label, from bits of shape (..., n)."""
        return self.output(self.hidden(x).relu()).squeeze(-1)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean hinge loss max(0, 1 − y·f(x)): 1 for a model that says nothing."""
    x, y = batch
    return (1 - y * model(x)).relu().mean()


def training(model: nn.Module, data: SparseParityData, *, seed: int = 0) -> Iterator[int]:
    """Train a model in place: SGD, learning rate 0.1, batch 256, every sample seen once.

    Args:
        model: such as `ParityMLP()`.
        data: where the batches are drawn from.
        seed: of the batches, which are drawn on the model's device.

    Yields:
        The number of steps taken so far, after each of them, without end.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    yield from steps(model, loss, data, optimizer, 256, seed)


def accuracy(model: nn.Module, batch: Batch) -> float:
    """Share of the labels whose sign the output has."""
    x, y = batch
    return (model(x) * y > 0).double().mean().item()


def weight_movement(initial: nn.Module) -> Metric:
    """A metric of hidden progress: how far the first layer's farthest weight has moved, ‖w − w₀‖_∞ (Barak et al. 2022).

    Args:
        initial: the model before its training, whose weights are copied.

    Returns:
        The metric, which looks at the model alone.
    """
    start = _first_weights(initial).clone()

    def farthest_weight(model: nn.Module, batch: Batch) -> float:
        now = _first_weights(model)
        return (now - start.to(now.device)).abs().max().item()

    return farthest_weight


def relevant_movement(data: SparseParityData, initial: nn.Module) -> Metric:
    """A metric of hidden progress: the share of the first layer's squared movement that is on the relevant bits.

    Args:
        data: the training data.
        initial: the model before its training, whose weights are copied.

    Returns:
        The metric, which looks at the model alone: about k/n while all bits move alike, 1 if only the relevant ones do,
        0 before any moves.
    """
    start = _first_weights(initial).clone()

    def share_of_movement(model: nn.Module, batch: Batch) -> float:
        now = _first_weights(model)
        squares = (now - start.to(now.device)).square().sum(0)
        return (squares[: data.relevant].sum() / squares.sum().clamp(min=torch.finfo(now.dtype).tiny)).item()

    return share_of_movement


def metrics(data: SparseParityData, initial: nn.Module) -> dict[str, Metric]:
    """Accuracy and the two measures of hidden progress as metrics of a probe, by name.

    Args:
        data: the training data.
        initial: the model before its training.

    Returns:
        Metrics for `Probe(metrics=...)`.
    """
    return {
        "accuracy": accuracy,
        "weight_movement": weight_movement(initial),
        "relevant_movement": relevant_movement(data, initial),
    }


def _first_weights(model: nn.Module) -> Tensor:
    return model.get_parameter("hidden.weight").detach()
