"""The gradients that parameters hold: forgotten, masked, and looked at as they come."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Generator, Tensor

from phasewatch.monitor.model.weights import Mask, mask_of

_Thing = TypeVar("_Thing")


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


def watched(parameters: Sequence[Tensor]) -> bool:
    """Whether a backward pass has hooks to call, which a CUDA graph of it leaves out."""
    return any(parameter._backward_hooks for parameter in parameters)  # torch has no public word for it


def square(tensor: Tensor) -> Tensor:
    """The squared Euclidean length of a tensor in float64, without a copy of it; a GPU adds up in float32."""
    precise = not tensor.is_cuda or tensor.dtype == torch.float64
    return torch.linalg.vector_norm(tensor, dtype=torch.float64 if precise else torch.float32).double().square()


def norm(tensors: Sequence[Tensor]) -> float:
    """The Euclidean length of several tensors as one vector."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    lengths = torch._foreach_norm(list(tensors), dtype=dtype)  # pyright: ignore[reportPrivateImportUsage]
    return float(torch.linalg.vector_norm(torch.stack(list(lengths)), dtype=torch.float64))


class Vector:
    """The sampled parameters as one vector, of which this process holds all (`shards.ShardedVector` is of many).

    Args:
        parameters: that are sampled.

    Attributes:
        parameters: as given.
        sizes: elements of each whole parameter.
        ranks: processes that hold the parameters together.

    Example:
        >>> vector = Vector([torch.zeros(2, 3), torch.zeros(4)])
        >>> vector.size, vector.norm([torch.zeros(2, 3), torch.ones(4)])
        (10, 2.0)
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self.sizes = [parameter.numel() for parameter in parameters]
        self.ranks = 1

    @property
    def size(self) -> int:
        """Elements of all."""
        return sum(self.sizes)

    @property
    def offsets(self) -> list[int] | None:
        """Where what this process holds of each parameter begins in it; None where a part isn't contiguous in it."""
        return [0] * len(self.sizes)

    def total(self, sums: Tensor) -> Tensor:
        """Sums over this process's parameters, added over all processes."""
        return sums

    def counted(self, things: Sequence[_Thing]) -> Sequence[_Thing]:
        """Those of one thing for each parameter that sums take from this process."""
        return things

    def norm(self, tensors: Sequence[Tensor]) -> float:
        """The Euclidean length of one tensor for each parameter, as one vector."""
        return norm(tensors)

    def count(self, masks: Mask) -> int:
        """How many elements move."""
        if masks is None:
            return self.size
        moving = [p.numel() if m is None else int(m.sum()) for p, m in zip(self.parameters, masks, strict=True)]
        return int(self.total(torch.tensor(sum(self.counted(moving)), device=self.parameters[0].device)))

    def all(self, here: bool) -> bool:
        """Whether something holds on every process."""
        return here

    def most(self, here: int) -> int:
        """The largest of the numbers of all processes."""
        return here

    def noise(self, number: int, generator: Generator, like: Tensor) -> Tensor:
        """Standard normal noise of a parameter, of the type of a tensor."""
        return torch.empty_like(like).normal_(generator=generator)

    def part(self, group: Sequence[int], flat: Tensor) -> Tensor:
        """What this process needs of a vector of the whole of some parameters."""
        return flat

    def intercepted(
        self, masks: Mask, see: Callable[[Tensor, Tensor | None], object], *, add: bool
    ) -> AbstractContextManager[None]:
        """Look at each gradient that sums take from this process, as `intercepted` does."""
        return intercepted(self.parameters, masks, see, add=add)

    def agree(self, **what: object) -> None:
        """Compare what the processes are about to do."""

    def together(self) -> AbstractContextManager[None]:
        """Say in a sentence inside that another process has ended."""
        return nullcontext()
