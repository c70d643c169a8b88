"""From a snapshot in a training loop to a point in the run's folder, as far as the time allows."""

import threading
import time
from bisect import bisect_left, insort
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from phasewatch.callbacks.trainers.calibrating import Calibrating
from phasewatch.monitor.errors import in_words, warn
from phasewatch.monitor.estimates.estimate import Health
from phasewatch.monitor.probing.probe import Probe
from phasewatch.monitor.runs.executor import Executor
from phasewatch.monitor.runs.folder import RunFolder
from phasewatch.monitor.runs.plan import Plan
from phasewatch.monitor.runs.record import Recorder
from phasewatch.monitor.snapshots.snapshot import Snapshot
from phasewatch.monitor.trajectories.trajectory import Point

DOUBTS_IN_A_ROW = 3
"""Points in a row with one verdict after which the sampler's setting is called in question."""

OF_A_SETTING = frozenset(health for health in Health if health.doubtful) - {Health.NEGATIVE, Health.OFF_MINIMUM}
"""Verdicts that another setting mends. That a snapshot is at no minimum, as early in training, isn't one."""


MOST_UNWRITTEN = 2**30
"""Bytes of snapshots that are measured and that the disk refuses; the oldest beyond are let go, so that a full disk
doesn't fill the memory as well."""


