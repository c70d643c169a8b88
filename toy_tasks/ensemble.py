"""Several models of one shape trained as one, which on a GPU takes little longer than one of them."""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import cached_property
from itertools import count
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils._pytree import tree_map

EAGER = 3
"""Steps taken before the next one is captured as a CUDA graph: they compile the loss and make the optimizer's state."""


class Ensemble(nn.Module):
    """Models of one shape, each parameter stacked along a first axis of members.

    An optimizer that treats every number by itself, as Adam and SGD do, trains each member as it would alone.

    Args:
        models: at least one, without buffers; they are copied.
        loss: `loss(model, batch)` of one of them, the mean over the batch.
    """

    def __init__(self, models: Sequence[nn.Module], loss: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.size = len(models)
        self._one = [_Loss(deepcopy(models[0]), loss)]  # in a list, so that its parameters aren't the ensemble's
        stacked, _ = stack_module_state([_Loss(model, loss) for model in models])
        self._names = list(stacked)
        self.stacked = nn.ParameterList(nn.Parameter(tensor.detach().clone()) for tensor in stacked.values())

    def losses(self, batches: Any) -> Tensor:
        """The loss of each member on its own batch.

        Args:
            batches: tensors of shape (member, batch, ...).

        Returns:
            Shape (member,).
        """
        return self._vmapped(dict(zip(self._names, self.stacked, strict=True)), batches)

    def member(self, index: int) -> nn.Module:
        """A copy of one of the models as it is now."""
        model = deepcopy(self._one[0].model).to(self.stacked[0].device)
        with torch.no_grad():
            for parameter, stacked in zip(model.parameters(), self.stacked, strict=True):
                parameter.copy_(stacked[index])
        return model

    @cached_property
    def _vmapped(self) -> Callable[[dict[str, Tensor], Any], Tensor]:
        one = self._one[0]
        function = vmap(lambda parameters, batch: functional_call(one, parameters, (batch,)))
        return torch.compile(function, dynamic=False) if self.stacked[0].is_cuda else function


class _Loss(nn.Module):
    """A loss as a module of its own, whose parameters can be exchanged for a call."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Any) -> Tensor:
        return self._loss(self.model, batch)


def steps_together(
    ensemble: Ensemble,
    data: Callable[[Generator, int], Any],
    optimizer: torch.optim.Optimizer,
    batch_size: int,
    seed: int,
) -> Iterator[int]:
    """Train all members in place, each on fresh batches of its own.

    On a GPU a step is captured as a CUDA graph, without which launching its small kernels takes most of the time; the
    optimizer must then be made with `capturable=True`, and `data` must not wait for the device.

    Args:
        ensemble: what is trained.
        data: `data(generator, batch_size)`.
        optimizer: of the ensemble's parameters.
        batch_size: samples in each member's batch.
        seed: of the batches, which are drawn on the ensemble's device: first those of the first member.

    Yields:
        The number of steps taken so far, after each of them, without end.
    """
    device = next(ensemble.parameters()).device
    generator = Generator(device).manual_seed(seed)

    def take() -> None:
        optimizer.zero_grad()
        drawn = data(generator, ensemble.size * batch_size)
        ensemble.losses(tree_map(lambda leaf: leaf.unflatten(0, (ensemble.size, -1)), drawn)).sum().backward()
        optimizer.step()

    if device.type != "cuda":
        for step in count(1):
            take()
            yield step
    else:
        yield from _captured(take, generator)


def _captured(take: Callable[[], None], generator: Generator) -> Iterator[int]:
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    for step in range(1, EAGER + 1):
        with torch.cuda.stream(aside):
            take()
        torch.cuda.current_stream().wait_stream(aside)
        yield step
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        take()
    for step in count(EAGER + 1):
        graph.replay()
        yield step
