"""The gradient of a loss on minibatches of one shape as a CUDA graph: one call in place of thousands of kernel starts.

A graph repeats the kernels of one pass on the memory that they had then. Python isn't run again, so a loss whose
kernels depend on more than the weights and the minibatch is another function in a graph. So a graph is only used where
its losses and gradients are those of plain passes on other minibatches and at other weights than it was made with.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from phasewatch.monitor.model.gradients import clear_gradients, square

AddGradient: TypeAlias = Callable[[Any], Tensor]
"""Adds the gradient on a minibatch to the parameters' `grad`, and returns the loss."""

WARM_UP = 2
"""Passes before the one that is captured, on a stream of their own: torch asks for some."""


class CapturedGradient:
    """A loss's gradient on a minibatch as a CUDA graph, which holds the memory of a pass for as long as it lives.

    Args:
        parameters: of the model, on a GPU.
        add_gradient: the plain pass.
        batch: a minibatch of the shapes of all, of tensors on the GPU.

    Raises:
        RuntimeError: by torch, for a pass that can't be captured: one that asks for a number on the host, say.
    """

    def __init__(self, parameters: Sequence[Tensor], add_gradient: AddGradient, batch: Any) -> None:
        self._parameters = parameters
        self._batch = tree_map(torch.clone, batch)
        aside = _aside(parameters[0].device)
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                clear_gradients(parameters)
                add_gradient(self._batch)
        torch.cuda.current_stream().wait_stream(aside)
        clear_gradients(parameters)
        self._graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[parameters[0].get_device()]
        own = generator.graphsafe_get_state()
        generator.graphsafe_set_state(torch.Generator(generator.device))  # one that a failed capture may leave unusable
        try:
            with torch.cuda.graph(self._graph, stream=aside, capture_error_mode="thread_local"):
                self._loss = add_gradient(self._batch)
            self._grads = [parameter.grad for parameter in parameters]
        finally:
            generator.graphsafe_set_state(own)
            clear_gradients(parameters)

    def __call__(self, batch: Any) -> Tensor:
        """Let each parameter hold its gradient on a minibatch, and return the loss."""
        for into, leaf in zip(tree_leaves(self._batch), tree_leaves(batch), strict=True):
            into.copy_(leaf)
        self._graph.replay()
        for parameter, grad in zip(self._parameters, self._grads, strict=True):
            parameter.grad = grad
        return self._loss.clone()

    def lend(self) -> None:
        """Let each parameter hold a gradient of 0 in the graph's own memory, for plain passes to add to."""
        for parameter, grad in zip(self._parameters, self._grads, strict=True):
            parameter.grad = None if grad is None else grad.zero_()


@functools.cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """The stream of all graphs of a GPU: cuBLAS holds a workspace of tens of MiB for each that it ever worked on."""
    return torch.cuda.Stream(device)


@dataclass(frozen=True)
class Trace:
    """What a pass gives, in few enough numbers to be kept: another function of the weights gives others.

    Attributes:
        loss: of the minibatch.
        length: of the gradient.
        along: products of each parameter's gradient with its weights and with a random direction, shape (parameter, 2).
        seconds: that the pass took.
    """

    loss: float
    length: float
    along: Tensor
    seconds: float

    @classmethod
    def of(cls, parameters: Sequence[Tensor], add_gradient: AddGradient, batch: Any) -> Self:
        """That of a pass on a minibatch at the weights as they are; the gradients are forgotten."""
        clear_gradients(parameters)
        torch.cuda.synchronize()
        began = time.perf_counter()
        loss = add_gradient(batch)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        generator = torch.Generator(parameters[0].device).manual_seed(0)
        along, squares = [], []
        for parameter in parameters:
            exact = torch.promote_types(parameter.dtype, torch.float32)
            grad, weight = parameter.grad, parameter.detach().flatten().to(exact)
            grad = torch.zeros_like(weight) if grad is None else grad.flatten().to(weight.dtype)
            unit = weight.norm().clamp_min(torch.finfo(weight.dtype).tiny)
            direction = torch.randn(weight.shape, generator=generator, device=weight.device, dtype=weight.dtype)
            along.append(torch.stack([weight @ grad / unit, direction @ grad / len(grad) ** 0.5]).double())
            squares.append(square(grad))
        clear_gradients(parameters)
        return cls(float(loss), float(torch.stack(squares).sum().sqrt()), torch.stack(along), seconds)

    def agrees(self, other: Self, tolerance: float) -> bool:
        """Whether another pass is the same but for rounding; not where a number is NaN."""
        return (
            abs(self.loss - other.loss) <= tolerance * abs(self.loss)
            and abs(self.length - other.length) <= tolerance * self.length
            and float((self.along - other.along).abs().max()) <= tolerance * self.length
        )
