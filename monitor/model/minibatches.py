"""Minibatches drawn once and kept, so that each one's loss at the snapshot is worked out once."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Generator, Tensor
from torch.utils._pytree import tree_leaves, tree_map

from phasewatch.monitor.model.data import HeldData, Minibatches, move

FEWEST = 8
"""Minibatches kept for a chain at least, unless it takes fewer steps or all the data makes fewer."""

SAMPLES_PER_NBETA = 50
"""Samples kept for a chain for each unit of nβ: it fits the noise of the n samples it sees, which takes nβ/n off λ̂."""

MOST_BYTES = 2**30
"""What the kept minibatches may weigh, unless the fewest weigh more."""


class Batches:
    """Minibatches in order, stacked along a leading axis where all have one shape.

    Args:
        batches: of the form that the loss takes.
        whole: whether they are all there is, so that each chain sees all of them.

    Attributes:
        stacked: the same form with a leading axis (minibatch,); None where the shapes differ.
    """

    def __init__(self, batches: Sequence[Any], *, whole: bool = True) -> None:
        self.whole = whole
        self.stacked = tree_map(lambda *leaves: torch.stack(leaves), *batches) if _of_one_shape(batches) else None
        self._loose = list(batches) if self.stacked is None else []
        self._count = len(batches)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Any:
        if self.stacked is None:
            return self._loose[number]
        return tree_map(lambda leaf: leaf[number], self.stacked)

    def changed(self, change: Callable[[Any], Any]) -> Self:
        """All of them in another form.

        Args:
            change: of the stacked form.
        """
        changed = type(self)([], whole=self.whole)
        changed._count = len(self)
        changed.stacked = change(self.stacked)
        return changed

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
            one = len(self) == 1  # all of the data, perhaps, which need not be copied for each row
            taken.stacked = tree_map(
                lambda leaf: leaf.expand(len(which), *leaf.shape[1:]) if one else leaf[which], self.stacked
            )
        return taken


def keep_minibatches(
    source: Minibatches,
    batch_size: int,
    *,
    nbeta: float,
    chains: int,
    steps: int,
    generator: Generator,
    device: torch.device,
) -> Batches:
    """Draw the minibatches that the chains will see: all the data for each of them, or as much as it needs of its own.

    Args:
        source: of the data.
        batch_size: samples in a minibatch.
        nbeta: nβ.
        chains: how many chains there are.
        steps: of a chain; more minibatches than that are of no use to it.
        generator: on the CPU.
        device: where to keep them.

    Returns:
        The minibatches; those of data that is held are drawn without replacement, epoch after epoch.
    """
    if isinstance(source, HeldData):
        first = source.rows(torch.arange(batch_size, device="cpu"))
    else:
        first = source(generator, batch_size)
    size = sum(leaf.numel() * leaf.itemsize for leaf in tree_leaves(first) if isinstance(leaf, Tensor))
    each = min(steps, max(FEWEST, math.ceil(SAMPLES_PER_NBETA * nbeta / batch_size)))
    each = min(each, max(FEWEST, MOST_BYTES // max(size * chains, 1)))
    wanted = chains * each
    if not isinstance(source, HeldData):
        return Batches([move(source(generator, batch_size), device) for _ in range(wanted)], whole=False)
    if source.size == batch_size:
        return Batches([move(first, device)])
    whole = source.size <= wanted * batch_size
    if whole and source.size % batch_size == 0:
        wanted = source.size // batch_size
    epochs = math.ceil(wanted * batch_size / source.size)
    rows = torch.cat([torch.randperm(source.size, generator=generator, device="cpu") for _ in range(epochs)])
    rows = rows[: wanted * batch_size].split(batch_size)
    return Batches([move(source.rows(some), device) for some in rows], whole=whole)


def order_of_minibatches(batches: Tensor, steps: int, generator: Generator) -> Tensor:
    """Which minibatch each step of a chain takes: all of its own in a random order, then all of them in another.

    Args:
        batches: the numbers of the chain's minibatches.
        steps: of the chain.
        generator: on the CPU.

    Returns:
        Numbers of shape (step,).
    """
    epochs = math.ceil(steps / len(batches))
    orders = [torch.randperm(len(batches), generator=generator, device="cpu") for _ in range(epochs)]
    return batches[torch.cat(orders)[:steps]]


def _of_one_shape(batches: Sequence[Any]) -> bool:
    """Whether they can be stacked; those of a collate function that pads may not."""
    leaves = [tree_leaves(batch) for batch in batches]
    if not all(isinstance(leaf, Tensor) for some in leaves for leaf in some):
        return False
    shapes = [[(leaf.shape, leaf.dtype) for leaf in some] for some in leaves]
    return bool(shapes) and all(shape == shapes[0] for shape in shapes)
