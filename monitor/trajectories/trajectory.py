"""Points in order of step, in memory and on disk. numpy and scipy alone: reading a run needs no torch."""

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.estimates.estimate import Estimate, Health, json_number
from phasewatch.monitor.estimates.uncertainty import standard_error


@dataclass(frozen=True)
class Point:
    """One snapshot, measured.

    Attributes:
        step: the training step of the snapshot.
        loss: the loss on the probe's fixed evaluation batch.
        llc: the estimate of the local learning coefficient.
        metrics: the probe's own metrics by name.
        refined: the estimates of the probe's named parts, each with all other weights held fast (Wang et al. 2024).
    """

    step: int
    loss: float
    llc: Estimate
    metrics: Mapping[str, float] = field(default_factory=dict)
    refined: Mapping[str, Estimate] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """This point as plain JSON types."""
        record: dict[str, Any] = {
            "step": self.step,
            "loss": json_number(self.loss),
            "llc": self.llc.as_json(),
            "metrics": {name: json_number(value) for name, value in self.metrics.items()},
        }
        if self.refined:
            record["refined"] = {name: estimate.as_json() for name, estimate in self.refined.items()}
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Point":
        """The inverse of `as_json`, exact to the last bit."""
        return cls(
            step=int(record["step"]),
            loss=float(record["loss"]),
            llc=Estimate.from_json(record["llc"]),
            metrics={name: float(value) for name, value in record.get("metrics", {}).items()},
            refined={name: Estimate.from_json(value) for name, value in record.get("refined", {}).items()},
        )


