"""Tensors that were saved in pieces, one box of elements each, and how they are put together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

MOST_PIECES = 4096
"""A tensor in more pieces is refused: whether they overlap is asked of each pair."""

_MOST_DIMENSIONS = 64


class Piece(NamedTuple):
    """A box of a tensor's elements.

    Attributes:
        offsets: of its first element, in each dimension.
        sizes: its own shape.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def fill(self, whole: Tensor, content: Tensor) -> None:
        """Copy what the piece holds into its place.

        Args:
            whole: the tensor.
            content: of the piece.

        Raises:
            ValueError: if it has another shape or dtype.
        """
        if tuple(content.shape) != self.sizes or content.dtype != whole.dtype:
            raise ValueError("a piece of another shape or dtype")
        whole[tuple(slice(o, o + n) for o, n in zip(self.offsets, self.sizes, strict=True))] = content


@dataclass
class Pieces:
    """A tensor by its pieces.

    Attributes:
        dtype: of the tensor.
        size: its shape.
        pieces: that cover it, with where each one lies.
    """

    dtype: torch.dtype
    size: tuple[int, ...]
    pieces: dict[Piece, object] = field(default_factory=dict)

    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.size) * self.dtype.itemsize

    def check(self) -> None:
        """See that the pieces cover the tensor, each element once.

        Raises:
            ValueError: if they don't.
        """
        numbers = (*self.size, *(n for piece in self.pieces for n in (*piece.offsets, *piece.sizes)))
        if len(self.size) > _MOST_DIMENSIONS or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError("not the shape of a tensor")
        if len(self.pieces) > MOST_PIECES:
            raise ValueError("too many pieces")
        for piece in self.pieces:
            _check_inside(piece, self.size)
        if sum(math.prod(piece.sizes) for piece in self.pieces) != math.prod(self.size) or _overlap([*self.pieces]):
            raise ValueError("pieces that don't make up the tensor")

    def empty(self) -> Tensor:
        """Room for the tensor."""
        return torch.empty(self.size, dtype=self.dtype, device="cpu")


def _check_inside(piece: Piece, size: Sequence[int]) -> None:
    if not len(piece.offsets) == len(piece.sizes) == len(size):
        raise ValueError("a piece of another dimension")
    if any(offset + n > whole for offset, n, whole in zip(piece.offsets, piece.sizes, size, strict=True)):
        raise ValueError("a piece beyond its tensor")


def _overlap(pieces: list[Piece]) -> bool:
    """Whether two pieces have an element in common."""
    pieces = [piece for piece in pieces if 0 not in piece.sizes]
    if len(pieces) < 2 or not pieces[0].sizes:
        return len(pieces) > 1
    first = torch.tensor([piece.offsets for piece in pieces])
    end = first + torch.tensor([piece.sizes for piece in pieces])
    common = torch.ones(len(pieces), len(pieces), dtype=torch.bool)
    for low, high in zip(first.T, end.T, strict=True):
        common &= (low[:, None] < high) & (low < high[:, None])
    return bool(common.fill_diagonal_(False).any())
