"""A model's loss on kept minibatches by their number, as chains sample it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from phasewatch.monitor.model.loss import ModelLoss
from phasewatch.monitor.model.minibatches import Batches
from phasewatch.monitor.model.passes import Passes
from phasewatch.monitor.model.pieces import in_pieces, pieces_beside, samples_in
from phasewatch.monitor.model.weights import Weights


class LossOnBatches:
    """A model's loss on kept minibatches by their number, the target of `run_chains`.

    Args:
        loss: of the model.
        batches: the minibatches.
    """

    def __init__(self, loss: ModelLoss, batches: Batches) -> None:
        self._loss = loss
        self._batches = batches
        forms = [form for form in loss.mask_forms if batches.stacked is not None and form.fits(batches.stacked)]
        self._for_rows = batches.changed(forms[0]) if forms and loss.vectorised else batches
        self.parameters = loss.model.parameters
        self.vector = loss.vector
        self.minibatches = len(batches)
        self._pieces = self._beside = 1
        self._passes = Passes(loss, batches)
        if loss.model.device.type == "cuda" and not loss.vectorised and loss.splits(self._first):
            self._beside = self.vector.most(pieces_beside(loss.model.nbytes, loss.activations, samples_in(batches[0])))
        self.whole = batches.whole
        self.vectorised = loss.vectorised and bool(forms)

    def set(self, weights: Sequence[Tensor]) -> None:
        """Replace the values of the parameters."""
        self._loss.model.set(weights)

    def loss(self, number: int) -> Tensor:
        """The loss on a minibatch at the parameters' values, a scalar without a gradient."""
        with torch.no_grad():
            pieces = (
                in_pieces(self._batches[number], self._pieces) if self._pieces > 1 else [(1.0, self._batches[number])]
            )
            whole = self._pieces == 1
            return torch.stack([share * self._loss.value(piece, for_chains=whole) for share, piece in pieces]).sum()

    def add_gradient(self, number: int, scale: float = 1.0, *, part: bool = False) -> Tensor:
        """Add `scale` times the gradient on a minibatch to each parameter's `grad`; returns the loss, a scalar.

        Args:
            number: of the minibatch.
            scale: of the gradient.
            part: whether to take only so many of its samples that there's room for another gradient.
        """
        batch = self._batches[number]
        if part:
            self._passes.lend()
            return self._loss.add_gradient(in_pieces(batch, self._parts)[0][1], scale)
        if self._pieces > 1:
            return self._loss.add_gradient(batch, scale, pieces=self._pieces)
        return self._passes.add_gradient(batch, scale)

    @property
    def share(self) -> float:
        """Share of a minibatch's samples that is a part of it."""
        return 1 / self._parts

    @property
    def _parts(self) -> int:
        return max(self._pieces, self._beside)

    @property
    def most_pieces(self) -> int:
        """Into how many pieces a minibatch can be split; 1 where its loss isn't the mean over its samples."""
        return samples_in(self._batches[0]) if self._loss.splits(self._first) else 1

    def prepare_gradients(self, anchor: Weights) -> None:
        """Compile the loss for chains in place, where that was asked for; the parameters may be moved."""
        if self._pieces == 1 and not self.vectorised:
            self._passes.compile(anchor)

    def many_gradients(self, count: int, weights: Weights) -> AbstractContextManager[None]:
        """Have this many gradients inside taken by faster passes, where there are any; see `Target`."""
        return self._passes.many(count, weights) if self._pieces == 1 and not self.vectorised else nullcontext()

    def settle(self, pieces: int, way: str) -> None:
        """Take each minibatch in so many pieces from now on; `way` says how chains run, for the record."""
        self._pieces = pieces
        self._loss.way = way

    def bytes_of_a_pass(self, pieces: int) -> int:
        """Memory that a pass takes beside the weights, on a GPU; 0 where that isn't known."""
        return self._loss.bytes_of_a_pass(pieces)

    @property
    def _first(self) -> list[Any]:
        return [self._batches[number] for number in range(min(2, self.minibatches))]

    def prepare(self, rows: int) -> None:
        """Compile for this many rows, where that helps."""
        if self.vectorised:
            zeros = torch.zeros(rows, dtype=torch.long, device=self._loss.model.device)
            self._loss.compile(self._for_rows.take(zeros))

    def rows(self, weights: Weights, which: Tensor) -> Tensor:
        """As `VectorisedLoss.rows`, on minibatches of these numbers, shape (row,)."""
        return self._loss.at_rows.rows(weights, self._for_rows.take(which))

    def rows_and_gradients(self, weights: Weights, which: Tensor) -> tuple[Tensor, Weights]:
        """As `VectorisedLoss.rows_and_gradients`, on minibatches of these numbers, shape (row,)."""
        return self._loss.at_rows.rows_and_gradients(weights, self._for_rows.take(which))
