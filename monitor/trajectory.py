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
from phasewatch.monitor.estimate import Estimate, Health, json_number
from phasewatch.monitor.uncertainty import standard_error


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
                    f"Trajectory(points) got two different points at step {point.step}, with λ̂ {known.llc.value:g} and "
                    f"{point.llc.value:g} and loss {known.loss:g} and {point.loss:g}; pass the points of one run "
                    "measured with one setting."
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
    def read(cls, path: str | Path) -> "Trajectory":
        """A trajectory from a run's points.jsonl, or from a csv.

        A csv has the columns step, loss and llc, and may have llc_error or llc_chain0, llc_chain1, ...; every other
        column is a metric. A λ̂ of NaN there is a failed estimate.

        Args:
            path: a file that ends in .jsonl or .csv. A last line of a .jsonl that was torn off by a crash is left out.

        Returns:
            The points in order of step.

        Raises:
            PhasewatchError: the file is missing, of another kind, or has a line that can't be read.
        """
        path = Path(path)
        reader = _FORMATS.get(path.suffix.lower(), (None,))[0]
        if reader is None:
            raise PhasewatchError(f"Trajectory.read({str(path)!r}) reads .jsonl and .csv, not {path.suffix!r}.")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise PhasewatchError(
                f"Trajectory.read({str(path)!r}) can't open the file: {error.strerror or error}."
            ) from error
        return cls(reader(content, f"Trajectory.read({str(path)!r})"))

    def write(self, path: str | Path) -> None:
        """Write the points down, in the format that the path's suffix names.

        Args:
            path: where to. `.jsonl` keeps everything, to the last bit; `.csv` keeps steps, losses, estimates with their
                errors and chains, and metrics.

        Raises:
            PhasewatchError: the suffix is neither .jsonl nor .csv.
        """
        path = Path(path)
        writer = _FORMATS.get(path.suffix.lower(), (None, None))[1]
        if writer is None:
            raise PhasewatchError(f"trajectory.write({str(path)!r}) writes .jsonl and .csv, not {path.suffix!r}.")
        path.write_text(writer(self), encoding="utf-8", newline="")


def _from_jsonl(content: bytes, call: str) -> list[Point]:
    *lines, last = content.split(b"\n")
    points = []
    for number, line in enumerate([*lines, last] if last else lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number > len(lines):  # the write of this line was cut short
                break
            raise PhasewatchError(f"{call} can't read line {number}, which is not JSON; mend or delete it.") from error
        try:
            points.append(Point.from_json(record))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PhasewatchError(
                f"{call} can't read line {number}, which is not a point ({type(error).__name__}: {error}); "
                "mend or delete it."
            ) from error
    return points


def _to_jsonl(trajectory: Trajectory) -> str:
    return "".join(json.dumps(point.as_json(), allow_nan=False) + "\n" for point in trajectory)


def _from_csv(content: bytes, call: str) -> list[Point]:
    try:
        rows = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""))
        header, *lines = [(rows.line_num, [cell.strip() for cell in row]) for row in rows if row] or [(1, [])]
    except (UnicodeDecodeError, csv.Error) as error:
        raise PhasewatchError(f"{call} can't read the file as comma-separated text: {error}.") from error
    names = header[1]
    if not lines:
        raise PhasewatchError(f"{call} found no points: it needs a line with the columns step, loss, llc, then rows.")
    for name in ("step", "loss", "llc"):
        if names.count(name) != 1:
            raise PhasewatchError(
                f"{call} needs one column {name!r} and found {names.count(name)}; the columns are {', '.join(names)}."
            )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise PhasewatchError(f"{call} found the column {twice!r} twice; rename one of them.")
    chains = sorted((name for name in names if _CHAIN.fullmatch(name)), key=lambda name: int(name[len("llc_chain") :]))
    metrics = [name for name in names if name not in {"step", "loss", "llc", "llc_error", *chains}]

    points = []
    for number, row in lines:
        if len(row) != len(names):
            raise PhasewatchError(f"{call} has {len(row)} values in line {number} for {len(names)} columns.")
        cells = dict(zip(names, row, strict=True))
        values = {
            name: _number(cell, f"{call}, line {number}, column {name!r}", finite=name.startswith("llc"))
            for name, cell in cells.items()
            if cell or name not in metrics
        }
        per_chain = tuple(values[name] for name in chains)
        points.append(
            Point(
                step=_whole(cells["step"], f"{call}, line {number}, column 'step'"),
                loss=values["loss"],
                llc=Estimate(
                    value=values["llc"],
                    error=values.get("llc_error", standard_error(per_chain)),
                    per_chain=per_chain,
                    nbeta=math.nan,
                    rhat=math.nan,
                    ess=math.nan,
                    acceptance=math.nan,
                    health=Health.OK if math.isfinite(values["llc"]) else Health.DIVERGED,
                ),
                metrics={name: values[name] for name in metrics if name in values},
            )
        )
    return points


def _to_csv(trajectory: Trajectory) -> str:
    chains = 0 if trajectory.per_chain is None else trajectory.per_chain.shape[1]
    metrics = list(dict.fromkeys(name for point in trajectory for name in point.metrics))
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["step", "loss", "llc", "llc_error", *(f"llc_chain{c}" for c in range(chains)), *metrics])
    for point in trajectory:
        estimate = point.llc
        measured = (point.metrics.get(name, "") for name in metrics)
        rows.writerow([
            point.step, point.loss, estimate.value, estimate.error, *estimate.per_chain[:chains], *measured,
        ])  # fmt: skip
    return text.getvalue()


_CHAIN = re.compile(r"llc_chain\d+")
_FORMATS = {".jsonl": (_from_jsonl, _to_jsonl), ".csv": (_from_csv, _to_csv)}


def _number(cell: str, where: str, *, finite: bool) -> float:
    try:
        value = float(cell)
    except ValueError:
        raise PhasewatchError(f"{where} holds {cell!r}, which is no number.") from None
    if finite and math.isinf(value):
        raise PhasewatchError(f"{where} holds {cell!r}; write nan for an estimate that failed.")
    return value


def _whole(cell: str, where: str) -> int:
    try:
        return int(cell)
    except ValueError:
        value = float(cell)
    if not value.is_integer():
        raise PhasewatchError(f"{where} holds {cell!r}; a training step is a whole number.")
    return int(value)
