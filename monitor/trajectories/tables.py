"""Points in files: the lines of a run's points.jsonl, tables in csv or jsonl, and the logs of other programs."""

import csv
import gc
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.files import read_bytes, write_atomically
from phasewatch.monitor.formatting import printable
from phasewatch.monitor.progress import progress
from phasewatch.monitor.strict_json import parse_json
from phasewatch.monitor.trajectories.logs.choosing import is_event_file, log_in
from phasewatch.monitor.trajectories.logs.event_files import read_events
from phasewatch.monitor.trajectories.logs.log_history import read_log_history
from phasewatch.monitor.trajectories.logs.wandb_files import read_history
from phasewatch.monitor.trajectories.points import Point
from phasewatch.monitor.trajectories.rows import lacks, plain_names, points_of_records, points_of_rows


def read_points(path: Path, signal: str, step: str | None = None) -> list[Point]:
    """The points of a file or of a folder with one, in the order of the file; see `Trajectory.read`.

    Args:
        path: a file of points, a table, a log, or a folder with one of them.
        signal: "llc", "loss" or the name of a metric, which has to be there.
        step: the column of the training step; found by its name if left out.

    Returns:
        The points.

    Raises:
        PhasewatchError: the file is missing, of another kind, lacks the signal, or has a line that can't be read.
    """
    folder = path if path.is_dir() else None
    path, more = log_in(path) if folder else (path, ())
    name, suffix = printable(path), path.suffix.lower()
    with without_collector():
        if is_event_file(path):
            return points_of_records(read_events([path, *more], folder), name, signal, step, last_counts=True)
        if suffix == ".wandb":
            return points_of_records(read_history(path, folder), name, signal, step)
        if suffix == ".json":
            return points_of_records(read_log_history(path, folder), name, signal, step, last_counts=True)
        readers = {".jsonl": _points_of_jsonl, ".csv": _points_of_csv, ".tsv": _points_of_csv}
        if reader := readers.get(suffix):
            return reader(read_bytes(path, within=folder), name, signal, step)
    raise PhasewatchError(
        f"{path} can't be read: a trajectory is a .jsonl, a .csv or .tsv, a trainer_state.json, a TensorBoard event "
        f"file or a .wandb, not {path.suffix!r}."
    )


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
    with without_collector():
        return [_point_of_record(where, record) for where, record in _records(content, name)]


@contextmanager
def without_collector() -> Iterator[None]:
    """Make many objects without Python's search for cycles among them: there are none, and it takes a third longer.

    What made them should let go of them inside, since the search comes when this ends.
    """
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


def _records(content: bytes, name: str, *, blank_lines: bool = False) -> Iterator[tuple[str, Any]]:
    """Each line's place in words and its JSON value, one after another: together they take ten times their text.

    Lines without any are left out if there may be some.
    """
    *lines, last = content.split(b"\n")
    shown = progress([*lines, last] if last else lines, f"Reading {printable(name, 40)}")
    for number, line in enumerate(shown, start=1):
        where = f"Line {number} of {name}"
        if blank_lines and not line.strip():
            continue
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


def _points_of_jsonl(content: bytes, name: str, signal: str, step: str | None) -> list[Point]:
    records = _records(content, name, blank_lines=True)
    first = next(records, None)
    if first is None or (isinstance(first[1], dict) and isinstance(first[1].get("llc"), dict)):
        with without_collector():
            points = [_point_of_record(where, record) for where, record in chain([first] if first else [], records)]
        signals = ["loss", "llc", *dict.fromkeys(metric for point in points for metric in point.metrics)]
        if points and signal not in signals:
            raise lacks(name, signal, signals)
        return points
    rows = [first, *records]
    for where, row in rows:
        if not isinstance(row, dict):
            raise PhasewatchError(f"{where} is not an object of named values; correct it or delete it.")
    return points_of_records([(where, dict(_flat(row))) for where, row in rows], name, signal, step)


def _flat(row: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """An object's values, those of objects in it by names such as `train/loss`; parse_json bounds how deep it is."""
    for name, value in row.items():
        if isinstance(value, dict) and "_type" not in value:  # a table or a picture of W&B
            yield from _flat(value, f"{above}{name}/")
        else:
            yield above + name, value


def _points_of_csv(content: bytes, name: str, signal: str, step: str | None) -> list[Point]:
    try:
        if b"\0" in content:
            raise csv.Error("it holds a zero byte")
        text = content.decode("utf-8-sig")
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=_separator(text))
        table = [(rows.line_num, [cell.strip() for cell in row]) for row in rows if any(map(str.strip, row))]
    except (UnicodeDecodeError, csv.Error) as error:
        raise PhasewatchError(f"{name} can't be read as comma-separated text in UTF-8: {error}.") from error
    if len(table) < 2:
        raise PhasewatchError(f"{name} has no points: a csv is a line with the columns step, loss, llc, then rows.")
    (_, columns), *lines = table
    columns = plain_names(columns, signal)
    rows = [(f"Line {number} of {name}", row) for number, row in lines]
    for where, row in rows:
        if len(row) != len(columns):
            raise PhasewatchError(f"{where} has {len(row)} values for {len(columns)} columns.")
    named = [(where, dict(zip(columns, row, strict=True))) for where, row in rows]
    return points_of_rows(named, columns, name, signal, step)


def _separator(text: str) -> str:
    """What stands between the columns: a comma, or a tab or semicolon where the first line has no comma."""
    first = text.lstrip().partition("\n")[0]
    return "," if "," in first else next((mark for mark in "\t;" if mark in first), ",")


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