class Trajectory(Sequence[Point]):
    """The points of one training run in order of step.

    Args:
        points: points in any order. A step that comes twice with equal points, as after a resume, is kept once.

    Attributes:
        points: the points, by increasing step.

    Raises:
        PhasewatchError: a step is negative, or comes twice with different values.
    """

    def __init__(self, points: Iterable[Point] = ()) -> None:
        by_step: dict[int, Point] = {}
        for point in points:
            if point.step < 0:
                raise PhasewatchError(f"Trajectory(points) got a point at step {point.step}; steps count from 0.")
            known = by_step.setdefault(point.step, point)
            if known is not point and known.as_json() != point.as_json():
                raise PhasewatchError(
                    f"Trajectory(points) got two different points at step {point.step}, with "
                    f"{_differences(known, point)}; pass the points of one run measured with one setting."
                )
        self.points = tuple(by_step[step] for step in sorted(by_step))

    def __len__(self) -> int:
        return len(self.points)

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    @overload
    def __getitem__(self, index: int) -> Point: ...
    @overload
    def __getitem__(self, index: slice) -> "Trajectory": ...
    def __getitem__(self, index: int | slice) -> "Point | Trajectory":
        return Trajectory(self.points[index]) if isinstance(index, slice) else self.points[index]

    def __repr__(self) -> str:
        span = f", steps {self.points[0].step} to {self.points[-1].step}" if self.points else ""
        return f"<Trajectory of {len(self)} points{span}>"

    @property
    def steps(self) -> np.ndarray:
        """Training steps, shape (point,), increasing."""
        return np.array([point.step for point in self.points], dtype=np.int64)

    @property
    def loss(self) -> np.ndarray:
        """Loss of each point, shape (point,)."""
        return np.array([point.loss for point in self.points], dtype=float)

    @property
    def llc(self) -> np.ndarray:
        """λ̂ of each point, shape (point,)."""
        return np.array([point.llc.value for point in self.points], dtype=float)

    @property
    def llc_error(self) -> np.ndarray:
        """The error of each λ̂, shape (point,): of its level, not of its difference to a neighbour."""
        return np.array([point.llc.error for point in self.points], dtype=float)

    @property
    def per_chain(self) -> np.ndarray | None:
        """λ̂ of each chain, shape (point, chain); None unless all points carry the same number of chains."""
        counts = {len(point.llc.per_chain) for point in self.points}
        if len(counts) != 1 or counts == {0}:
            return None
        return np.array([point.llc.per_chain for point in self.points], dtype=float)

    def signal(self, name: str) -> np.ndarray:
        """One of the signals that the points carry.

        Args:
            name: "llc" for λ̂, "loss", or the name of a metric.

        Returns:
            Its values, shape (point,); NaN where a point lacks it, or its estimate failed.

        Raises:
            PhasewatchError: if there are points and none carries it.
        """
        if name == "llc":
            return np.array([math.nan if p.llc.health.failed else p.llc.value for p in self.points], dtype=float)
        if name == "loss":
            return self.loss
        there = dict.fromkeys(metric for point in self.points for metric in point.metrics)
        if self.points and name not in there:
            raise PhasewatchError(f"No point has the metric {name!r}; they have {', '.join(['llc', 'loss', *there])}.")
        return np.array([point.metrics.get(name, math.nan) for point in self.points], dtype=float)

    def usable(self, metric: str = "llc") -> "Trajectory":
        """The points by which a signal's transitions can be judged.

        Args:
            metric: "llc", "loss" or the name of a metric.

        Returns:
            Those where it is finite; for λ̂, those whose estimate didn't fail and whose loss is finite too.

        Raises:
            PhasewatchError: if there are points and none carries it.
        """
        finite = np.isfinite(self.signal(metric) + (self.loss if metric == "llc" else 0))
        return Trajectory(point for point, is_finite in zip(self.points, finite, strict=True) if is_finite)

    def of(self, part: str) -> "Trajectory":
        """The trajectory of one of the probe's parts: the same steps, losses and metrics, with its λ̂.

        Args:
            part: a name in `Probe(weights={...})`.

        Returns:
            The points that have it.

        Raises:
            PhasewatchError: if none has.
        """
        names = dict.fromkeys(name for point in self.points for name in point.refined)
        if part not in names:
            known = f"its parts are {', '.join(map(repr, names))}" if names else "its points have no parts"
            raise PhasewatchError(f"trajectory.of({part!r}): there is no such part; {known}.")
        return Trajectory(
            replace(point, llc=point.refined[part], refined={}) for point in self.points if part in point.refined
        )

    @classmethod
    def read(cls, path: str | Path, *, metric: str = "llc") -> "Trajectory":
        """A trajectory from a run's points.jsonl, or from a table.

        A table is a csv, or a jsonl whose lines are flat, such as `{"step": 10, "loss": 2.5, "llc": 31.0}`. It has the
        columns step, loss and llc, and may have llc_error or llc_chain0, llc_chain1, ...; every other column is a
        metric, where it holds a finite number. Where llc or loss is empty or NaN the point has none. Names as
        W&B exports them (`Step`, `my run - phase/llc`, `phase/llc`) are understood.

        Args:
            path: a file that ends in .jsonl or .csv. A last line of a .jsonl that was torn off by a crash is left out.
            metric: the signal that is wanted: "llc", "loss" or the name of a metric. It has to be there; if it isn't
                "llc", a table may lack llc and loss.

        Returns:
            The points in order of step.

        Raises:
            PhasewatchError: the file is missing, of another kind, lacks the signal, or has a line that can't be read.
        """
        path = Path(path)
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            raise PhasewatchError(f"{path} can't be read: a trajectory is a .jsonl or a .csv, not {path.suffix!r}.")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise PhasewatchError(f"{path} can't be opened: {error.strerror or error}.") from error
        return reader(content, str(path), metric)

    def write(self, path: str | Path) -> None:
        """Write the points down, in the format that the path's suffix names.

        Args:
            path: where to. `.jsonl` keeps everything, to the last bit; `.csv` keeps steps, losses, estimates with their
                errors and chains, and metrics.

        Raises:
            PhasewatchError: the suffix is neither .jsonl nor .csv.
        """
        path = Path(path)
        writer = _WRITERS.get(path.suffix.lower())
        if writer is None:
            raise PhasewatchError(f"trajectory.write({str(path)!r}) writes .jsonl and .csv, not {path.suffix!r}.")
        path.write_text(writer(self), encoding="utf-8", newline="")


