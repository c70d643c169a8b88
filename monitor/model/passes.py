"""Gradients of a loss on whole minibatches for chains in place: by plain passes, a compiled loss, a CUDA graph."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from phasewatch.monitor.model.captured import AddGradient, CapturedGradient, Trace
from phasewatch.monitor.model.gradients import watched
from phasewatch.monitor.model.isolation import untouched_randomness
from phasewatch.monitor.model.loss import ModelLoss, first_line
from phasewatch.monitor.model.minibatches import Batches
from phasewatch.monitor.model.rounded import AWAY, rounded, scaled
from phasewatch.monitor.model.weights import Weights

WORTH_CAPTURING = 40
"""Steps from which a CUDA graph is made for them. It costs three gradients, four more the first time."""

WORTH_KEEPING_UP = 1.05
"""A CUDA graph is used where it takes less than this share of a plain pass's time. Tried alone, a plain pass may be as
fast. In a chain it is late now and then: at 1.4 billion parameters a quarter of steps took 98 ms and more, for 85."""

SHARE_OF_FREE = 0.8
"""Share of a GPU's free memory that a graph and another pass beside it may take."""


class Passes:
    """A loss's gradients on minibatches, by the fastest passes that are right.

    Which those are is found out once for each loss. A CUDA graph is made anew by each of these, since it holds memory.

    Args:
        loss: of the model.
        batches: the minibatches.
    """

    def __init__(self, loss: ModelLoss, batches: Batches) -> None:
        self._loss = loss
        self._batches = batches
        self._parameters = loss.model.parameters
        self._captured: CapturedGradient | None = None

    def add_gradient(self, batch: Any, scale: float) -> Tensor:
        """As `ModelLoss.add_gradient`, by a plain pass where parameters have hooks, of which a graph calls none."""
        if watched(self._parameters):
            self.lend()
            return self._loss.add_gradient(batch, scale)
        if self._captured is not None and scale == 1.0 and not self._hold_gradients:
            return self._captured(batch)
        self.lend()
        return self._loss.add_gradient(batch, scale, for_chains=True)

    def lend(self) -> None:
        """Have a plain pass write its gradients to the memory of the graph, where there is one."""
        if self._captured is not None and not self._hold_gradients:
            self._captured.lend()

    @property
    def _hold_gradients(self) -> bool:
        return any(parameter.grad is not None for parameter in self._parameters)

    def compile(self, anchor: Weights) -> None:
        """Compile the loss, where that was asked for and gives the same gradients.

        Args:
            anchor: weights to try it at; the parameters may be elsewhere afterwards.
        """
        if self._on_a_gpu and self._loss.to_compile:
            self._loss.model.set(anchor)
            with torch.enable_grad(), untouched_randomness(0):  # a loss may draw, and is tried for one snapshot alone
                self._compile()

    @contextmanager
    def many(self, count: int, weights: Weights) -> Iterator[None]:
        """Take gradients inside with parameters in bfloat16 and by a CUDA graph, where that is right and faster.

        Args:
            count: of the gradients.
            weights: of each parameter, in the precision of chains; the parameters hold them.
        """
        loss = self._loss
        plain = loss.for_chains is loss.loss and not watched(self._parameters)
        captures = self._on_a_gpu and count >= WORTH_CAPTURING and loss.captured is not False
        with rounded(self._parameters, weights, loss.rounded if plain else []):
            if captures and self._fits_twice():
                with torch.enable_grad(), untouched_randomness(0):
                    self._capture(weights)
            try:
                yield
            finally:
                self._captured = None

    @property
    def _on_a_gpu(self) -> bool:
        """Whether the loss is taken on a GPU, on minibatches of one shape."""
        return self._loss.model.device.type == "cuda" and self._batches.stacked is not None

    def _compile(self) -> None:
        """Have the loss compiled, if gradients are then the same; where they aren't, say so once."""
        loss = self._loss
        weights = [parameter.data for parameter in self._parameters]
        loss.to_compile, plain = False, self._traces(loss.add_gradient, weights)
        # Kernels that are chosen by timing them would round otherwise in another process.
        loss.for_chains = torch.compile(loss.loss, dynamic=False, options={"deterministic": True})
        reason = "its compiled loss differs from its plain one"
        try:
            self._traces(self._for_chains, weights)
            found = self._traces(self._for_chains, weights)
            if self._agree(plain, found):
                now, before = (1000 * min(trace.seconds for trace in traces) for traces in (found, plain))
                loss.path += f" The loss is compiled: a pass takes {now:.1f} ms, and {before:.1f} ms without."
                return
        except Exception as error:
            reason = first_line(error)
        loss.for_chains = loss.loss
        loss.warn_once(
            f"Probe(compiled=True): {type(loss.model.module).__name__} can't be compiled ({reason}), so chains take "
            "its loss as it is, which is slower.",
            "compiled",
        )

    def _capture(self, weights: Weights) -> None:
        """Have a CUDA graph, if gradients are then the same, and faster."""
        try:
            plain = self._traces(self._for_chains, weights) if self._loss.captured is None else []
            self._captured = CapturedGradient(self._parameters, self._for_chains, self._batches[0])
            if plain:
                self._loss.captured = self._is_worth_it(plain, self._traces(self._captured, weights))
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
        device = self._loss.model.device
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + kept
        return 0 < 2 * self._loss.bytes_of_a_pass(1) + 2 * self._loss.model.nbytes < SHARE_OF_FREE * free

    def _traces(self, add_gradient: AddGradient, weights: Weights) -> list[Trace]:
        """Those of two minibatches, one of them at other weights."""
        traces = []
        for number, factor in zip(range(len(self._batches))[-2:], (1.0, AWAY), strict=False):
            with scaled(self._parameters, weights, factor):
                traces.append(Trace.of(self._parameters, add_gradient, self._batches[number]))
        return traces

    def _agree(self, plain: list[Trace], other: list[Trace]) -> bool:
        return all(a.agrees(b, self._loss.tolerance) for a, b in zip(plain, other, strict=True))

    def _is_worth_it(self, plain: list[Trace], graph: list[Trace]) -> bool:
        """Whether a graph is the loss on other minibatches and at other weights, and faster."""
        if not self._agree(plain, graph):
            return False
        before, now = (min(trace.seconds for trace in traces) for traces in (plain, graph))
        if faster := now < WORTH_KEEPING_UP * before:
            self._loss.path += f" A pass is a CUDA graph: {1000 * now:.1f} ms, and {1000 * before:.1f} ms without."
        return faster
