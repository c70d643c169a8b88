"""The gradient of a loss on minibatches of one shape as a CUDA graph: one call in place of thousands of kernel starts.

A graph repeats the kernels of one pass on the memory that they had then. Python isn't run again, so a loss whose
kernels depend on more than the weights and the minibatch is another function in a graph. So a graph is only used where
its losses and gradients are those of plain passes on other minibatches and at other weights than it was made with.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from phasewatch.monitor.model.gradients import clear_gradients, intercepted, square

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
        aside = torch.cuda.Stream()
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
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
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

    def agrees(self, add_gradient: AddGradient, batch: Any, tolerance: float) -> bool:
        """Whether a plain pass gives the same loss and gradient.

        Args:
            add_gradient: the plain pass.
            batch: another minibatch than that which was captured.
            tolerance: relative, of the loss and of the gradient's length.
        """
        found, squares = self(batch), []

        def see(grad: Tensor, held: Tensor | None) -> None:
            squares.append(torch.stack([square(grad), square(grad if held is None else grad - held)]))

        with intercepted(self._parameters, None, see, add=False):
            expected = add_gradient(batch)
        clear_gradients(self._parameters)
        length, off = torch.stack(squares).sum(0).sqrt().tolist()
        gap = abs(float(expected - found))
        return off <= tolerance * length and gap <= tolerance * abs(float(expected))  # neither holds of NaN
