"""From a snapshot in a training loop to a point in the run's folder, as far as the time allows."""

import time
from collections.abc import Callable
from contextlib import suppress

from phasewatch.callbacks.trainers.schedule import Budget, most_useful
from phasewatch.monitor.errors import in_words, warn
from phasewatch.monitor.runs.folder import RunFolder
from phasewatch.monitor.runs.publish import Publisher
from phasewatch.monitor.snapshots.snapshot import Snapshot
from phasewatch.monitor.trajectories.trajectory import Point

Measure = Callable[[int, Snapshot | None], Point]
"""Measures a step, from the snapshot if it is given and from the run's folder if not."""


class Stopped(Exception):
    """Raised by a `Measure` that was told to stop; its snapshot waits on."""


class Recorder:
    """Saves snapshots, measures the most useful of those that wait, and publishes the points. It raises nothing.

    Args:
        folder: the run's folder; snapshots in it that have no point wait to be measured.
        publisher: told of each point.
        measure: measures one step.
        budget: holds measuring to a share of the time; None measures everything.
        keep_snapshots: keep a snapshot's file after it is measured.
        waits: whether training waits while measuring, so that the time is not training's own.
    """

    def __init__(
        self,
        folder: RunFolder,
        publisher: Publisher,
        measure: Measure,
        *,
        budget: Budget | None,
        keep_snapshots: bool,
        waits: bool,
    ) -> None:
        self._folder = folder
        self._publisher = publisher
        self._measure = measure
        self._budget = budget
        self._keep_snapshots = keep_snapshots
        self._waits = waits
        self._waiting: dict[int, Snapshot | None] = dict.fromkeys(sorted(set(folder.snapshots.steps) - folder.steps))
        self._spare: list[int] = []
        self._began = time.perf_counter()
        self._measuring = 0.0
        self._measured = 0

    @property
    def steps(self) -> set[int]:
        """The steps that are measured or wait."""
        return self._folder.steps | self._waiting.keys()

    @property
    def waiting(self) -> list[int]:
        """The steps that are not measured yet, in order."""
        return sorted(self._waiting)

    def take(self, snapshot: Snapshot) -> None:
        """Save a snapshot, to be measured; where the disk refuses it, it waits in memory."""
        self._waiting[snapshot.step] = snapshot
        self._save()

    def measure_next(self, *, over: bool = False) -> bool:
        """Measure one snapshot if one waits and the budget affords it.

        Args:
            over: training is over, so that what the disk still refuses is measured from memory in any case.

        Returns:
            Whether it did, or tried.
        """
        self._save()
        ready = [step for step, held in self._waiting.items() if held is None or self._waits or over]
        if not ready or not self._affordable():
            return False
        step = most_useful(ready, self._folder.steps) if self._budget else min(ready)
        began = time.perf_counter()
        try:
            point = self._measure(step, self._waiting[step])
        except Stopped:
            return False
        except Exception as error:
            del self._waiting[step]
            warn(f"Step {step} could not be measured, and training goes on: {in_words(error)}")
        else:
            del self._waiting[step]
            self._record(point)
        self._measuring += time.perf_counter() - began
        self._measured += 1
        return True

    def _affordable(self) -> bool:
        elapsed = time.perf_counter() - self._began
        training = elapsed - self._measuring if self._waits else elapsed
        return self._budget is None or self._budget.affords(
            training=training, measuring=self._measuring, measured=self._measured
        )

    def _record(self, point: Point) -> None:
        self._spare.append(point.step)
        on_disk = self._folder.append(point)
        self._folder.write_transitions(self._publisher.publish(point))
        if on_disk and not self._keep_snapshots:
            for step in self._spare:
                with suppress(OSError):
                    self._folder.snapshots.source(step).unlink()
        if on_disk:
            self._spare.clear()

    def _save(self) -> None:
        for step, snapshot in self._waiting.items():
            if snapshot is None:
                continue
            if not self._folder.save(snapshot):
                return
            self._waiting[step] = None