def parse_points(content: bytes, name: str) -> Trajectory:
    """The points of a run's points.jsonl.

    Args:
        content: the lines. What follows the last line end is left out unless it is whole.
        name: of the file, for what can't be read.

    Returns:
        The points in order of step.

    Raises:
        PhasewatchError: a line is no point, or two points contradict each other.
    """
    points = []
    for where, record in _records(content, name):
        try:
            points.append(Point.from_json(record))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PhasewatchError(
                f"{where} is no point ({type(error).__name__}: {error}); mend it or delete it."
            ) from error
    return _together(points, name)


def _records(content: bytes, name: str) -> list[tuple[str, Any]]:
    *lines, last = content.split(b"\n")
    records = []
    for number, line in enumerate([*lines, last] if last else lines, start=1):
        where = f"Line {number} of {name}"
        try:
            records.append((where, json.loads(line)))
        except ValueError as error:
            if number > len(lines):  # the write of this line was cut short
                break
            raise PhasewatchError(f"{where} is no point, since it is not JSON; mend it or delete it.") from error
    return records


def _parse_jsonl(content: bytes, name: str, metric: str) -> Trajectory:
    rows = _records(content, name)
    if not rows or (isinstance(rows[0][1], dict) and isinstance(rows[0][1].get("llc"), dict)):
        trajectory = parse_points(content, name)
        metrics = list(dict.fromkeys(metric for point in trajectory for metric in point.metrics))
        if len(trajectory) and metric not in {"llc", "loss", *metrics}:
            raise _lacks(name, metric, ["loss", "llc", *metrics])
        return trajectory
    for where, row in rows:
        if not isinstance(row, dict):
            raise PhasewatchError(f"{where} is no object of named values; mend it or delete it.")
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    _check_columns(columns, name, metric)
    return _together(_points_of_rows(rows, columns, metric), name)


def _parse_csv(content: bytes, name: str, metric: str) -> Trajectory:
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
    _check_columns(columns, name, metric)
    for number, row in lines:
        if len(row) != len(columns):
            raise PhasewatchError(f"Line {number} of {name} has {len(row)} values for {len(columns)} columns.")
    rows = [(f"Line {number} of {name}", dict(zip(columns, row, strict=True))) for number, row in lines]
    return _together(_points_of_rows(rows, columns, metric), name)


def _without_decoration(columns: list[str]) -> list[str]:
    """Column names without what W&B puts around them: the run's name, the section, and its own name for the step."""
    exported = any(column.endswith(("__MIN", "__MAX")) for column in columns)
    plain = [(column.rpartition(" - ")[2] if exported else column).removeprefix("phase/") for column in columns]
    if "step" not in plain:
        step = next((column for column in ("Step", "_step", "global_step") if column in plain), None)
        plain = ["step" if column == step else column for column in plain]
    return plain


def _check_columns(columns: list[str], name: str, metric: str) -> None:
    signals = [c for c in columns if not (_CHAIN.fullmatch(c) or c in {"step", "llc_error"})]
    if metric not in {"llc", "loss", *signals}:
        raise _lacks(name, metric, [c for c in signals if not c.endswith(("__MIN", "__MAX"))])
    for needed in ["step", "loss", "llc"] if metric == "llc" else ["step", metric]:
        if columns.count(needed) != 1:
            found = "no column" if needed not in columns else f"{columns.count(needed)} columns"
            raise PhasewatchError(
                f"{name} has {found} {needed!r}, and needs one; its columns are {', '.join(columns)}."
            )
    if len(set(columns)) < len(columns):
        twice = next(column for column in columns if columns.count(column) > 1)
        raise PhasewatchError(f"{name} has the column {twice!r} twice; rename one of them.")


def _lacks(name: str, metric: str, there: list[str]) -> PhasewatchError:
    return PhasewatchError(f"{name} has no metric {metric!r}; it has {', '.join(there) or 'none'}.")


