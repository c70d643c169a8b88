"""The random streams of the chains, by seed and chain alone: which minibatch each step takes, and its noise."""

import enum
import functools
import importlib.util
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Generator, Tensor

from phasewatch.monitor.model.minibatches import order_of_minibatches
from phasewatch.monitor.model.weights import Weights
from phasewatch.monitor.sampling.layout import chunks_of


class Stream(enum.IntEnum):
    """What a seed is for."""

    ORDER = 0
    NOISE = 1
    MINIBATCHES = 2
    SURVEY = 3


def chain_seed(seed: int, chain: int, stream: Stream) -> int:
    """A seed of its own for each chain and stream, the same for every snapshot.

    Example:
        >>> len({chain_seed(0, chain, stream) for chain in range(3) for stream in Stream})
        12
    """
    return int(np.random.SeedSequence([seed, chain, stream]).generate_state(1, np.uint64)[0] >> 1)


def minibatch_orders(seed: int, chains: int, steps: int, minibatches: int, *, whole: bool) -> Tensor:
    """Which minibatch each chain takes at each step.

    Unless the minibatches are all there is, each chain has some of its own, so that the spread of the chains shows what
    the choice of minibatches adds to the error.

    Args:
        seed: of the chains.
        chains: how many there are.
        steps: of a chain.
        minibatches: how many there are.
        whole: whether they are all there is.

    Returns:
        Numbers of shape (chain, step).
    """
    apart = 1 if whole else chains
    orders = []
    for chain in range(chains):
        own = torch.arange(chain % apart, minibatches, apart, device="cpu")
        generator = Generator().manual_seed(chain_seed(seed, chain, Stream.ORDER))
        orders.append(order_of_minibatches(own, steps, generator))
    return torch.stack(orders)


GROUP = 2**26
"""Elements up to which neighbouring parameters get their noise in one draw, and move together on a GPU. With fewer,
starting kernels takes longer than running them. It decides which numbers a chain gets."""


def groups_of(sizes: Sequence[int]) -> list[list[int]]:
    """The numbers of the parameters that get their noise together.

    Args:
        sizes: elements of each whole parameter.

    Example:
        >>> groups_of([3, 2**26, 5, 4])
        [[0], [1], [2, 3]]
    """
    groups: list[list[int]] = []
    room = -1
    for k, size in enumerate(sizes):
        if size > room:
            groups.append([])
            room = GROUP
        groups[-1].append(k)
        room -= size
    return groups


def chain_key(seed: int, chain: int) -> int:
    """What a chain's noise depends on."""
    return chain_seed(seed, chain, Stream.NOISE)


@functools.cache
def kernels_for(device: torch.device) -> ModuleType | None:
    """The kernels that make noise and steps on a GPU; None on a CPU, and where torch comes without Triton."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("phasewatch.monitor.sampling.kernels")


class ChainNoise:
    """The standard normal noise of one chain, drawn a group of parameters after another, step after step.

    So it is the same however many chains run together, and never more than one group's is held. On a GPU it is that of
    the kernels, which make it by its number.

    Args:
        seed: of the chains.
        chain: the chain's number.
        device: where to draw.
    """

    def __init__(self, seed: int, chain: int, device: torch.device) -> None:
        self._key = chain_key(seed, chain)
        self._kernels = kernels_for(device)
        self._chunk = 0
        self._generator = None if self._kernels else Generator(device).manual_seed(self._key)

    def into(self, flat: Tensor, sizes: Sequence[int]) -> Tensor:
        """The next parameters' noise.

        Args:
            flat: a vector for the elements of all of them, written to.
            sizes: how many elements each has.
        """
        if self._kernels is None:
            return flat.normal_(generator=self._generator)
        self._kernels.fill_with_noise(flat, sizes, self._key, self._chunk)
        self._chunk += sum(map(chunks_of, sizes))
        return flat


def flattened(tensors: Sequence[Tensor]) -> Tensor:
    """Several tensors as one vector; a single one isn't copied if it needn't be."""
    return tensors[0].reshape(-1) if len(tensors) == 1 else torch.cat([tensor.reshape(-1) for tensor in tensors])


def unflattened(flat: Tensor, like: Sequence[Tensor]) -> Weights:
    """Views of a vector, one after another, in the shapes of tensors."""
    pieces = flat.split([tensor.numel() for tensor in like], dim=-1)
    return [piece.view((*flat.shape[:-1], *tensor.shape)) for piece, tensor in zip(pieces, like, strict=True)]
