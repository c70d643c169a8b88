"""How the noise of a chain is numbered for the kernels of a GPU: in chunks, and each parameter begins with its own."""

import functools

import torch

CHUNK = 4 * 256
"""Numbers of the noise that one program of a kernel makes, four for each counter."""


def chunks_of(size: int) -> int:
    """Chunks of noise that a parameter of so many elements takes."""
    return -(-size // CHUNK)


class Layout:
    """Which parameter each program of a kernel works on, and which chunk of its noise.

    A parameter may be a contiguous piece of a whole one, whose noise it then takes a piece of.

    Args:
        ranges: for each parameter, its elements, where they begin in the whole one, and the elements of that.
        device: a GPU.

    Attributes:
        programs: of all parameters, a chunk each.
        chunks: of the noise of all whole parameters.
        sizes: of the parameters, shape (parameter,).
        starts: each parameter's first program, shape (parameter,).
        skips: elements of its first chunk that lie before it, shape (parameter,).
        ahead: by how much the chunk's number is above the program's, shape (parameter,).
        offsets: where each begins in a vector of all, shape (parameter,).
        owners: the parameter of each program, shape (program,), int32.
    """

    def __init__(self, ranges: tuple[tuple[int, int, int], ...], device: torch.device) -> None:
        sizes, begins, wholes = torch.tensor(ranges, dtype=torch.int64).T
        skips = begins % CHUNK
        each = torch.where(sizes > 0, (skips + sizes + CHUNK - 1) // CHUNK, 0)
        numbered = (wholes + CHUNK - 1) // CHUNK
        starts = each.cumsum(0) - each
        self.programs, self.chunks = int(each.sum()), int(numbered.sum())
        self.sizes, self.starts, self.skips = sizes.contiguous().to(device), starts.to(device), skips.to(device)
        self.ahead = (numbered.cumsum(0) - numbered + begins // CHUNK - starts).to(device)
        self.offsets = (sizes.cumsum(0) - sizes).to(device)
        self.owners = torch.arange(len(ranges), dtype=torch.int32).repeat_interleave(each).to(device)

    @classmethod
    @functools.lru_cache(maxsize=64)
    def of(cls, ranges: tuple[tuple[int, int, int], ...], device: torch.device) -> "Layout":
        """That of some ranges, made once."""
        return cls(ranges, device)
