"""The one training loop of the toy tasks."""

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import torch
from torch import Generator, Tensor, nn


def steps(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    data: Callable[[Generator, int], Any],
    optimizer: torch.optim.Optimizer,
    batch_size: int,
    seed: int,
) -> Iterator[int]:
    """Train a model in place on fresh batches.

    Args:
        model: what is trained.
        loss: `loss(model, batch)`.
        data: `data(generator, batch_size)`.
        optimizer: of the model's parameters.
        batch_size: samples in a batch.
        seed: of the batches, which are drawn on the model's device.

    Yields:
        The number of steps taken so far, after each of them, without end.
    """
    generator = Generator(next(model.parameters()).device).manual_seed(seed)
    for step in count(1):
        optimizer.zero_grad()
        loss(model, data(generator, batch_size)).backward()
        optimizer.step()
        yield step
