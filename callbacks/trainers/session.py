"""One training as a monitor records it: the run's folder, what waits in it, and what measures it."""

import atexit
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from phasewatch.callbacks.trainers.backlog import Backlog
from phasewatch.callbacks.trainers.calibrating import Calibrating
from phasewatch.callbacks.trainers.measuring import DISK_SECONDS, Background, Inline, Measuring
from phasewatch.monitor.errors import PhasewatchError, in_words, requires, say, warn
from phasewatch.monitor.probing.probe import Probe
from phasewatch.monitor.runs.calibration import RunCalibration, calibrated_before
from phasewatch.monitor.runs.executor import InProcess
from phasewatch.monitor.runs.folder import RunFolder
from phasewatch.monitor.runs.numbers import NumbersFile
from phasewatch.monitor.runs.plan import Plan
from phasewatch.monitor.runs.processes import Processes, packed
from phasewatch.monitor.runs.record import Recorder
from phasewatch.monitor.runs.sink import Sink
from phasewatch.monitor.snapshots.folder import SnapshotFolder
from phasewatch.monitor.snapshots.snapshot import Snapshot, same_weights

BACKGROUND_NICE = 10
"""How far a background measurement steps back behind training on the same processor, 0 to 19: at 10 it gets about a
tenth of a processor that training wants too, and all of one that is idle."""

EXIT_SECONDS = 10.0
"""Seconds that a process which ends without `close()` waits for a snapshot that is being written: a few gigabytes on
an ordinary disk, and no hang on one that is gone."""


@dataclass(frozen=True)
class Options:
    """How a session records.

    Attributes:
        sinks: told of points and transitions.
        background: measure in another process.
        keep_snapshots: keep a snapshot's file after it is measured.
        fraction: seconds of measuring for each second of training; None for no limit.
        average: the share of the steps that weights are averaged over; None for weights as they are.
        calibrate: find the sampler's setting on the run's own snapshots.
        calibrate_at: the step to do so at; None for the first snapshots.
    """

    sinks: Sequence[Sink]
    background: bool
    keep_snapshots: bool
    fraction: float | None
    average: float | None
    calibrate: bool = False
    calibrate_at: int | None = None


