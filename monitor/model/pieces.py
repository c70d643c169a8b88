"""A minibatch taken a few samples at a time, where a pass over all of it doesn't fit in memory."""

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


def samples_in(batch: Any) -> int:
    """The length of the sample axis, which is the first of every tensor; 1 where they don't have one in common."""
    leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    lengths = {leaf.shape[0] if leaf.ndim else 1 for leaf in leaves}
    return lengths.pop() if len(lengths) == 1 else 1


def in_pieces(batch: Any, count: int) -> list[tuple[float, Any]]:
    """A minibatch in pieces of nearly as many samples each.

    Args:
        batch: tensors with the sample axis first.
        count: how many pieces; at most as many as there are samples.

    Returns:
        Each piece after its share of the samples.

    Example:
        >>> [(round(share, 2), piece.tolist()) for share, piece in in_pieces(torch.arange(3), 2)]
        [(0.67, [0, 1]), (0.33, [2])]
    """
    if count == 1:
        return [(1.0, batch)]
    samples = samples_in(batch)
    ends = [-(-samples * number // count) for number in range(count + 1)]
    return [
        (
            (end - begin) / samples,
            tree_map(lambda leaf, b=begin, e=end: leaf[b:e] if isinstance(leaf, Tensor) and leaf.ndim else leaf, batch),
        )
        for begin, end in itertools.pairwise(ends)
    ]


def pieces_beside(held: int, taken: int, samples: int) -> int:
    """In how many pieces to take a pass, so that it needs no more memory beside a gradient than a pass without one.

    A pass holds its activations at first and the gradient at last, so that its peak is the larger of the two.

    Args:
        held: bytes of the gradient.
        taken: bytes of the activations of all samples.
        samples: of the minibatch.
    """
    room = max(taken, held) - held
    return samples if room * samples <= taken else -(-taken // room)


def is_a_mean(values: list[Tensor], pieces: list[list[tuple[float, Tensor]]], tolerance: float) -> bool:
    """Whether losses are the means of those of their pieces.

    Args:
        values: the losses of some minibatches.
        pieces: for each, the shares and losses of its pieces.
        tolerance: relative to the loss.
    """
    means = [torch.stack([share * value for share, value in some]).sum() for some in pieces]
    return all(torch.isclose(mean, value, rtol=tolerance) for mean, value in zip(means, values, strict=True))
