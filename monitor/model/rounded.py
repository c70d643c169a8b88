"""Parameters in bfloat16 for passes in mixed precision, which round them in any case.

Under `torch.autocast` each pass rounds the weights of matrix products to bfloat16, and turns their gradients, which
come in bfloat16, into float32. A pass that is given such weights rounded, and whose gradients are left as they come, is
the same function by the same kernels, and reads and writes 12 bytes less for each weight.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from phasewatch.monitor.model.captured import AddGradient
from phasewatch.monitor.model.gradients import clear_gradients
from phasewatch.monitor.model.isolation import repeatable

AWAY = 0.5
"""Factor of the weights at which passes are tried too, a power of two."""


@contextmanager
def rounded(parameters: Sequence[Tensor], weights: Sequence[Tensor], numbers: Sequence[int]) -> Iterator[None]:
    """Let some parameters hold their weights in bfloat16 inside; gradients that they hold are forgotten.

    Args:
        parameters: of a model.
        weights: the float32 weight of each, which the parameter holds again afterwards.
        numbers: of the parameters to round.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.001]))
        >>> kept = weight.data
        >>> with rounded([weight], [kept], [0]):
        ...     weight.data
        tensor([1.], dtype=torch.bfloat16)
        >>> weight.data is kept or weight.data.data_ptr() == kept.data_ptr()
        True
    """
    some = [parameters[number] for number in numbers]
    clear_gradients(some)
    for number in numbers:
        parameters[number].data = weights[number].to(torch.bfloat16)
    try:
        yield
    finally:
        clear_gradients(some)
        for number in numbers:
            parameters[number].data = weights[number]


def rounded_parameters(
    parameters: Sequence[Tensor],
    value: Callable[[Any], Tensor],
    add_gradient: AddGradient,
    batches: Sequence[Any],
) -> list[int]:
    """The parameters that passes use rounded alone, if rounded ones give the same bit for bit.

    They are tried on two minibatches, the second of them at other weights.

    Args:
        parameters: of the model; they hold no gradients afterwards.
        value: the loss on a minibatch.
        add_gradient: its gradient.
        batches: some minibatches.

    Returns:
        Their numbers.
    """
    weights = [parameter.data for parameter in parameters]
    with torch.enable_grad(), repeatable() if parameters[0].is_cuda else nullcontext():
        try:
            numbers = used_rounded(value(batches[0]), parameters)
            for number, factor in enumerate((1.0, AWAY) if numbers else ()):
                batch = batches[number % len(batches)]
                with scaled(parameters, weights, factor):
                    plain = Signature(parameters, add_gradient, batch)
                    with rounded(parameters, weights, numbers):
                        other = Signature(parameters, add_gradient, batch)
                if not plain.equals(other):
                    return []
        except Exception:  # memory that runs out, or a loss that asks its weights for float32
            return []
        finally:
            clear_gradients(parameters)
    return numbers


@contextmanager
def scaled(parameters: Sequence[Tensor], weights: Sequence[Tensor], factor: float) -> Iterator[None]:
    """Multiply weights by a power of two inside, which changes none of their digits.

    Args:
        parameters: of a model.
        weights: the weight of each, which the parameter holds, or holds in half precision.
        factor: the power of two.
    """
    _multiply(parameters, weights, factor)
    try:
        yield
    finally:
        _multiply(parameters, weights, 1 / factor)


def _multiply(parameters: Sequence[Tensor], weights: Sequence[Tensor], factor: float) -> None:
    for weight in weights:
        weight.mul_(factor)
    publish(parameters, weights, range(len(parameters)))


def publish(parameters: Sequence[Tensor], weights: Sequence[Tensor], numbers: Iterable[int]) -> None:
    """Write weights into the parameters of half precision among those of some numbers."""
    for k in numbers:
        if parameters[k].dtype != weights[k].dtype:
            parameters[k].data.copy_(weights[k])


def used_rounded(value: Tensor, parameters: Sequence[Tensor]) -> list[int]:
    """The float32 parameters whose only use in a loss is the one place where they are turned into bfloat16.

    Args:
        value: the loss, whose graph is walked through and freed.
        parameters: of the model; they hold no gradients afterwards.

    Returns:
        Their numbers.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        ...     value = layer(torch.ones(1, 2)).sum() + layer.bias.sum()
        >>> used_rounded(value, [layer.weight, layer.bias])
        [0]
    """
    uses = _uses(value, parameters)
    casts = {
        number: nodes[0]
        for number, nodes in enumerate(uses)
        if len(nodes) == 1
        and nodes[0].name() == "ToCopyBackward0"
        and parameters[number].dtype == torch.float32
        and type(parameters[number].data) is Tensor
    }
    if not casts:
        return []
    types: dict[int, torch.dtype] = {}

    def note(number: int, grads: Sequence[Tensor]) -> None:
        types[number] = grads[0].dtype

    for number, node in casts.items():
        node.register_prehook(lambda grads, number=number: note(number, grads))
    value.backward()
    clear_gradients(parameters)
    return [number for number in casts if types.get(number) == torch.bfloat16]


def _uses(value: Tensor, parameters: Sequence[Tensor]) -> list[list[Any]]:
    """The nodes of a graph that take each parameter, one for each time that they do."""
    place = {id(parameter): number for number, parameter in enumerate(parameters)}
    uses: list[list[Any]] = [[] for _ in parameters]
    todo, seen = [value.grad_fn], {value.grad_fn}
    while todo:
        node = todo.pop()
        for child, _ in () if node is None else node.next_functions:
            number = place.get(id(getattr(child, "variable", None)))
            if number is not None:
                uses[number].append(node)
            elif child not in seen:
                seen.add(child)
                todo.append(child)
    return uses


class Signature:
    """What tells a pass from any other that isn't the same bit for bit: its loss, and two numbers of each gradient.

    Args:
        parameters: of the model, which hold no gradients afterwards.
        add_gradient: the pass.
        batch: a minibatch.

    Attributes:
        numbers: shape (1 + 2·parameters,).
    """

    def __init__(self, parameters: Sequence[Tensor], add_gradient: AddGradient, batch: Any) -> None:
        clear_gradients(parameters)
        loss = add_gradient(batch)
        found = [loss.reshape(1).double()]
        for parameter in parameters:
            if parameter.grad is not None:
                grad = parameter.grad.flatten()
                grad = grad.float() if grad.dtype == torch.bfloat16 else grad
                found.append(torch.stack([grad.sum(), torch.linalg.vector_norm(grad)]).double())
            parameter.grad = None
        self.numbers = torch.cat(found)

    def equals(self, other: "Signature") -> bool:
        """Whether another pass is the same."""
        return torch.equal(self.numbers, other.numbers)
