"""What is sampled: a loss as a function of parameters and of a minibatch's number."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from phasewatch.monitor.model.weights import Weights


class Target(Protocol):
    """The loss that chains sample.

    Attributes:
        parameters: what is sampled, in place; each a leaf that requires a gradient.
        minibatches: how many there are.
        whole: whether the minibatches together are the loss that is sampled, and not a sample of it.
        vectorised: whether `rows` and `rows_and_gradients` can be used.
    """

    parameters: Sequence[Tensor]
    minibatches: int
    whole: bool
    vectorised: bool

    def set(self, weights: Sequence[Tensor]) -> None:
        """Replace the values of the parameters."""
        ...

    def loss(self, number: int) -> Tensor:
        """The loss on a minibatch at the parameters' values, a scalar without a gradient."""
        ...

    def add_gradient(self, number: int, scale: float = 1.0) -> Tensor:
        """Add `scale` times the gradient on a minibatch to each parameter's `grad`; returns the loss, a scalar."""
        ...

    def prepare(self, rows: int) -> None:
        """Make ready for many calls of `rows_and_gradients` with this many rows."""
        ...

    def rows(self, weights: Weights, which: Tensor) -> Tensor:
        """Losses of shape (row,) at weights of shape (row, ...), or all rows at one set of weights.

        Args:
            weights: one tensor for each parameter.
            which: the minibatch of each row, shape (row,).
        """
        ...

    def rows_and_gradients(self, weights: Weights, which: Tensor) -> tuple[Tensor, Weights]:
        """Losses of shape (row,) and their gradients, of the shape of the weights.

        Args:
            weights: one tensor for each parameter, of shape (row, ...).
            which: the minibatch of each row, shape (row,).
        """
        ...
