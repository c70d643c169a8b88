"""The parameters of a model that chains move in place, and where the anchor's weights are kept meanwhile."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from phasewatch.monitor.model.rounded import publish
from phasewatch.monitor.model.weights import Weights
from phasewatch.monitor.snapshots.transfers import onto


class Position(Protocol):
    """Where a chain is, and where it came from.

    Attributes:
        weights: where it is, in the precision that chains are kept in: the parameters themselves, unless those are of
            half precision.
    """

    weights: Weights

    def origin(self, number: int) -> Tensor:
        """A parameter of w*, on the parameters' device; it isn't to be changed."""
        ...

    def put(self, numbers: Sequence[int], values: Sequence[Tensor]) -> None:
        """Move some parameters."""
        ...


Keep: TypeAlias = Callable[[Sequence[Tensor], Weights], Position]
"""Makes the position of a model's parameters and an anchor."""


class AnchorOnDevice:
    """The anchor lies beside the parameters: one set of weights.

    Args:
        parameters: of the model.
        anchor: w*, on any device; not copied where it lies on the parameters' own.

    Attributes:
        weights: where the chain is.
        kept: the anchor, on the parameters' device.
    """

    def __init__(self, parameters: Sequence[Tensor], anchor: Weights) -> None:
        self._parameters = parameters
        self.kept = [onto(parameters[0].device, weight) for weight in anchor]
        self.weights = _own(parameters, anchor)

    def origin(self, number: int) -> Tensor:
        """A parameter of w*."""
        return self.kept[number]

    def put(self, numbers: Sequence[int], values: Sequence[Tensor]) -> None:
        """Move some parameters."""
        _write([self.weights[k] for k in numbers], values)
        publish(self._parameters, self.weights, numbers)


class DisplacementOnDevice:
    """The displacement w − w* lies beside the parameters in bfloat16: half a set of weights.

    The chain is where the displacement says, so that rounding it doesn't move w*. In bfloat16 a displacement has two to
    three digits, which is far less than its noise, where the weights themselves would lose the steps altogether.

    Args:
        parameters: of the model, which are at w*.
        anchor: w*, on the host.

    Attributes:
        weights: where the chain is.
        kept: the displacement.
    """

    def __init__(self, parameters: Sequence[Tensor], anchor: Weights) -> None:
        self._parameters = parameters
        self.weights = _own(parameters, anchor)
        self.kept = [torch.zeros_like(weight, dtype=torch.bfloat16) for weight in self.weights]

    def origin(self, number: int) -> Tensor:
        """A parameter of w*."""
        return self.weights[number] - self.kept[number].to(self.weights[number].dtype)

    def put(self, numbers: Sequence[int], values: Sequence[Tensor]) -> None:
        """Move some parameters, as far as a displacement in bfloat16 can say."""
        for k, value in zip(numbers, values, strict=True):
            origin = self.origin(k)
            self.kept[k].copy_(value - origin)
            self.weights[k].copy_(origin.add_(self.kept[k]))
        publish(self._parameters, self.weights, numbers)


class AnchorOnHost:
    """The anchor stays in the host's memory, and comes a parameter ahead of where it is needed: no set of weights.

    Args:
        parameters: of the model.
        anchor: w*, on the host.
    """

    def __init__(self, parameters: Sequence[Tensor], anchor: Weights) -> None:
        self._parameters = parameters
        self._anchor = [weight.cpu().pin_memory() if parameters[0].is_cuda else weight for weight in anchor]
        self.weights = _own(parameters, anchor)
        self._stream = torch.cuda.Stream(parameters[0].device) if parameters[0].is_cuda else None
        self._ahead: dict[int, Tensor] = {}

    def origin(self, number: int) -> Tensor:
        """A parameter of w*."""
        if self._stream is None:
            return self._anchor[number]
        here = torch.cuda.current_stream(self.weights[number].device)
        found = self._ahead.pop(number, None)
        if found is None:
            found = self._fetched(number)
        here.wait_stream(self._stream)
        found.record_stream(here)
        self._ahead = {following: self._fetched(following) for following in [(number + 1) % len(self._anchor)]}
        return found

    def put(self, numbers: Sequence[int], values: Sequence[Tensor]) -> None:
        """Move some parameters."""
        _write([self.weights[k] for k in numbers], values)
        publish(self._parameters, self.weights, numbers)

    def _fetched(self, number: int) -> Tensor:
        with torch.cuda.stream(self._stream):
            return self._anchor[number].to(self.weights[number].device, non_blocking=True)


def _own(parameters: Sequence[Tensor], anchor: Weights) -> Weights:
    """The parameters, where they are of the anchor's precision; a step of a chain is smaller than half precision."""
    return [
        parameter.data if parameter.dtype == weight.dtype else weight.to(parameter.device, copy=True)
        for parameter, weight in zip(parameters, anchor, strict=True)
    ]


@torch.no_grad()
def _write(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    if into[0].device == values[0].device:
        torch._foreach_copy_(list(into), list(values))  # pyright: ignore[reportPrivateImportUsage]
        return
    for tensor, value in zip(into, values, strict=True):
        tensor.copy_(value, non_blocking=True)
