"""Copies of weights between the host and a GPU."""

import torch
from torch import Tensor

PIECE = 2**25
"""Bytes of pinned memory through which a large tensor passes at a time."""


def transfer(into: Tensor, source: Tensor) -> None:
    """Copy a tensor, between the host and a GPU through pinned memory.

    CUDA's own copy from or to memory that isn't pinned is the work of one thread, which for fresh memory is mostly
    waiting for the system to hand out pages. Here all of torch's threads copy a piece at a time.

    Args:
        into: what to overwrite.
        source: of the same shape.

    Example:
        >>> into = torch.zeros(3)
        >>> transfer(into, torch.ones(3))
        >>> into
        tensor([1., 1., 1.])
    """
    between = into.is_cuda != source.is_cuda and not (into.is_pinned() or source.is_pinned())
    if not between or into.nbytes <= PIECE or not (into.is_contiguous() and source.is_contiguous()):
        into.copy_(source)
        return
    size = PIECE // max(into.itemsize, source.itemsize)
    for there, here in zip(into.view(-1).split(size), source.view(-1).split(size), strict=True):
        if there.is_cuda:
            there.copy_(here.pin_memory(), non_blocking=True)
        else:
            there.copy_(torch.empty(here.shape, dtype=here.dtype, pin_memory=True).copy_(here))


def onto(device: torch.device, tensor: Tensor) -> Tensor:
    """A tensor on a device, as `Tensor.to`: itself where it is there, else a copy by `transfer`."""
    if tensor.device == device:
        return tensor
    there = torch.empty_like(tensor, device=device)
    transfer(there, tensor)
    return there
