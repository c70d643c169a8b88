"""TensorBoard's event files as rows: the scalars of each step."""

import math
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.files import MOST_BYTES, open_regular
from phasewatch.monitor.formatting import integer, printable
from phasewatch.monitor.progress import progress
from phasewatch.monitor.trajectories.logs.wire import VARINT, DamagedError, fields, signed
from phasewatch.monitor.trajectories.rows import MOST_COLUMNS, Row, too_many_columns

MOST_RECORD_BYTES = 2**20
"""A larger record is passed over: it holds a picture or a graph. One of a thousand scalars has 40 kB."""


def read_events(paths: Sequence[Path], within: Path | None) -> list[Row]:
    """The scalars of event files as rows, one a step, in the order in which the steps first came.

    Of several values of one tag at one step the last one counts, as when a training was resumed from an earlier step.
    What follows the last whole record is left out. The checksum of each record with scalars is checked.

    Args:
        paths: the files, the oldest first.
        within: the folder that no link may lead out of; None where the user named the file itself.

    Returns:
        The rows: the column "step", and one for each tag.

    Raises:
        PhasewatchError: if a file can't be read, is damaged, or has too many tags.
    """
    steps: dict[int, dict[str, float]] = {}
    tags: set[str] = set()
    kept = 0
    for path in paths:
        name = printable(path)
        with open_regular(path, within=within) as file:
            for place, record, checksum in progress(_records(file, name), f"Reading {printable(path.name, 40)}"):
                try:
                    step, scalars = _event(record)
                except DamagedError:
                    raise _damaged(name, place) from None
                if not scalars:
                    continue
                if _masked_checksum(record) != checksum:
                    raise _damaged(name, place)
                kept += len(record)
                tags.update(scalars)
                if len(tags) > MOST_COLUMNS:
                    raise too_many_columns(name, len(tags))
                if kept > MOST_BYTES:
                    raise PhasewatchError(f"{name} has more than {integer(MOST_BYTES)} bytes of scalars; log fewer.")
                steps.setdefault(step, {}).update(scalars)
    name = printable(paths[0])
    return [(f"Step {step} of {name}", {**scalars, "step": step}) for step, scalars in steps.items()]


def _records(file: BinaryIO, name: str) -> Iterator[tuple[int, bytes, int]]:
    """The records of a file, as tensorflow's `record_writer.h` lays them out.

    Yields:
        The byte where it begins, its content, and the content's checksum as it was kept.
    """
    place, size = 0, os.fstat(file.fileno()).st_size
    while len(head := file.read(12)) == 12:
        length, checksum = struct.unpack("<QI", head)
        if _masked_checksum(head[:8]) != checksum:
            raise _damaged(name, place)
        if length > size - place - 16:
            return  # the last write was cut short
        if length > MOST_RECORD_BYTES:
            file.seek(length + 4, os.SEEK_CUR)
        else:
            content = file.read(length)
            yield place, content, int.from_bytes(file.read(4), "little")
        place += length + 16


def _damaged(name: str, place: int) -> PhasewatchError:
    return PhasewatchError(
        f"{name} is no event file of TensorBoard, or is damaged at byte {integer(place)}; copy it again."
    )


def _event(record: bytes) -> tuple[int, dict[str, float]]:
    """An event's step and its finite scalars by tag."""
    step, scalars = 0, {}
    for number, kind, value in fields(record):
        if number == 2 and kind == VARINT:
            step = signed(int(value))
        elif number == 5 and isinstance(value, bytes):
            for inner, _, summary in fields(value):
                if inner == 1 and isinstance(summary, bytes):
                    scalars.update(_scalar(summary))
    return step, scalars


def _scalar(summary: bytes) -> dict[str, float]:
    """The tag and the number of one value of a summary; nothing if it is a picture, a histogram or text."""
    tag, found = "", math.nan
    for number, _, value in fields(summary):
        if not isinstance(value, bytes):
            continue
        if number == 1:
            tag = value.decode("utf-8", "replace")
        elif number == 2 and len(value) == 4:
            found = struct.unpack("<f", value)[0]
        elif number == 8:
            found = _tensor(value)
    return {tag: found} if math.isfinite(found) else {}


def _tensor(tensor: bytes) -> float:
    """The number in a tensor of one float, as newer writers keep a scalar; NaN for any other tensor."""
    kind, floats = 0, []
    for number, _, value in fields(tensor):
        if number == 1 and isinstance(value, int):
            kind = value
        elif number in {4, 5, 6} and isinstance(value, bytes):
            floats.append((number, value))
    if len(floats) != 1:
        return math.nan
    number, value = floats[0]
    form = {5: "<f", 6: "<d"}.get(number) or {1: "<f", 2: "<d"}.get(kind, "")
    return struct.unpack(form, value)[0] if form and len(value) == struct.calcsize(form) else math.nan


def _checksums() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_CHECKSUMS = _checksums()


def _masked_checksum(content: bytes) -> int:
    """CRC-32C, turned and shifted as event files keep it."""
    table, crc = _CHECKSUMS, 0xFFFFFFFF
    for byte in content:
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