class Backlog:
    """The snapshots that wait to be measured: saved in the run's folder, or in memory while the disk refuses them.

    One thread may save while another measures. Neither raises anything but an interruption.

    Args:
        folder: the run's folder; snapshots in it that have no point wait.
        recorder: takes the points.
        executor: measures the snapshots that lie in the folder.
        probe: measures those in memory.
        plan: which one is next.
        keep_snapshots: keep a snapshot's file after it is measured.
        waits: whether training waits while measuring, so that snapshots in memory are measured meanwhile.
        calibrating: makes the probe's setting out of the first snapshots, before any is measured; None if it has one.
    """

    def __init__(
        self,
        folder: RunFolder,
        recorder: Recorder,
        executor: Executor,
        probe: Probe,
        plan: Plan,
        *,
        keep_snapshots: bool,
        waits: bool,
        calibrating: Calibrating | None = None,
    ) -> None:
        self._folder = folder
        self._recorder = recorder
        self._executor = executor
        self._probe = probe
        self._plan = plan
        self._keep_snapshots = keep_snapshots
        self._waits = waits
        self._calibrating = calibrating
        self._saved = sorted(set(folder.snapshots.steps) - folder.steps)
        self._held: dict[int, Snapshot] = {}
        self._unwritten: dict[int, Snapshot] = {}
        self._unwritten_bytes = 0
        self._spare: list[int] = []
        self._at_disk: dict[int, float] = {}
        self._verdicts: list[Health] = []
        self._told_of_setting = False
        self._lock = threading.Lock()

    @property
    def steps(self) -> set[int]:
        """The steps that are measured or wait."""
        return {*self._folder.steps, *self._saved, *self._held}

    @property
    def waiting(self) -> list[int]:
        """The steps that are not measured yet, in order."""
        return sorted([*self._saved, *self._held])

    @property
    def seconds_to_next(self) -> float | None:
        """How long until the plan has time for one of those that wait; None if none waits, or time isn't what lacks."""
        return self._plan.seconds_to_next() if self._saved or self._held else None

    @property
    def unwritten(self) -> list[int]:
        """The steps that are measured and whose snapshots the disk refuses, in order."""
        return sorted(self._unwritten)

    @property
    def disk_seconds(self) -> float:
        """How long the disk has been asked for what is being written."""
        return time.monotonic() - min(self._at_disk.copy().values(), default=time.monotonic())

    def take(self, snapshot: Snapshot) -> None:
        """Save a snapshot, to be measured; where the disk refuses it, it waits in memory."""
        with self._lock:
            self._held[snapshot.step] = snapshot
            self._save()

    def measure_next(self, *, over: bool = False) -> bool:
        """Measure one snapshot if one waits and the plan has time for it.

        Args:
            over: training is over, so that what the disk still refuses is measured from memory in any case.

        Returns:
            Whether it did, or tried. False also if the executor was closed meanwhile; the snapshot waits on then.
        """
        with self._lock:
            self._save()
            ready = self._ready(over)
        if self._calibrating and not self._settle(ready, over):
            return False
        with self._lock:
            step = self._plan.choose(
                ready[:1] if self._plan.in_order else ready, self._folder.steps, self._recorder.found
            )
            if step is None:
                return False
            held = self._held.get(step)
        with self._plan.account():
            result = self._measure(step, held)
            if result is None:
                return False
            with self._lock:
                self._forget(step)
                if held is not None and self._keep_snapshots:
                    self._keep_until_written(held)
            if isinstance(result, Exception):
                warn(f"Step {step} could not be measured, and training goes on: {in_words(result)}")
            else:
                self._record(result)
        return True

    def _ready(self, over: bool) -> list[int]:
        """The steps that can be measured now, in order; not a copy, as there may be many, where all are saved."""
        if self._held and (self._waits or over):
            return sorted([*self._saved, *self._held])
        return self._saved

    def _forget(self, step: int) -> None:
        """A step no longer waits, whether it has been saved since it was chosen or not."""
        self._held.pop(step, None)
        if (at := bisect_left(self._saved, step)) < len(self._saved) and self._saved[at] == step:
            del self._saved[at]

    def _settle(self, ready: list[int], over: bool) -> bool:
        """Calibrate if that can be done now; whether the setting is known."""
        assert self._calibrating
        while chosen := self._calibrating.due(ready[:], over=over):
            with self._plan.account():
                probe = self._calibrating.settle(chosen)
            if probe is not None:
                self._probe, self._calibrating = probe, None
                return True
        return False

    def _measure(self, step: int, held: Snapshot | None) -> Point | Exception | None:
        if held is None:
            return dict(self._executor.measure([step])).get(step)
        try:
            return self._probe(held)
        except Exception as error:
            return error

    def _warn_of_a_setting(self, health: Health) -> None:
        """Say it once where points in a row have one verdict that the sampler's setting can mend."""
        self._verdicts.append(health)
        last = self._verdicts[-DOUBTS_IN_A_ROW:]
        alike = last == [health] * DOUBTS_IN_A_ROW
        if alike and health in OF_A_SETTING and not self._told_of_setting:
            self._told_of_setting = True
            warn(
                f"{DOUBTS_IN_A_ROW} points in a row are {health.name}: {health.value} Training goes on, and its "
                "snapshots are kept. calibrate(snapshots, probe) finds a setting that suits the whole run."
            )

    def _record(self, point: Point) -> None:
        self._warn_of_a_setting(point.llc.health)
        self._spare.append(point.step)
        with self._asking_the_disk():
            is_kept = self._recorder.record(point)
        if not is_kept:
            return
        if not self._keep_snapshots:
            for step in self._spare:
                with suppress(OSError):
                    self._folder.snapshots.source(step).unlink()
        self._spare.clear()

    def _save(self) -> None:
        """Write what the disk takes, that of measured steps last."""
        with self._asking_the_disk():
            while self._held:
                step, snapshot = next(iter(self._held.items()))
                if not self._folder.save(snapshot):
                    return
                del self._held[step]
                insort(self._saved, step)
            while self._unwritten and self._folder.save(next(iter(self._unwritten.values()))):
                self._let_go()

    def _keep_until_written(self, snapshot: Snapshot) -> None:
        self._unwritten[snapshot.step] = snapshot
        self._unwritten_bytes += _bytes(snapshot)
        if self._unwritten_bytes > MOST_UNWRITTEN:
            let_go = self._let_go()
            warn(f"The snapshot of step {let_go.step} is measured and isn't kept, since the disk refuses it.")

    def _let_go(self) -> Snapshot:
        """Keep the oldest of the measured snapshots in memory no longer."""
        snapshot = self._unwritten.pop(next(iter(self._unwritten)))
        self._unwritten_bytes -= _bytes(snapshot)
        return snapshot

    @contextmanager
    def _asking_the_disk(self) -> Iterator[None]:
        thread = threading.get_ident()
        self._at_disk[thread] = time.monotonic()
        try:
            yield
        finally:
            del self._at_disk[thread]


def _bytes(snapshot: Snapshot) -> int:
    return sum(tensor.nbytes for tensor in snapshot.tensors.values())
