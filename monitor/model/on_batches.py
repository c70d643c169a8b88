"""A model's loss on kept minibatches by their number, as chains sample it."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from phasewatch.monitor.model.captured import AddGradient, CapturedGradient, Trace
from phasewatch.monitor.model.gradients import watched
from phasewatch.monitor.model.loss import ModelLoss
from phasewatch.monitor.model.minibatches import Batches
from phasewatch.monitor.model.pieces import in_pieces, pieces_beside, samples_in
from phasewatch.monitor.model.weights import Weights

TRANSIENT = 1.2
"""Memory of a pass over that of the activations that it keeps: language models' logits and their gradient."""

WORTH_CAPTURING = 100
"""Gradients from which faster passes are made for them. A CUDA graph costs three gradients, four more the first time.
"""

WORTH_HOLDING = 0.95
"""A CUDA graph is used where it takes less than this share of a plain pass's time, since it holds a pass's memory."""

SHARE_OF_FREE = 0.8
"""Share of a GPU's free memory that a graph and another pass beside it may take."""

AWAY = 1.25
"""Factor of the weights at which a CUDA graph is compared with plain passes too: far enough for old weights to be seen
beyond the rounding of half precision."""


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
        self._captured: CapturedGradient | None = None
        if loss.model.device.type == "cuda" and not loss.vectorised and loss.splits(self._first):
            held = sum(parameter.numel() * parameter.itemsize for parameter in loss.model.parameters)
            self._beside = self.vector.most(pieces_beside(held, loss.activations, samples_in(batches[0])))
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
        if self._captured is not None and all(parameter.grad is None for parameter in self.parameters):
            if not part and scale == 1.0 and not watched(self.parameters):
                return self._captured(batch)
            self._captured.lend()
        if part:
            return self._loss.add_gradient(in_pieces(batch, self._parts)[0][1], scale)
        whole = self._pieces == 1 and not watched(self.parameters)
        return self._loss.add_gradient(batch, scale, pieces=self._pieces, for_chains=whole)

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

    @torch.no_grad()
    def prepare_gradients(self, passes: int) -> None:
        """Have many gradients taken by a compiled loss, where that was asked for, and by a CUDA graph.

        Each is tried once for each loss, and kept where it is right; a graph, where it is faster and fits.

        Args:
            passes: for how many gradients it is.
        """
        self._captured = None
        if not self._on_a_gpu or self._pieces > 1 or passes < WORTH_CAPTURING:
            return
        with torch.enable_grad():
            if self._loss.to_compile:
                self._compile()
            if self._loss.captured is not False and self._fits_twice():
                self._capture()

    @property
    def _on_a_gpu(self) -> bool:
        """Whether chains run in place on a GPU, with minibatches of one shape."""
        return self._loss.model.device.type == "cuda" and not self.vectorised and self._batches.stacked is not None

    def _compile(self) -> None:
        """Have the loss compiled, if gradients are then the same."""
        plain = self._traces(self._loss.add_gradient)
        found: list[Trace] = []

        def agrees() -> bool:
            self._traces(self._for_chains)
            found.extend(self._traces(self._for_chains))
            return self._agree(plain, found)

        self._loss.compile_for_chains(agrees)
        if self._loss.for_chains is not self._loss.loss:
            now, before = (1000 * min(trace.seconds for trace in traces) for traces in (found, plain))
            self._loss.path += f" The loss is compiled: a pass takes {now:.1f} ms, and {before:.1f} ms without."

    def _capture(self) -> None:
        """Have a CUDA graph, if gradients are then the same, and faster."""
        try:
            plain = self._traces(self._for_chains) if self._loss.captured is None else []
            self._captured = CapturedGradient(self.parameters, self._for_chains, self._batches[0])
            if plain:
                self._loss.captured = self._is_worth_it(plain, self._traces(self._captured))
        except torch.OutOfMemoryError:
            self._captured = None
        except Exception:  # a pass that asks for a number on the host, say
            self._loss.captured = False
        if not self._loss.captured:
            self._captured = None

    @property
    def _for_chains(self) -> AddGradient:
        return partial(self._loss.add_gradient, for_chains=True)

    def _fits_twice(self) -> bool:
        """Whether memory allows another pass beside the one that a graph holds."""
        free = torch.cuda.mem_get_info(self._loss.model.device)[0]
        held = sum(parameter.numel() * parameter.itemsize for parameter in self.parameters)
        return 0 < 2 * self.bytes_of_a_pass(1) + 2 * held < SHARE_OF_FREE * free

    def _traces(self, add_gradient: AddGradient) -> list[Trace]:
        """Those of two minibatches, one of them at other weights; the weights are put back but for rounding."""
        traces = []
        for number, factor in zip(range(self.minibatches)[-2:], (1.0, AWAY), strict=False):
            self._scale(factor)
            traces.append(Trace.of(self.parameters, add_gradient, self._batches[number]))
            self._scale(1 / factor)
        return traces

    @torch.no_grad()
    def _scale(self, factor: float) -> None:
        for parameter in self.parameters:
            parameter.mul_(factor)

    def _agree(self, plain: list[Trace], other: list[Trace]) -> bool:
        return all(a.agrees(b, self._loss.tolerance) for a, b in zip(plain, other, strict=True))

    def _is_worth_it(self, plain: list[Trace], graph: list[Trace]) -> bool:
        """Whether a graph is the loss on other minibatches and at other weights, and faster."""
        if not self._agree(plain, graph):
            return False
        before, now = (min(trace.seconds for trace in traces) for traces in (plain, graph))
        if faster := now < WORTH_HOLDING * before:
            self._loss.path += f" A pass is a CUDA graph: {1000 * now:.1f} ms, and {1000 * before:.1f} ms without."
        return faster

    def settle(self, pieces: int, way: str) -> None:
        """Take each minibatch in so many pieces from now on; `way` says how chains run, for the record."""
        self._pieces = pieces
        self._loss.way = way

    def bytes_of_a_pass(self, pieces: int) -> int:
        """Memory that a pass takes beside the weights, on a GPU; 0 where that isn't known."""
        gradient = sum(parameter.numel() * parameter.itemsize for parameter in self.parameters)
        return max(int(TRANSIENT * self._loss.activations) // pieces, gradient) if self._loss.activations else 0

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
