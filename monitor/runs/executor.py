"""What measures a series of snapshots: the protocol, and the executor that measures in this process."""

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.probing.automatic import Setting, calibrated
from phasewatch.monitor.probing.probe import Probe
from phasewatch.monitor.runs.ahead import Ahead
from phasewatch.monitor.sampling.settings import Sampler
from phasewatch.monitor.snapshots.snapshot import Snapshot, Snapshots
from phasewatch.monitor.trajectories.trajectory import Point

Result = tuple[int, Point | Exception]
"""A step, and its point or why it has none."""

PLACES = {
    "local": "phasewatch.monitor.runs.processes",
    "external": "phasewatch.monitor.runs.fan_out",
    "slurm": "phasewatch.callbacks.executors.slurm",
    "ray": "phasewatch.callbacks.executors.ray",
}
"""Where snapshots can be measured, as in `replay(on="slurm")`, and the module whose function `executor` measures there.
It is imported only where it is asked for."""


@dataclass(frozen=True)
class Order:
    """What an executor is made for.

    Attributes:
        probe: measures.
        snapshots: where the snapshots are.
        run: the run's folder; None if the points aren't kept.
        place: as it was typed, such as "ray://head:10001".
        workers: how many processes at a time.
        options: of the place, such as {"partition": "gpu"} for SLURM.
    """

    probe: Probe
    snapshots: Snapshots
    run: Path | None
    place: str
    workers: int
    options: Mapping[str, Any]


class Executor(Protocol):
    """Measures snapshots somewhere: in this process, in processes of this machine, or on a cluster.

    Example:
        >>> class Failing:
        ...     def measure(self, steps):
        ...         for step in steps:
        ...             yield step, RuntimeError("no machine")
        ...     def close(self):
        ...         pass
        >>> executor: Executor = Failing()
        >>> list(executor.measure([100]))
        [(100, RuntimeError('no machine'))]
    """

    def measure(self, steps: Iterable[int]) -> Iterator[Result]:
        """Measure the snapshots of some steps; may be called again afterwards.

        Args:
            steps: of the series that the executor was made for.

        Returns:
            A result for each step, in any order. After `close` the iterator ends early: steps without a result were
            not measured.
        """
        ...

    def close(self) -> None:
        """Stop at once, whatever is being measured, and let go of everything. It may come from another thread."""
        ...


def executor_on(order: Order) -> Executor:
    """The executor for a place.

    Args:
        order: what it is made for.

    Returns:
        An executor that has begun nothing yet.

    Raises:
        PhasewatchError: if there is no such place, or it can't be used.
    """
    name, _, address = order.place.partition("://")
    if name not in PLACES or (address and name != "ray"):
        raise PhasewatchError(
            f"replay(on={order.place!r}) must be one of {', '.join(map(repr, PLACES))}, 'ray://HOST:PORT', or a "
            "function that makes an executor."
        )
    return importlib.import_module(PLACES[name]).executor(order)


def in_batches(executor: Executor, steps: Iterable[int]) -> Iterator[list[Result]]:
    """What an executor measures, with results together that were ready at the same time: they take one write.

    Args:
        executor: says by an attribute `has_more`, if it has one, whether the next result is ready too.
        steps: as for `measure`.

    Yields:
        Results, at least one.
    """
    batch: list[Result] = []
    for result in executor.measure(steps):
        batch.append(result)
        if not getattr(executor, "has_more", False):
            yield batch
            batch = []
    if batch:
        yield batch


class InProcess:
    """Measures in this process, in order, as many snapshots at once as the probe takes best together.

    The snapshots that come next are read while others are measured.

    Args:
        probe: measures.
        snapshots: where the snapshots are.
    """

    def __init__(self, probe: Probe, snapshots: Snapshots) -> None:
        self._probe = probe
        self._source = snapshots
        self._snapshots = Ahead(snapshots)
        self._expected: list[int] = []

    def measure(self, steps: Iterable[int], then: Iterable[int] = ()) -> Iterator[Result]:
        """Measure; where a group fails together, its snapshots are measured one by one.

        Args:
            steps: of the series.
            then: what will be asked for next, as far as that can be told now.

        Returns:
            A result for each step, in order.
        """
        steps, then = list(steps), list(then)
        together = self._probe.together if len(steps) > 1 else 1
        for start in range(0, len(steps), together):
            group = steps[start : start + together]
            self._expected = (steps[start + together :] or then)[:together]
            points = self._measure_together(group) if len(group) > 1 else []
            yield from zip(group, points, strict=False)
            for step in group[len(points) :]:
                try:
                    result = self._probe(self._load([step])[0])
                except Exception as error:
                    result = error
                yield step, result

    def calibrate(self, steps: Sequence[int], like: Sampler) -> Setting:
        """Calibrate the probe, whose sampler is `like`, on the snapshots of some steps."""
        return calibrated(self._source, steps, self._probe)

    def use(self, probe: Probe, snapshots: Snapshots) -> None:
        """Measure with another probe from now on."""
        self._probe, self._source, self._snapshots = probe, snapshots, Ahead(snapshots)

    def close(self) -> None:
        """Nothing is held."""

    def _measure_together(self, group: list[int]) -> list[Point]:
        try:
            return self._probe.measure(self._load(group))
        except Exception:
            return []

    def _load(self, group: list[int]) -> list[Snapshot]:
        loaded = [self._snapshots.load(step) for step in group]
        self._snapshots.expect(self._expected)
        return loaded
