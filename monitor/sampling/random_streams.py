"""The random streams of the chains, by seed and chain alone: which minibatch each step takes, and its noise."""

import enum

import numpy as np
import torch
from torch import Generator, Tensor

from phasewatch.monitor.model.minibatches import order_of_minibatches
from phasewatch.monitor.model.weights import Mask


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


class ChainNoise:
    """The standard normal noise of one chain, drawn parameter after parameter, step after step.

    So it is the same however many chains run together, and never more than one parameter's is held.

    Args:
        seed: of the chains.
        chain: the chain's number.
        device: where to draw.
    """

    def __init__(self, seed: int, chain: int, device: torch.device) -> None:
        self._generator = Generator(device).manual_seed(chain_seed(seed, chain, Stream.NOISE))

    def like(self, weight: Tensor, mask: Tensor | None = None) -> Tensor:
        """The next parameter's noise, 0 where the mask is False."""
        return self.into(torch.empty_like(weight), mask)

    def into(self, out: Tensor, mask: Tensor | None = None) -> Tensor:
        """The same, written into a tensor."""
        out.normal_(generator=self._generator)
        return out if mask is None else out.mul_(mask)


def mask_of(masks: Mask, parameter: int) -> Tensor | None:
    """A parameter's mask among all; None where all of it moves."""
    return None if masks is None else masks[parameter]
