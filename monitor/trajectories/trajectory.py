"""The points of one training run in order of step. numpy and scipy alone: reading a run needs no torch."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np

from phasewatch.monitor.errors import LARGEST_STEP, PhasewatchError
from phasewatch.monitor.formatting import integer, printable
from phasewatch.monitor.rim import rim
from phasewatch.monitor.trajectories.points import Point, estimate_without_diagnostics
from phasewatch.monitor.trajectories.rows import points_of_records
from phasewatch.monitor.trajectories.tables import points_of_lines, read_points, write_points

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Trajectory(Sequence[Point]):
    """The points of one training run in order of step.

    Args:
        points: points in any order. A step that comes twice with equal points, as after a resume, is kept once.

    Attributes:
        points: the points, by increasing step.

    Raises:
        PhasewatchError: a step is negative or beyond `LARGEST_STEP`, or comes twice with different values.

    Example:
        >>> import phasewatch as pw
        >>> trajectory = pw.Trajectory.from_values(
        ...     [1, 10, 100], loss=[3.0, 2.0, 1.5], llc=[1.0, 20.0, 35.0], metrics={"accuracy": [0.1, 0.4, 0.8]}
        ... )
        >>> trajectory
        <Trajectory of 3 points, steps 1 to 100>
        >>> trajectory.signal("accuracy")
        array([0.1, 0.4, 0.8])
        >>> trajectory[-1].llc.value
        35.0
    """

    def __init__(self, points: Iterable[Point] = ()) -> None:
        by_step: dict[int, Point] = {}
        for point in points:
            if not 0 <= point.step <= LARGEST_STEP:
                raise PhasewatchError(
                    f"Trajectory(points) got a point at step {printable(point.step)}; "
                    f"a step is a whole number from 0 to {LARGEST_STEP}."
                )
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
        return self._of(self.points[index]) if isinstance(index, slice) else self.points[index]

    @classmethod
    def _of(cls, points: tuple[Point, ...]) -> "Trajectory":
        """Some of a trajectory's points, which need no checks."""
        made = cls()
        made.points = points if len(points) < 2 or points[0].step < points[-1].step else points[::-1]
        return made

    def __repr__(self) -> str:
        span = f", steps {integer(self.points[0].step)} to {integer(self.points[-1].step)}" if self.points else ""
        return f"<Trajectory of {len(self)} points{span}>"

    def _repr_html_(self) -> str:
        """What a notebook shows: the picture, and the transitions in words."""
        return rim("figures.notebook", "Trajectory._repr_html_()").trajectory_html(self)

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
        """The error of each λ̂, shape (point,). Use `difference` for the error of a change between two points."""
        return np.array([point.llc.error for point in self.points], dtype=float)

    @property
    def per_chain(self) -> np.ndarray | None:
        """λ̂ of each chain, shape (point, chain); None unless all points carry the same number of chains."""
        counts = {len(point.llc.per_chain) for point in self.points}
        if len(counts) != 1 or counts == {0}:
            return None
        return np.array([point.llc.per_chain for point in self.points], dtype=float)

    def signal(self, name: str) -> np.ndarray:
        """The values of λ̂, the loss or a metric along the trajectory.

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
            known = ", ".join(["llc", "loss", *there])
            raise PhasewatchError(f"trajectory.signal({name!r}): no point has it; the points have {known}.")
        return np.array([point.metrics.get(name, math.nan) for point in self.points], dtype=float)

    def usable(self, signal: str = "llc") -> "Trajectory":
        """The points that `find_transitions` uses for a signal.

        Args:
            signal: "llc", "loss" or the name of a metric.

        Returns:
            The points where it is finite; for λ̂, those whose estimate didn't fail and whose loss is finite too.

        Raises:
            PhasewatchError: if there are points and none carries the signal.
        """
        finite = np.isfinite(self.signal(signal))
        if signal == "llc":
            finite &= np.isfinite(self.loss)
        return self if finite.all() else self._of(tuple(itertools.compress(self.points, finite)))

    def part(self, name: str) -> "Trajectory":
        """The trajectory of one of the probe's parts: the same steps, losses and metrics, with the part's λ̂.

        Args:
            name: a name in `Probe(parts={...})`.

        Returns:
            The points that have it.

        Raises:
            PhasewatchError: if no point has it.

        Example:
            >>> from dataclasses import replace
            >>> import phasewatch as pw
            >>> whole = pw.Trajectory.from_values([1, 10], loss=[3.0, 2.0], llc=[5.0, 9.0])
            >>> head = pw.Trajectory.from_values([1, 10], loss=[3.0, 2.0], llc=[1.0, 2.0])
            >>> points = [replace(p, parts={"L0H0": q.llc}) for p, q in zip(whole, head)]
            >>> pw.Trajectory(points).part("L0H0").llc
            array([1., 2.])
        """
        names = dict.fromkeys(part for point in self.points for part in point.parts)
        if name not in names:
            known = f"its parts are {', '.join(map(repr, names))}" if names else "its points have no parts"
            raise PhasewatchError(f"trajectory.part({name!r}): there is no such part; {known}.")
        return Trajectory(
            replace(point, llc=point.parts[name], parts={}) for point in self.points if name in point.parts
        )

    def plot(self, signal: str = "llc", *, metrics: Sequence[str] = (), width: float = 6.8) -> "Figure":
        """Draw the trajectory with the transitions of a signal.

        Args:
            signal: "llc", "loss" or the name of a metric, drawn first and largest.
            metrics: names of other metrics, at most four, each in a panel of its own below the loss.
            width: in inches. Letters keep their size: 3.4 is a column of a paper, 6.8 the page.

        Returns:
            A matplotlib figure, which a notebook shows; `trajectory.plot().savefig("trajectory.pdf")` keeps it.

        Raises:
            PhasewatchError: if no point has the signal or a metric, more than four metrics are named, or matplotlib
                isn't installed.

        Example:
            >>> import phasewatch as pw
            >>> trajectory = pw.Trajectory.from_values([1, 10, 100], loss=[3.0, 2.0, 1.9], llc=[1.0, 20.0, 21.0])
            >>> len(trajectory.plot("loss").axes)
            2
        """
        drawing = rim("figures.trajectory", f"trajectory.plot({signal!r})")
        transitions = rim("figures.notebook", "trajectory.plot()").find_transitions(self, signal=signal)
        return drawing.draw_trajectory(self, transitions, signal=signal, metrics=metrics, width=width)

    @classmethod
    def from_values(
        cls,
        steps: Sequence[int] | np.ndarray,
        *,
        loss: Sequence[float] | np.ndarray,
        llc: Sequence[float] | np.ndarray,
        llc_error: Sequence[float] | np.ndarray | None = None,
        metrics: Mapping[str, Sequence[float] | np.ndarray] | None = None,
    ) -> "Trajectory":
        """A trajectory from series that were measured elsewhere.

        Args:
            steps: training steps, shape (point,).
            loss: the loss at each, shape (point,).
            llc: λ̂ at each, shape (point,); NaN where it failed.
            llc_error: the standard error of each λ̂, shape (point,); None if it isn't known.
            metrics: other series by name, each of shape (point,).

        Returns:
            The points in order of step. Their estimates carry no diagnostics, and count as OK where λ̂ is not NaN.

        Raises:
            PhasewatchError: if the series differ in length, or `Trajectory` refuses their steps.

        Example:
            >>> import phasewatch as pw
            >>> pw.Trajectory.from_values([0, 10], loss=[3.0, 2.5], llc=[1.0, 4.0], llc_error=[0.1, 0.2]).llc_error
            array([0.1, 0.2])
        """
        errors = [math.nan] * len(steps) if llc_error is None else llc_error
        others = metrics or {}
        for name, values in {"loss": loss, "llc": llc, "llc_error": errors, **others}.items():
            if len(values) != len(steps):
                raise PhasewatchError(
                    f"Trajectory.from_values(...) got {len(steps)} steps and {len(values)} values of {name}; "
                    "pass one value for each step."
                )
        return cls(
            Point(
                step=int(step),
                loss=float(loss[i]),
                llc=estimate_without_diagnostics(float(llc[i]), float(errors[i])),
                metrics={name: float(values[i]) for name, values in others.items()},
            )
            for i, step in enumerate(steps)
        )

    @classmethod
    def read(cls, path: str | Path, *, signal: str = "llc", step: str | None = None) -> "Trajectory":
        """A trajectory from a run's points.jsonl, from a table, or from the log of another program.

        A table is a csv, or a jsonl whose lines are flat, such as `{"step": 10, "loss": 2.5, "llc": 31.0}`. It has the
        columns step, loss and llc, and may have llc_error or llc_chain0, llc_chain1, ...; every other column is a
        metric, where it holds a finite number. Where llc or loss is empty, NaN or infinite the point has none. Names as
        W&B exports them (`Step`, `my run - phase/llc`, `phase/llc`) are understood. Rows of one step that complete each
        other are one point. A log is the `trainer_state.json` of Hugging Face's Trainer, an event file of TensorBoard,
        or the `.wandb` file of an offline run of W&B; these packages aren't needed.

        Args:
            path: a file, or a folder with one: a run's, a checkpoint's, a log's. A last line or record that was cut off
                by a crash is left out. `wandb://ENTITY/PROJECT/RUN` is a run on W&B's server.
            signal: "llc", "loss" or the name of a metric. The file must have it; unless it is "llc", a table may lack
                the columns llc and loss.
            step: the column of the training step. If left out it is the first of `step`, `global_step`,
                `trainer/global_step`, `train/global_step`, `iteration` and the like, and at last W&B's `Step` and
                `_step`, that all rows with the signal have.

        Returns:
            The points in order of step.

        Raises:
            PhasewatchError: the file is missing, of another kind, lacks the signal, or has a line that can't be read.
        """
        if isinstance(path, str) and path.startswith("wandb://"):
            rows = rim("wandb_history", f"Trajectory.read({path!r})").fetch_history(path)
            return _in_order(points_of_records(rows, path, signal, step), path)
        return _in_order(read_points(Path(path), signal, step), str(path))

    def write(self, path: str | Path) -> None:
        """Write the points to a file, in the format that its suffix names.

        Args:
            path: where to. `.jsonl` keeps everything, to the last bit; `.csv` keeps steps, losses, estimates with their
                errors and chains, and metrics.

        Raises:
            PhasewatchError: the suffix is neither .jsonl nor .csv.
            OSError: the disk refuses it.
        """
        write_points(self.points, Path(path))


def parse_points(content: bytes, name: str) -> Trajectory:
    """The points of a run's points.jsonl.

    Args:
        content: the lines. What follows the last line end is left out unless it is whole.
        name: the file's name, for error messages.

    Returns:
        The points in order of step.

    Raises:
        PhasewatchError: a line is not a point, or two points contradict each other.
    """
    return _in_order(points_of_lines(content, name), name)


def _in_order(points: Iterable[Point], name: str) -> Trajectory:
    try:
        return Trajectory(points)
    except PhasewatchError as error:
        raise PhasewatchError(f"{name} holds points that contradict each other. {error}") from error


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
