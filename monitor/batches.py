"""Minibatches drawn once and kept, so that each one's loss at the snapshot is worked out once."""

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Generator, Tensor
from torch.utils._pytree import tree_leaves, tree_map

from phasewatch.monitor.data import HeldData, Minibatches, move

FEWEST = 32
"""Minibatches kept at least, unless the chains take fewer steps or all the data makes fewer."""

SAMPLES_PER_NBETA = 100
"""Samples kept for each unit of nβ: chains fit the noise of the n samples they see, which takes nβ/n of λ̂ away."""

MOST_BYTES = 2**30
"""What the kept minibatches may weigh, unless the fewest weigh more."""


class Batches:
    """Minibatches in order, stacked along a leading axis where all have one shape.

    Args:
        batches: of the form that the loss takes.

    Attributes:
        stacked: the same form with a leading axis (minibatch,); None where the shapes differ.
    """

    def __init__(self, batches: Sequence[Any]) -> None:
        self.stacked = tree_map(lambda *leaves: torch.stack(leaves), *batches) if _of_one_shape(batches) else None
        self._loose = list(batches) if self.stacked is None else []
        self._count = len(batches)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Any:
        if self.stacked is None:
            return self._loose[number]
        return tree_map(lambda leaf: leaf[number], self.stacked)

    def take(self, which: Tensor) -> Self:
        """Some of them, by number.

        Args:
            which: shape (row,).

        Returns:
            A minibatch for each row.
        """
        taken = type(self)([])
        taken._count = len(which)
        if self.stacked is None:
            taken._loose = [self._loose[number] for number in which.tolist()]
        else:
            taken.stacked = tree_map(lambda leaf: leaf[which], self.stacked)
        return taken


def keep_minibatches(
    source: Minibatches, batch_size: int, *, nbeta: float, steps: int, generator: Generator, device: torch.device
) -> Batches:
    """Draw the minibatches that the chains will see: all the data, or as many as they need.

    Args:
        source: of the data.
        batch_size: samples in a minibatch.
        nbeta: nβ.
        steps: that all chains take together; more minibatches than that are of no use.
        generator: on the CPU.
        device: where to keep them.

    Returns:
        At least one minibatch. Those of data that is held are drawn without replacement, epoch after epoch.
    """
    wanted = min(steps, max(FEWEST, math.ceil(SAMPLES_PER_NBETA * nbeta / batch_size)))
    if not isinstance(source, HeldData):
        first = move(source(generator, batch_size), device)
        wanted = _affordable(wanted, first)
        return Batches([first, *(move(source(generator, batch_size), device) for _ in range(wanted - 1))])
    wanted = _affordable(wanted, source.rows(torch.arange(batch_size)))
    if source.size % batch_size == 0:
        wanted = min(wanted, source.size // batch_size)
    if source.size == batch_size:
        return Batches([move(source.rows(torch.arange(batch_size)), device)])
    epochs = math.ceil(wanted * batch_size / source.size)
    rows = torch.cat([torch.randperm(source.size, generator=generator) for _ in range(epochs)])
    return Batches([move(source.rows(rows[i * batch_size : (i + 1) * batch_size]), device) for i in range(wanted)])


def order_of_minibatches(count: int, steps: int, generator: Generator) -> Tensor:
    """Which minibatch each step of a chain takes: all of them in a random order, then all of them in another.

    Args:
        count: how many minibatches there are.
        steps: of the chain.
        generator: on the CPU.

    Returns:
        Numbers of shape (step,).
    """
    epochs = [torch.randperm(count, generator=generator) for _ in range(math.ceil(steps / count))]
    return torch.cat(epochs)[:steps]


def _affordable(wanted: int, batch: Any) -> int:
    size = sum(leaf.numel() * leaf.itemsize for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
    return min(wanted, max(FEWEST, MOST_BYTES // max(size, 1)))


def _of_one_shape(batches: Sequence[Any]) -> bool:
    """Whether they can be stacked; those of a collate function that pads may not."""
    leaves = [tree_leaves(batch) for batch in batches]
    if not all(isinstance(leaf, Tensor) for some in leaves for leaf in some):
        return False
    shapes = [[(leaf.shape, leaf.dtype) for leaf in some] for some in leaves]
    return bool(shapes) and all(shape == shapes[0] for shape in shapes)
