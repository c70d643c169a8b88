"""Which noise a piece of a parameter takes in the kernels of a GPU."""

import pytest
import torch

from phasewatch.monitor.sampling.layout import CHUNK, Layout


def numbers(ranges):
    """The noise's number of each element of each parameter, as the kernel `move` works them out."""
    layout = Layout.of(tuple(ranges), torch.device("cpu"))
    found = [torch.full((size,), -1) for size, _, _ in ranges]
    for program, owner in enumerate(layout.owners.tolist()):
        at = (program - layout.starts[owner]) * CHUNK - layout.skips[owner] + torch.arange(CHUNK)
        inside = (at >= 0) & (at < layout.sizes[owner])
        found[owner][at[inside]] = ((program + layout.ahead[owner]) * CHUNK + torch.arange(CHUNK))[inside]
    return found, layout.chunks


@pytest.mark.parametrize("cuts", [(0, 1, 1500), (0, 0, 3000), (1024, 2048, 2049), (700, 1023, 5000)])
def test_a_piece_takes_the_noise_of_its_place_in_the_whole(cuts):
    sizes = [3000, 7, 5000, 1]
    whole, chunks = numbers([(size, 0, size) for size in sizes])
    assert len(torch.cat(whole).unique()) == sum(sizes)
    pieces = [[] for _ in sizes]
    for begin, end in zip((0, *cuts), (*cuts, 10**6), strict=True):
        bounds = [(min(begin, size), min(end, size)) for size in sizes]
        found, same = numbers([(e - b, b, size) for (b, e), size in zip(bounds, sizes, strict=True)])
        assert same == chunks
        for so_far, piece in zip(pieces, found, strict=True):
            so_far.append(piece)
    for expected, of_one in zip(whole, pieces, strict=True):
        assert torch.equal(torch.cat(of_one), expected)
