"""The gradients that parameters hold: forgotten, masked, and looked at as they come."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from phasewatch.monitor.model.weights import Mask, mask_of


def clear_gradients(parameters: Sequence[Tensor]) -> None:
    """Forget the gradients."""
    for parameter in parameters:
        parameter.grad = None


def gradients(parameters: Sequence[Tensor], masks: Mask) -> Iterator[Tensor]:
    """The gradient that each parameter holds, masked in place; zeros where none reached it."""
    for number, parameter in enumerate(parameters):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        elif (mask := mask_of(masks, number)) is not None:
            parameter.grad.mul_(mask)
        yield parameter.grad


@contextmanager
def intercepted(
    parameters: Sequence[Tensor], masks: Mask, see: Callable[[Tensor, Tensor | None], object], *, add: bool
) -> Iterator[None]:
    """Look at each gradient of the backward passes inside as it comes, a parameter at a time.

    Args:
        parameters: whose gradients to look at.
        masks: applied to each.
        see: gets the new gradient, and the one that the parameter holds already.
        add: whether the new gradient is added to the one that is there, as usual, or dropped.
    """

    def hook(number: int) -> Callable[[Tensor], Tensor]:
        def seen(grad: Tensor) -> Tensor:
            mask = mask_of(masks, number)
            grad = grad if mask is None else grad * mask
            dense = grad.to_dense() if grad.layout is not torch.strided else grad  # of a sparse embedding
            see(dense.detach(), parameters[number].grad)
            return grad if add else torch.zeros_like(grad)

        return seen

    handles = [parameter.register_hook(hook(number)) for number, parameter in enumerate(parameters)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def square(tensor: Tensor) -> Tensor:
    """The squared Euclidean length of a tensor in float64, without a copy of it."""
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).square()


def norm(tensors: Sequence[Tensor]) -> float:
    """The Euclidean length of several tensors as one vector."""
    lengths = torch._foreach_norm(list(tensors))  # pyright: ignore[reportPrivateImportUsage]
    return float(torch.linalg.vector_norm(torch.stack(list(lengths)), dtype=torch.float64))
