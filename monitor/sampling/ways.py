"""How chains can be run, from the fastest way to the one that takes the least memory."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from phasewatch.monitor.sampling.position import AnchorOnDevice, AnchorOnHost, DisplacementOnDevice, Keep
from phasewatch.monitor.sampling.target import Target


@dataclass(frozen=True)
class Way:
    """A way to run chains.

    Attributes:
        rows: stacked chains that run at a time; 0 to run one after another in place.
        position: where the anchor is kept then.
        pieces: in how many pieces a minibatch is taken then.
    """

    rows: int
    position: Keep = AnchorOnDevice
    pieces: int = 1

    def __str__(self) -> str:
        if self.rows:
            return f"{self.rows} chains at a time."
        kept: dict[Keep, str] = {
            AnchorOnDevice: "with the snapshot's weights",
            DisplacementOnDevice: "with a bfloat16 displacement",
        }
        parts = f", minibatches in {self.pieces} parts" if self.pieces > 1 else ""
        return f"One chain at a time, {kept.get(self.position, 'with the snapshot on the host')}{parts}."


def ways(target: Target, rows: int) -> Iterator[Way]:
    """The ways that memory may allow, the fastest first.

    Ways in place that are predicted not to fit are left out, but for the last one.

    Args:
        target: the loss.
        rows: stacked chains to start with; half of them after each that doesn't fit.
    """
    while target.vectorised and rows > 0:
        yield Way(rows)
        rows //= 2
    fits = True
    way = Way(0)
    for way in _in_place(target):
        if fits := target.vector.all(needed(target, way) <= free(target)):
            yield way
    if not fits:
        yield way


def _in_place(target: Target) -> Iterator[Way]:
    yield Way(0)
    cuda, pieces = target.parameters[0].is_cuda, 1
    if cuda:
        yield Way(0, DisplacementOnDevice)
    while pieces < target.most_pieces:
        pieces = min(2 * pieces, target.most_pieces)
        yield Way(0, DisplacementOnDevice if cuda else AnchorOnDevice, pieces)
    if cuda:
        yield Way(0, AnchorOnHost, pieces)


def needed(target: Target, way: Way) -> int:
    """Bytes that chains in place are predicted to take beside the weights; 0 where that isn't known."""
    a_pass = target.bytes_of_a_pass(way.pieces)
    sizes = [4 * parameter.numel() for parameter in target.parameters]
    kept: dict[Keep, int] = {AnchorOnDevice: sum(sizes), DisplacementOnDevice: sum(sizes) // 2}
    drawn = 4 * max(target.vector.sizes) if target.vector.ranks > 1 else 0  # a whole parameter's noise
    return a_pass + kept.get(way.position, 2 * max(sizes)) + drawn if a_pass else 0


def free(target: Target) -> int:
    """Bytes that are free on a GPU, or that torch holds for later; on a CPU, no limit is known."""
    device = target.parameters[0].device
    if device.type != "cuda":
        return sys.maxsize
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def hint(target: Target) -> str:
    """The end of a sentence that says that memory ran out: what would make it fit."""
    *_, leanest = _in_place(target)
    least = needed(target, leanest)
    if not least or not target.parameters[0].is_cuda:
        return ". Lower the batch_size, or give Probe(device=...) with more."
    split = "" if target.most_pieces > 1 else ", whose loss isn't the mean over its samples, so that it can't be split"
    there = free(target) / 2**30
    return (
        f"{split}. The leanest way takes {least / 2**30:.1f} GiB beside the weights, and {there:.1f} GiB are free. "
        "Shorten the samples or lower the batch_size, free memory of the GPU, or give a function that builds the model "
        "sharded over several GPUs."
    )