class Session:
    """Records one training in a run's folder, or in one beside it if the folder holds another training.

    Args:
        run: the run's folder.
        probe: measures.
        options: how.

    Attributes:
        folder: the run's folder.

    Raises:
        PhasewatchError: if the folder can't be used, or the probe can't be sent to another process.
    """

    def __init__(self, run: str | Path, probe: Probe, options: Options) -> None:
        self._given = probe
        self._options = options
        self._probe, self._calibration = calibrated_before(Path(run), probe)
        self._executor = self._make_executor(SnapshotFolder(Path(run) / "snapshots"))
        self.folder = self._open(run)
        if self._calibration and self._calibration.steps:
            say(f"{self.folder.path} goes on with the setting that it was calibrated to: {self._probe.sampler}")
        self._backlog: Backlog | None = None
        self._numbers: NumbersFile | None = None
        self._measuring: Measuring | None = None
        self._recorder: Recorder | None = None
        self._process = os.getpid()

    @property
    def has_begun(self) -> bool:
        """Whether a snapshot has come, so that it is known which training this is."""
        return self._backlog is not None

    @property
    def in_background(self) -> bool:
        """Whether another process measures."""
        return self._options.background

    @property
    def recorded(self) -> set[int]:
        """The steps of the folder's points and snapshots."""
        return {*self.folder.steps, *self.folder.snapshots.steps}

    @property
    def numbers_of_waiting(self) -> dict[int, dict[str, float]]:
        """What the numbers beside the snapshots were at the steps that wait to be measured."""
        assert self._backlog
        assert self._numbers
        return {step: self._numbers.at(step) for step in self._backlog.waiting}

    def let_no_rank_wait(self) -> None:
        """Measure in the background after all: the other ranks of the training don't wait in monitors of their own.

        They would wait in their next exchange with this one, which ends at the process group's timeout.
        """
        if self._options.background:
            return
        options, self._options = self._options, replace(self._options, background=True)
        try:
            self._executor = self._make_executor(self.folder.snapshots)
        except PhasewatchError as error:
            self._options = options
            warn(
                "PhaseMonitor(measure='inline') was made on one rank of this training. The others wait for it in their "
                "next exchange of gradients, and where a measurement takes longer than the process group's timeout, "
                "the training ends. Make the monitor on every rank, or give the probe the function that builds its "
                f"model, so that it can be measured in the background. ({error})"
            )
            return
        say(
            "this monitor was made on one rank of a distributed training, so it measures in the background: the other "
            "ranks would wait for it, and at the process group's timeout the training would end"
        )

    def begin(self, snapshot: Snapshot | None, first_step: int | None) -> set[int]:
        """Begin or resume the run, now that the first snapshot tells whether it is the same training.

        Args:
            snapshot: the first that is due; None if training ended without one.
            first_step: the first step that the monitor was called with.

        Returns:
            The steps whose snapshots are there already.
        """
        if snapshot and first_step is not None and self._is_another_training(snapshot, first_step):
            self._divert()
        waits = not self._options.background
        self._numbers = NumbersFile(self.folder.path)
        self._recorder = Recorder(self._options.sinks, self.folder)
        self._backlog = Backlog(
            self.folder,
            self._recorder,
            self._executor,
            self._probe,
            Plan(self._options.fraction, waits=waits),
            keep_snapshots=self._options.keep_snapshots,
            waits=waits,
            calibrating=self._calibrating(),
        )
        self._measuring = Inline(self._backlog) if waits else Background(self._backlog)
        self._finish_before_others()
        return self._backlog.steps

    def take(self, snapshot: Snapshot, numbers: Mapping[str, float]) -> None:
        """Have a snapshot saved and measured, and the numbers beside its tensors kept."""
        assert self._measuring
        assert self._numbers
        self._numbers.keep(snapshot.step, numbers)
        self._finish_before_others()
        self._measuring.take(snapshot)

    def finish(self, *, measure_rest: bool, seconds: float | None = None, report: bool = True) -> None:
        """Measure what waits, close the sinks, and write the report.

        Args:
            measure_rest: False leaves what waits unmeasured, and names it.
            seconds: how long to wait for each thread; None for as long as it takes.
            report: write it, which takes seconds.
        """
        if self._backlog is None:
            if not self.folder.points and not self.folder.snapshots.steps:
                Recorder(self._options.sinks).close()
                return
            self.begin(None, None)
        assert self._backlog
        assert self._measuring
        assert self._recorder
        if not measure_rest:
            self._executor.close()
        elif self._options.background and (left := len(self._backlog.waiting)) > 1:
            say(f"measuring the last {left} snapshots of {self.folder.path}")
        self._measuring.finish(seconds)
        while measure_rest and self._backlog.measure_next(over=True):
            pass
        self._executor.close()
        self._recorder.finish()
        self._name_what_is_left(measure_rest)
        try:
            if report and self.folder.points:  # while the sinks finish
                write_report(self.folder.path)
        except PhasewatchError as error:
            warn(str(error))
        except OSError as error:
            warn(f"{self.folder.path}/report.html could not be written ({error.strerror or error}).")
        finally:
            self._recorder.wait()

    def stop(self) -> None:
        """Let go of the folder and of every process, whatever is under way."""
        atexit.unregister(self._finish_at_exit)
        if self._measuring:
            self._measuring.abandon()
        self._executor.close()
        if not self._backlog or self._backlog.disk_seconds < DISK_SECONDS:  # the system lets go of the lock as well
            self.folder.close()

    def _finish_before_others(self) -> None:
        """Have the process finish this session when it ends, before W&B ends a run that a sink has opened since."""
        atexit.unregister(self._finish_at_exit)
        atexit.register(self._finish_at_exit)  # handlers are called last in, first out

    def _finish_at_exit(self) -> None:
        if os.getpid() != self._process:  # a process that training forked
            return
        try:
            self.finish(measure_rest=False, seconds=EXIT_SECONDS)
        except Exception as error:
            warn(f"{self.folder.path} could not be finished: {in_words(error)}")
        finally:
            self.stop()

    def _name_what_is_left(self, measure_rest: bool) -> None:
        assert self._backlog
        if unwritten := self._backlog.unwritten:
            say(
                f"{len(unwritten)} snapshots of {self.folder.path} are measured and were never written, since the disk "
                f"refused them: steps {', '.join(map(str, unwritten))}."
            )
        if left := self._backlog.waiting:
            why = "were left out by the budget" if measure_rest else "were not measured"
            run = repr(str(self.folder.path))
            warn(
                f"{len(left)} snapshots of {self.folder.path} {why}: steps {', '.join(map(str, left))}. "
                f"replay({run}, probe, run={run}) measures them."
            )

    def _calibrating(self) -> Calibrating | None:
        if self._calibration is None or self._calibration.steps:
            return None
        return Calibrating(self._probe, self.folder, self._executor, self._calibration, self._options.calibrate_at)

    def _make_executor(self, snapshots: SnapshotFolder) -> InProcess | Processes:
        if self._options.background:
            return Processes(packed(self._probe, snapshots), nice=BACKGROUND_NICE)
        return InProcess(self._probe, snapshots)

    def _open(self, run: str | Path) -> RunFolder:
        folder = RunFolder(run, self._probe.settings, chains=self._probe.subject.loss.path)
        folder.keep_averaging(self._options.average, f"PhaseMonitor(average={self._options.average!r})")
        if self._options.calibrate and self._calibration is None:
            self._calibration = RunCalibration(self._given.sampler.as_json())
        if self._calibration:
            folder.keep_calibration(self._calibration.as_json(), self._probe.settings)
        return folder

    def _is_another_training(self, snapshot: Snapshot, first_step: int) -> bool:
        """Whether training began anew in a folder that holds another's results, or whose snapshot can't show whose.

        A run resumed on hardware that doesn't repeat sums bit for bit has other weights too, so that one goes on.
        """
        saved, recorded = self.folder.snapshots.steps, self.recorded
        if not recorded:
            return False
        began_anew = first_step <= min(recorded)
        if snapshot.step not in saved:
            return began_anew
        differs = not same_weights(snapshot, self.folder.snapshots.load(snapshot.step))
        # An average begun anew where training was resumed differs from the one that was saved there.
        if differs and not began_anew and self._options.average is None:
            warn(
                f"The weights at step {snapshot.step} are not those that {self.folder.path} holds of that step. "
                "If this is another training and not the same one resumed, stop it and choose another run=."
            )
        return differs and began_anew

    def _divert(self) -> None:
        taken = self.folder
        number = 2
        while (path := taken.path.with_name(f"{taken.path.name}-{number}")).exists():
            number += 1
        self._probe, self._calibration = self._given, None
        self.folder = self._open(path)
        self._executor = self._make_executor(self.folder.snapshots)
        taken.close()
        warn(
            f"{taken.path} holds another training's points, or no snapshot to tell whose; this one is kept in {path}. "
            f"If you resume this one later, say run={str(path)!r}."
        )


def write_report(run: Path) -> None:
    """Write a run's report, where the packages that draw it are installed.

    Raises:
        PhasewatchError: if one of them isn't.
    """
    with requires(f"The report of {run}"):
        from phasewatch.callbacks.sinks.report import write_report as write
    write(run)
