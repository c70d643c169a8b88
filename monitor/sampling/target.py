"""What is sampled: a loss as a function of parameters and of a minibatch's number."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from phasewatch.monitor.model.gradients import Vector
from phasewatch.monitor.model.weights import Weights


class Target(Protocol):
    """The loss that chains sample."""

    @property
    def parameters(self) -> Sequence[Tensor]:
        """What is sampled, in place; each a leaf that requires a gradient."""
        ...

    @property
    def vector(self) -> Vector:
        """The same as one vector, over all processes that hold a part of it."""
        ...

    @property
    def minibatches(self) -> int:
        """How many there are."""
        ...

    @property
    def whole(self) -> bool:
        """Whether the minibatches together are the loss that is sampled, and not a sample of it."""
        ...

    @property
    def most_pieces(self) -> int:
        """Into how many pieces a minibatch can be split."""
        ...

    def settle(self, pieces: int, way: str) -> None:
        """Take each minibatch in so many pieces from now on; `way` says how chains run, for the record."""
        ...

    def bytes_of_a_pass(self, pieces: int) -> int:
        """Memory that a pass in pieces takes beside the weights; 0 where that isn't known."""
        ...

    @property
    def vectorised(self) -> bool:
        """Whether `rows` and `rows_and_gradients` can be used."""
        ...

    def set(self, weights: Sequence[Tensor]) -> None:
        """Replace the values of the parameters."""
        ...

    def loss(self, number: int) -> Tensor:
        """The loss on a minibatch at the parameters' values, a scalar without a gradient."""
        ...

    @property
    def share(self) -> float:
        """Share of a minibatch's samples that is a part of it, 1 where there's room for a pass beside a gradient."""
        ...

    def add_gradient(self, number: int, scale: float = 1.0, *, part: bool = False) -> Tensor:
        """Add `scale` times the gradient on a minibatch to each parameter's `grad`; returns the loss, a scalar.

        Args:
            number: of the minibatch.
            scale: of the gradient.
            part: whether to take only a part of its samples.
        """
        ...

    def prepare_gradients(self, anchor: Weights) -> None:
        """Make ready for `loss` and `add_gradient` around w*; the parameters may be elsewhere afterwards."""
        ...

    def many_gradients(self, count: int, weights: Weights) -> AbstractContextManager[None]:
        """Have so many calls of `add_gradient` inside give the same gradients, but sooner.

        Parameters may hold their weights in bfloat16 inside, and then hold their gradients so too. Whoever moves such
        weights writes them into the parameters.

        Args:
            count: of the calls.
            weights: of each parameter, in the precision of chains; the parameters hold them.
        """
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


class Refused(Exception):
    """The model can't take weights that the sampler went to."""


class Guarded:
    """A target whose errors away from an anchor are told from those that come up at the anchor too.

    Args:
        target: what to ask.

    Attributes:
        anchor: weights that the model has to take.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self.parameters = target.parameters
        self.vector = target.vector
        self.minibatches = target.minibatches
        self.whole = target.whole
        self.vectorised = target.vectorised
        self.set = target.set
        self.loss = target.loss
        self.settle = target.settle
        self.bytes_of_a_pass = target.bytes_of_a_pass
        self.prepare = target.prepare
        self.prepare_gradients = target.prepare_gradients
        self.many_gradients = target.many_gradients
        self.rows = target.rows
        self.anchor: Weights = []

    @property
    def share(self) -> float:
        """As the target's."""
        return self._target.share

    @property
    def most_pieces(self) -> int:
        """As the target's."""
        return self._target.most_pieces

    def add_gradient(self, number: int, scale: float = 1.0, *, part: bool = False) -> Tensor:
        """As the target's.

        Raises:
            Refused: for an error that doesn't come up at the anchor.
        """
        try:
            return self._target.add_gradient(number, scale, part=part)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._target.set(self.anchor)
            self._target.add_gradient(number)
            raise Refused from error

    def rows_and_gradients(self, weights: Weights, which: Tensor) -> tuple[Tensor, Weights]:
        """As the target's.

        Raises:
            Refused: for an error that doesn't come up at the anchor.
        """
        try:
            return self._target.rows_and_gradients(weights, which)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            rows = [weight.expand(len(which), *weight.shape) for weight in self.anchor]
            self._target.rows_and_gradients(rows, which)
            raise Refused from error