def _points_of_rows(rows: list[tuple[str, dict[str, Any]]], columns: list[str], metric: str) -> Iterator[Point]:
    """Points from rows of named cells, of text or of JSON; in what isn't wanted, a cell that is no number is empty."""
    chains = sorted((c for c in columns if _CHAIN.fullmatch(c)), key=lambda c: int(c[len("llc_chain") :]))
    measured = ["loss", "llc", "llc_error", *chains]
    metrics = [column for column in columns if column not in {"step", *measured}]
    strict = {metric, *(measured if metric == "llc" else [])}
    for where, row in rows:
        values = {}
        for column in (*measured, *metrics):
            value = _number(row.get(column), f"{where}, column {column!r},", strict=column in strict)
            if not math.isnan(value):
                values[column] = value
        if _is_empty(row.get("step")) and not strict & values.keys():
            continue  # another curve's row in an export of several
        per_chain = tuple(values.get(chain, math.nan) for chain in chains if "llc" in values)
        yield Point(
            step=_whole(row.get("step"), f"{where}, column 'step',"),
            loss=values.get("loss", math.nan),
            llc=Estimate(
                value=values.get("llc", math.nan),
                error=values.get("llc_error", standard_error(per_chain)),
                per_chain=per_chain,
                nbeta=math.nan,
                rhat=math.nan,
                ess=math.nan,
                health=Health.OK if "llc" in values else Health.DIVERGED,
            ),
            metrics={name: values[name] for name in metrics if name in values},
        )


def _together(points: Iterable[Point], name: str) -> Trajectory:
    points = list(points)  # a row that can't be read says so itself
    try:
        return Trajectory(points)
    except PhasewatchError as error:
        raise PhasewatchError(f"{name} holds points that can't go together. {error}") from error


def _differences(known: Point, point: Point) -> str:
    pairs = [("λ̂", known.llc.value, point.llc.value), ("loss", known.loss, point.loss)]
    pairs += [
        (name, known.metrics.get(name, math.nan), point.metrics.get(name, math.nan))
        for name in {**known.metrics, **point.metrics}
    ]
    return (
        ", ".join(f"{name} {a:g} and {b:g}" for name, a, b in pairs if repr(a) != repr(b))
        or "different chains or diagnostics"
    )


def _to_jsonl(trajectory: Trajectory) -> str:
    return "".join(json.dumps(point.as_json(), allow_nan=False) + "\n" for point in trajectory)


def _to_csv(trajectory: Trajectory) -> str:
    chains = 0 if trajectory.per_chain is None else trajectory.per_chain.shape[1]
    metrics = list(dict.fromkeys(name for point in trajectory for name in point.metrics))
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["step", "loss", "llc", "llc_error", *(f"llc_chain{c}" for c in range(chains)), *metrics])
    for point in trajectory:
        estimate = point.llc
        numbers = (point.loss, estimate.value, estimate.error, *estimate.per_chain[:chains])
        measured = (point.metrics.get(name, math.nan) for name in metrics)
        rows.writerow([point.step, *(value if math.isfinite(value) else "nan" for value in (*numbers, *measured))])
    return text.getvalue()


_CHAIN = re.compile(r"llc_chain\d+")
_READERS = {".jsonl": _parse_jsonl, ".csv": _parse_csv}
_WRITERS = {".jsonl": _to_jsonl, ".csv": _to_csv}


def _is_empty(cell: Any) -> bool:
    return cell is None or cell == ""


def _number(cell: Any, where: str, *, strict: bool) -> float:
    """A cell's number, NaN where there is none; of a column that is wanted, it has to be a finite one."""
    try:
        value = math.nan if _is_empty(cell) else float(cell)
    except (TypeError, ValueError):
        if not strict:
            return math.nan
        raise PhasewatchError(f"{where} holds {cell!r}, which is no number; mend it, or leave it empty.") from None
    if not math.isinf(value):
        return value
    if strict:
        raise PhasewatchError(f"{where} holds {cell!r}; leave it empty where there is no finite value.")
    return math.nan


def _whole(cell: Any, where: str) -> int:
    try:
        value = float(cell)
        step = int(cell) if isinstance(cell, int) or (isinstance(cell, str) and cell.isdecimal()) else int(value)
    except (TypeError, ValueError, OverflowError):
        value, step = math.nan, -1
    if not 0 <= step < 2**63 or not value.is_integer():
        raise PhasewatchError(f"{where} holds {cell!r}; a training step is a whole number, counted from 0.")
    return step
