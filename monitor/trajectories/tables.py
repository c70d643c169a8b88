"""Points as text: the lines of a run's points.jsonl, and tables in csv or jsonl."""

import csv
import gc
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from phasewatch.monitor.errors import LARGEST_STEP, PhasewatchError
from phasewatch.monitor.files import read_bytes, write_atomically
from phasewatch.monitor.formatting import integer, printable
from phasewatch.monitor.strict_json import parse_json
from phasewatch.monitor.trajectories.points import Point, estimate_without_diagnostics

MOST_COLUMNS = 5000
"""A table with more columns is refused; the widest exports of a W&B chart have some hundreds."""

MOST_CHAINS = 256
"""A table with more columns of chains is refused, since each point keeps a number for each of them."""

_CHAIN = re.compile(r"llc_chain[0-9]{1,9}")


def read_points(path: Path, signal: str) -> list[Point]:
    """The points of a file, in the order of its lines; see `Trajectory.read`.

    Args:
        path: a file that ends in .jsonl or .csv.
        signal: "llc", "loss" or the name of a metric, which has to be there.

    Returns:
        The points.

    Raises:
        PhasewatchError: the file is missing, of another kind, lacks the signal, or has a line that can't be read.
    """
    readers = {".jsonl": _points_of_jsonl, ".csv": _points_of_csv}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise PhasewatchError(f"{path} can't be read: a trajectory is a .jsonl or a .csv, not {path.suffix!r}.")
    return reader(read_bytes(path), printable(path), signal)


def write_points(points: Sequence[Point], path: Path) -> None:
    """Write points to a file in the format that its suffix names; see `Trajectory.write`.

    Args:
        points: the points, in order of step.
        path: a path that ends in .jsonl or .csv.

    Raises:
        PhasewatchError: the suffix is neither.
        OSError: the disk refuses it.
    """
    writers = {".jsonl": _to_jsonl, ".csv": _to_csv}
    writer = writers.get(path.suffix.lower())
    if writer is None:
        raise PhasewatchError(f"trajectory.write({str(path)!r}) writes .jsonl and .csv, not {path.suffix!r}.")
    write_atomically(path, writer(points))


def points_of_lines(content: bytes, name: str) -> list[Point]:
    """The points of a run's points.jsonl, in the order of its lines.

    Args:
        content: the lines. What follows the last line end is left out unless it is whole.
        name: the file's name, for error messages.

    Returns:
        The points.

    Raises:
        PhasewatchError: a line is not a point.
    """
    with _without_collector():
        return [_point_of_record(where, record) for where, record in _records(content, name)]


@contextmanager
def _without_collector() -> Iterator[None]:
    """Make many objects without Python's search for cycles among them: there are none, and it takes a third longer."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _point_of_record(where: str, record: Any) -> Point:
    try:
        return Point.from_json(record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PhasewatchError(
            f"{where} is not a point ({type(error).__name__}: {error}); correct it or delete it."
        ) from error


def _records(content: bytes, name: str) -> Iterator[tuple[str, Any]]:
    """Each line's place in words and its JSON value, one after another: together they take ten times their text."""
    *lines, last = content.split(b"\n")
    for number, line in enumerate([*lines, last] if last else lines, start=1):
        where = f"Line {number} of {name}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            record = parse_json(text, where, allow_nan=True)
        except (UnicodeDecodeError, PhasewatchError) as error:
            if number > len(lines):  # the write of this line was cut short
                return
            if isinstance(error, PhasewatchError):
                raise
            raise PhasewatchError(f"{where} is not text in UTF-8; mend or delete it.") from error
        yield where, record


def _points_of_jsonl(content: bytes, name: str, signal: str) -> list[Point]:
    records = _records(content, name)
    first = next(records, None)
    if first is None or (isinstance(first[1], dict) and isinstance(first[1].get("llc"), dict)):
        with _without_collector():
            points = [_point_of_record(where, record) for where, record in chain([first] if first else [], records)]
        signals = ["loss", "llc", *dict.fromkeys(metric for point in points for metric in point.metrics)]
        if points and signal not in signals:
            raise _lacks(name, signal, signals)
        return points
    rows = [first, *records]
    for where, row in rows:
        if not isinstance(row, dict):
            raise PhasewatchError(f"{where} is not an object of named values; correct it or delete it.")
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    return list(_points_of_rows(rows, columns, name, signal))


def _points_of_csv(content: bytes, name: str, signal: str) -> list[Point]:
    try:
        if b"\0" in content:
            raise csv.Error("it holds a zero byte")
        rows = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""))
        table = [(rows.line_num, [cell.strip() for cell in row]) for row in rows if any(map(str.strip, row))]
    except (UnicodeDecodeError, csv.Error) as error:
        raise PhasewatchError(f"{name} can't be read as comma-separated text in UTF-8: {error}.") from error
    if len(table) < 2:
        raise PhasewatchError(f"{name} has no points: a csv is a line with the columns step, loss, llc, then rows.")
    (_, columns), *lines = table
    columns = _without_decoration(columns)
    rows = [(f"Line {number} of {name}", row) for number, row in lines]
    for where, row in rows:
        if len(row) != len(columns):
            raise PhasewatchError(f"{where} has {len(row)} values for {len(columns)} columns.")
    named = [(where, dict(zip(columns, row, strict=True))) for where, row in rows]
    return list(_points_of_rows(named, columns, name, signal))


def _without_decoration(columns: list[str]) -> list[str]:
    """Column names without what W&B puts around them: the run's name, the section, and its own name for the step."""
    exported = any(column.endswith(("__MIN", "__MAX")) for column in columns)
    plain = [(column.rpartition(" - ")[2] if exported else column).removeprefix("phase/") for column in columns]
    if "step" not in plain:
        step = next((column for column in ("Step", "_step", "global_step") if column in plain), None)
        plain = ["step" if column == step else column for column in plain]
    return plain


