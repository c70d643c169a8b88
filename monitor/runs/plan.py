"""Which of the snapshots that wait is measured next, within a share of the run's time."""

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from phasewatch.monitor.runs.coarse_to_fine import next_step
from phasewatch.monitor.trajectories.transitions import Transition


class Plan:
    """Chooses the next step to measure, and keeps account of the time that measuring takes.

    The first measurement is made at once, to learn what one costs, and paid back before the second.

    Args:
        fraction: seconds of measuring for each second of training; None measures everything, in order of step.
        waits: whether training waits while measuring, so that the time is not training's own.

    Example:
        >>> plan = Plan(None, waits=True)
        >>> plan.choose([20, 10], measured=[])
        10
    """

    def __init__(self, fraction: float | None, *, waits: bool) -> None:
        self._fraction = fraction
        self._waits = waits
        self._began = time.perf_counter()
        self._measuring = 0.0
        self._measured = 0

    @property
    def in_order(self) -> bool:
        """Whether all steps are measured, the earliest of those that wait first."""
        return self._fraction is None

    def choose(
        self, candidates: Collection[int], measured: Collection[int], found: Sequence[Transition] = ()
    ) -> int | None:
        """The step to measure now.

        Args:
            candidates: steps whose snapshots wait.
            measured: steps that have a point.
            found: the transitions of the points.

        Returns:
            One of the candidates: the earliest if there is no share, else that of `next_step`. None if there is none,
            or no time for one.
        """
        if not candidates:
            return None
        if self._fraction is None:
            return min(candidates)
        training = self._training()
        if not affords(self._fraction, training=training, measuring=self._measuring, measured=self._measured):
            return None
        return next_step(candidates, measured, found)

    def seconds_to_next(self) -> float | None:
        """How long until the share has room for one more measurement; None without a share, or before the first."""
        if self._fraction is None or self._measured == 0:
            return None
        needed = (self._measuring + self._measuring / self._measured) / self._fraction
        return max(0.0, needed - self._training())

    def _training(self) -> float:
        """Seconds of the run so far, without the measuring that it waited for."""
        elapsed = time.perf_counter() - self._began
        return elapsed - self._measuring if self._waits else elapsed

    @contextmanager
    def account(self) -> Iterator[None]:
        """Count the block as one measurement, unless it is interrupted."""
        began = time.perf_counter()
        yield
        self._measuring += time.perf_counter() - began
        self._measured += 1


def affords(fraction: float, *, training: float, measuring: float, measured: int) -> bool:
    """Whether one more measurement fits into a share of the time.

    Args:
        fraction: seconds of measuring for each second of training.
        training: seconds of the run so far, without the measuring that it waited for.
        measuring: seconds measured so far.
        measured: measurements so far.

    Returns:
        True for the first, and whenever one more of mean cost stays within the share.
    """
    return measured == 0 or measuring + measuring / measured <= fraction * training
