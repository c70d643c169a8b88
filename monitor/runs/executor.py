"""What measures a series of snapshots: the protocol, and the executor that measures in this process."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from phasewatch.monitor.probing.automatic import Setting, calibrated
from phasewatch.monitor.probing.probe import Probe
from phasewatch.monitor.sampling.settings import Sampler
from phasewatch.monitor.snapshots.snapshot import Snapshots
from phasewatch.monitor.trajectories.trajectory import Point

Result = tuple[int, Point | Exception]
"""A step, and its point or why it has none."""


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


class InProcess:
    """Measures in this process, in order, as many snapshots at once as the probe takes best together.

    Args:
        probe: measures.
        snapshots: where the snapshots are.
    """

    def __init__(self, probe: Probe, snapshots: Snapshots) -> None:
        self._probe = probe
        self._snapshots = snapshots

    def measure(self, steps: Iterable[int]) -> Iterator[Result]:
        """Measure; where a group fails together, its snapshots are measured one by one."""
        steps = list(steps)
        together = self._probe.together if len(steps) > 1 else 1
        for start in range(0, len(steps), together):
            group = steps[start : start + together]
            points = self._measure_together(group) if len(group) > 1 else []
            yield from zip(group, points, strict=False)
            for step in group[len(points) :]:
                try:
                    result = self._probe(self._snapshots.load(step))
                except Exception as error:
                    result = error
                yield step, result

    def calibrate(self, steps: Sequence[int], like: Sampler) -> Setting:
        """Calibrate the probe, whose sampler is `like`, on the snapshots of some steps."""
        return calibrated(self._snapshots, steps, self._probe)

    def use(self, probe: Probe, snapshots: Snapshots) -> None:
        """Measure with another probe from now on."""
        self._probe, self._snapshots = probe, snapshots

    def close(self) -> None:
        """Nothing is held."""

    def _measure_together(self, group: list[int]) -> list[Point]:
        try:
            return self._probe.measure([self._snapshots.load(step) for step in group])
        except Exception:
            return []