def _check_columns(columns: list[str], name: str, signal: str) -> None:
    if len(columns) > MOST_COLUMNS:
        raise PhasewatchError(
            f"{name} has {integer(len(columns))} columns, and at most {integer(MOST_COLUMNS)} are read; leave some out."
        )
    signals = [c for c in columns if not (_CHAIN.fullmatch(c) or c in {"step", "llc_error"})]
    if signal not in {"llc", "loss", *signals}:
        raise _lacks(name, signal, [c for c in signals if not c.endswith(("__MIN", "__MAX"))])
    for needed in ["step", "loss", "llc"] if signal == "llc" else ["step", signal]:
        if columns.count(needed) != 1:
            found = "no column" if needed not in columns else f"{columns.count(needed)} columns"
            raise PhasewatchError(f"{name} has {found} {needed!r}, and needs one; its columns are {_listed(columns)}.")
    seen: set[str] = set()
    for column in columns:
        if column in seen:
            raise PhasewatchError(f"{name} has the column '{printable(column, 60)}' twice; rename one of them.")
        seen.add(column)
    if sum(_CHAIN.fullmatch(column) is not None for column in columns) > MOST_CHAINS:
        raise PhasewatchError(f"{name} has the columns of more than {MOST_CHAINS} chains; leave some out.")


def _lacks(name: str, signal: str, there: list[str]) -> PhasewatchError:
    return PhasewatchError(f"{name} has no signal '{printable(signal, 60)}'; it has {_listed(there) or 'none'}.")


def _listed(names: list[str]) -> str:
    """Names for a message: each in one short piece, the first twenty of them."""
    more = f" and {integer(len(names) - 20)} more" if len(names) > 20 else ""
    return ", ".join(printable(name, 60) for name in names[:20]) + more


def _points_of_rows(
    rows: list[tuple[str, dict[str, Any]]], columns: list[str], name: str, signal: str
) -> Iterator[Point]:
    """Points from rows of named cells, of text or of JSON.

    In a column that isn't needed for the signal, a cell that is not a number counts as empty.
    """
    _check_columns(columns, name, signal)
    chains = sorted((c for c in columns if _CHAIN.fullmatch(c)), key=lambda c: int(c.removeprefix("llc_chain")))
    measured = ["loss", "llc", "llc_error", *chains]
    no_metrics = {"step", *measured}
    needed = {signal, *(measured if signal == "llc" else [])}
    for where, row in rows:
        values = {}
        for column, cell in row.items():
            value = math.nan if column == "step" else _number(cell, where, column, needed=column in needed)
            if not math.isnan(value):
                values[column] = value
        if _is_empty(row.get("step")) and not needed & values.keys():
            continue  # another curve's row in an export of several
        per_chain = [values.get(chain, math.nan) for chain in chains if "llc" in values]
        yield Point(
            step=_step(row.get("step"), where),
            loss=values.get("loss", math.nan),
            llc=estimate_without_diagnostics(values.get("llc", math.nan), values.get("llc_error"), per_chain),
            metrics={column: value for column, value in values.items() if column not in no_metrics},
        )


def _is_empty(cell: Any) -> bool:
    return cell is None or cell == ""


def _number(cell: Any, where: str, column: str, *, needed: bool) -> float:
    """A cell's number, NaN where it is empty; in a column that is needed, anything else is refused."""
    try:
        value = math.nan if _is_empty(cell) else float(cell)
    except (TypeError, ValueError):
        if not needed:
            return math.nan
        raise PhasewatchError(
            f"{where}, column {_quoted(column)}, holds {_quoted(cell)}, not a number; correct it, or leave it empty."
        ) from None
    if not math.isinf(value):
        return value
    if needed:
        raise PhasewatchError(
            f"{where}, column {_quoted(column)}, holds {_quoted(cell)}; leave it empty where there is no finite value."
        )
    return math.nan


def _step(cell: Any, where: str) -> int:
    try:
        value = float(cell)
        step = int(cell) if isinstance(cell, int) or (isinstance(cell, str) and cell.isdecimal()) else int(value)
    except (TypeError, ValueError, OverflowError):
        value, step = math.nan, -1
    if not 0 <= step <= LARGEST_STEP or not value.is_integer():
        raise PhasewatchError(
            f"{where}, column 'step', holds {_quoted(cell)}; "
            f"a training step is a whole number from 0 to {LARGEST_STEP}."
        )
    return step


def _quoted(cell: Any) -> str:
    return f"'{printable(cell, 60)}'" if isinstance(cell, str) else printable(repr(cell), 60)


def _to_jsonl(points: Iterable[Point]) -> str:
    return "".join(json.dumps(point.as_json(), allow_nan=False) + "\n" for point in points)


def _to_csv(points: Sequence[Point]) -> str:
    counts = {len(point.llc.per_chain) for point in points}
    chains = counts.pop() if len(counts) == 1 else 0
    metrics = list(dict.fromkeys(name for point in points for name in point.metrics))
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["step", "loss", "llc", "llc_error", *(f"llc_chain{c}" for c in range(chains)), *metrics])
    for point in points:
        estimate = point.llc
        numbers = (point.loss, estimate.value, estimate.error, *estimate.per_chain[:chains])
        measured = (point.metrics.get(name, math.nan) for name in metrics)
        rows.writerow([point.step, *(value if math.isfinite(value) else "nan" for value in (*numbers, *measured))])
    return text.getvalue()
