"""Measuring a series by a probe whose model is spread over processes: rank 0 chooses and writes, and all measure."""

from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress

import torch.distributed as dist

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.probing.probe import Probe
from phasewatch.monitor.runs.executor import Result
from phasewatch.monitor.snapshots.snapshot import Snapshots
from phasewatch.monitor.trajectories.trajectory import Point

END = -1
"""What rank 0 says in place of a step when there is no more."""


class Leader:
    """The executor of rank 0, which tells the other processes what to measure, and measures with them.

    Args:
        probe: of a sharded model, made on every rank.
        snapshots: the series, which every rank sees.
    """

    def __init__(self, probe: Probe, snapshots: Snapshots) -> None:
        self._probe = probe
        self._snapshots = snapshots
        self._ended = False

    def measure(self, steps: Iterable[int]) -> Iterator[Result]:
        """Measure, in order."""
        for step in steps:
            agreed(self._probe, step)
            yield step, measured(self._probe, self._snapshots, step)

    def close(self) -> None:
        """Let the others go."""
        if not self._ended:
            self._ended = True
            with suppress(PhasewatchError):  # of one that has ended
                agreed(self._probe, END)


def follow(probe: Probe, snapshots: Snapshots) -> Generator[Point]:
    """On another rank than 0: measure what rank 0 says, until it says that this was all.

    Args:
        probe: as on rank 0.
        snapshots: the same series.

    Yields:
        The points that rank 0 gets too.
    """
    while (step := agreed(probe, END)) != END:
        result = measured(probe, snapshots, step)
        try:
            if isinstance(result, Point):
                yield result
        except GeneratorExit:  # rank 0 still waits for this one
            while (step := agreed(probe, END)) != END:
                measured(probe, snapshots, step)
            raise


def agreed(probe: Probe, step: int) -> int:
    """The step that rank 0 says, which the others hear by saying `END`."""
    vector = probe.subject.loss.vector
    with vector.together():
        return vector.most(step)


def measured(probe: Probe, snapshots: Snapshots, step: int) -> Point | Exception:
    """The point of a step, where every process can read its checkpoint, or why there is none."""
    vector, snapshot, failure = probe.subject.loss.vector, None, None
    try:
        snapshot = snapshots.load(step)
    except Exception as error:
        failure = error
    with vector.together():
        readable = vector.all(failure is None)
    if not readable or snapshot is None:
        return failure or PhasewatchError("another process couldn't read it, although this one could")
    try:
        return probe(snapshot)
    except Exception as error:
        return error


def is_follower(probe: Probe) -> bool:
    """Whether this process measures along with rank 0."""
    return probe.is_sharded and dist.get_rank() > 0
