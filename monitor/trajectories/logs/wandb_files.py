"""W&B's `.wandb` files, as an offline run leaves them, as rows: its history."""

import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.files import MOST_BYTES, open_regular
from phasewatch.monitor.formatting import integer, printable
from phasewatch.monitor.progress import progress
from phasewatch.monitor.trajectories.logs.wire import VARINT, DamagedError, fields, signed
from phasewatch.monitor.trajectories.rows import MOST_COLUMNS, Row, too_many_columns

MOST_RECORD_BYTES = 2**20
"""A larger record is passed over: it holds a table or a picture. A row of a thousand numbers has 60 kB."""

MOST_NUMBER = 40
"""A longer value is no number: the longest float has 24 characters."""

_HEADER = b":W&B\xe1\xbe\x00"
_BLOCK = 32 * 1024
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def read_history(path: Path, within: Path | None) -> list[Row]:
    """The rows that a run logged, with the numbers in them; nothing is sent or fetched.

    What follows the last whole record is left out, as of a run that was killed.

    Args:
        path: the file, `wandb/offline-run-.../run-....wandb`.
        within: the folder that no link may lead out of; None where the user named the file itself.

    Returns:
        The rows, with W&B's own count of them in the column `_step`.

    Raises:
        PhasewatchError: if the file can't be read, is damaged, or has too many columns.
    """
    name = printable(path)
    rows: list[Row] = []
    columns: set[str] = set()
    with open_regular(path, within=within, most_bytes=MOST_BYTES) as file:
        if file.read(len(_HEADER)) != _HEADER:
            raise PhasewatchError(f"{name} is no .wandb file of W&B 0.12 or later; export the run's history as csv.")
        for place, record in progress(_records(file, name), f"Reading {printable(path.name, 40)}"):
            try:
                history = [value for number, _, value in fields(record) if number == 2 and isinstance(value, bytes)]
                row = _row(history[0]) if history else {}
            except DamagedError:
                raise _damaged(name, place) from None
            if row:
                rows.append((f"Row {len(rows)} of {name}", row))
                columns.update(row)
                if len(columns) > MOST_COLUMNS:
                    raise too_many_columns(name, len(columns))
    return rows


def _records(file: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
    """The records of a file, each with the byte where it begins, as LevelDB's log format lays them out in blocks."""
    place, pieces = len(_HEADER), [b""]
    block = b"\0" * place + file.read(_BLOCK - place)
    begin, at = 0, place
    while True:
        if len(block) - at < 7:
            begin, at, block = begin + _BLOCK, 0, file.read(_BLOCK)
            if len(block) < 7:
                return
        checksum, length, kind = struct.unpack_from("<IHB", block, at)
        piece = block[at + 7 : at + 7 + length]
        if len(piece) < length and len(block) < _BLOCK:
            return  # the last write was cut short
        if zlib.crc32(piece, zlib.crc32(block[at + 6 : at + 7])) != checksum or not _WHOLE <= kind <= _LAST:
            if not any(block[at:]) and not file.read(1):
                return  # a disk that filled up, or a machine that went down, leaves zeros
            raise _damaged(name, begin + at)
        if kind in {_WHOLE, _FIRST}:
            place, pieces = begin + at, []
        if sum(map(len, pieces)) <= MOST_RECORD_BYTES:
            pieces.append(piece)
        at += 7 + length
        if kind in {_WHOLE, _LAST} and sum(map(len, pieces)) <= MOST_RECORD_BYTES:
            yield place, b"".join(pieces)


def _damaged(name: str, place: int) -> PhasewatchError:
    return PhasewatchError(f"{name} is damaged at byte {integer(place)}; export the run's history from W&B as csv.")


def _row(history: bytes) -> dict[str, Any]:
    """The numbers of a row by name; a name inside another one follows it after a dot."""
    row: dict[str, Any] = {}
    for number, _, value in fields(history):
        if number == 1 and isinstance(value, bytes):
            name, cell = _item(value)
            if math.isfinite(cell):
                row[name] = int(cell) if name == "_step" else cell
        elif number == 2 and isinstance(value, bytes):
            steps = [signed(inner) for at, kind, inner in fields(value) if at == 1 and isinstance(inner, int)]
            row.setdefault("_step", steps[-1] if steps else 0)
    return row


def _item(item: bytes) -> tuple[str, float]:
    """The name of a value and its number, NaN if it is none."""
    names, found = [], math.nan
    for number, kind, value in fields(item):
        if number in {1, 2} and isinstance(value, bytes):
            names.append(value.decode("utf-8", "replace"))
        elif number == 16 and isinstance(value, bytes) and len(value) <= MOST_NUMBER:
            found = _number(value)
        elif number == 5 and kind == VARINT and isinstance(value, int):
            found = float(signed(value))
        elif number == 6 and isinstance(value, bytes) and len(value) == 8:
            found = struct.unpack("<d", value)[0]
    return ".".join(names), found


def _number(text: bytes) -> float:
    """A number as JSON has it; NaN for anything else."""
    try:
        return float(text) if text[:1] in b"-0123456789" else math.nan
    except ValueError:
        return math.nan
