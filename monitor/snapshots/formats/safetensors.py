"""Single safetensors files, read by their published layout so that every claim of the header is checked first."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.files import MOST_JSON_BYTES, open_regular
from phasewatch.monitor.snapshots.formats.base import Entry, is_weights_file, reading, some_tensors
from phasewatch.monitor.snapshots.steps import step_in_name
from phasewatch.monitor.strict_json import parse_json

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MOST_DIMENSIONS = 64


@dataclass(frozen=True)
class SafetensorsFile:
    """`step1000.safetensors`; the step is in the name."""

    suffixes = (".safetensors",)

    def claims(self, path: Path) -> Path | None:
        """A file with this suffix."""
        return path if is_weights_file(path, self.suffixes) else None

    def step(self, entry: Entry) -> int | None:
        """The step in the name."""
        return step_in_name(entry.name)

    def load(self, source: Path, within: Path | None) -> dict[str, Tensor]:
        """The tensors, each read straight into memory of its own.

        Raises:
            PhasewatchError: if the file can't be read, holds no tensors, or its header doesn't fit it.
        """
        with reading(source), open_regular(source, within=within) as opened:
            tensors = {record.name: record.read(opened) for record in _records(opened, source)}
        return some_tensors(dict(sorted(tensors.items())), source)


@dataclass(frozen=True)
class _Record:
    """A tensor as the header describes it, its bytes from `begin` to `end` of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    def read(self, opened: IO[bytes]) -> Tensor:
        """The tensor; records are read in the order in which they lie."""
        tensor = torch.empty(self.end - self.begin, dtype=torch.uint8, device="cpu")
        if opened.readinto(tensor.numpy().data) != len(tensor):  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError("cut off")
        # A byte of a bool that is neither 0 nor 1 is true here and false there.
        typed = tensor.ne(0) if self.dtype is torch.bool else tensor.view(self.dtype)
        return typed.reshape(self.shape)


def _records(opened: IO[bytes], source: Path) -> list[_Record]:
    """What a file holds, in the order in which it lies there, without gaps and to the last byte."""
    size = os.fstat(opened.fileno()).st_size
    length = int.from_bytes(opened.read(8), "little")
    if length > min(size - 8, MOST_JSON_BYTES):
        raise ValueError("no header")
    first = 8 + length
    header = dict(parse_json(opened.read(length).decode(), f"The header of {source}"))
    header.pop("__metadata__", None)
    records = sorted((_record(name, claim, first, source) for name, claim in header.items()), key=lambda r: r.begin)
    end = first
    for record in records:
        if record.begin != end:
            raise _damaged(source, record.name)
        end = record.end
    if end != size:
        raise PhasewatchError(f"{source} is damaged: it has {size} bytes where {end} belong; copy it again.")
    return records


def _record(name: str, claim: dict[str, Any], first: int, source: Path) -> _Record:
    dtype, shape, (begin, end) = _DTYPES.get(claim["dtype"]), claim["shape"], claim["data_offsets"]
    if dtype is None:
        raise PhasewatchError(f"{source} holds {name!r} in {claim['dtype']!r}, which isn't read; save it in float32.")
    if len(shape) > _MOST_DIMENSIONS or not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end)):
        raise _damaged(source, name)
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise _damaged(source, name)
    return _Record(name, dtype, tuple(shape), first + begin, first + end)


def _damaged(source: Path, name: str) -> PhasewatchError:
    return PhasewatchError(f"{source} is damaged: what its header says of {name!r} doesn't fit; copy it again.")
