"""The monitor that a plain training loop calls once per step."""

import queue
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from torch import nn

from phasewatch.callbacks.sinks.report import write_report
from phasewatch.callbacks.trainers.recorder import Recorder, Stopped
from phasewatch.callbacks.trainers.schedule import Budget, Schedule
from phasewatch.monitor.errors import PhasewatchError, in_words, say, warn
from phasewatch.monitor.probing.probe import Probe
from phasewatch.monitor.runs.folder import RunFolder, keep_average
from phasewatch.monitor.runs.processes import Worker, WorkerDied, packed
from phasewatch.monitor.runs.publish import Publisher, Sink
from phasewatch.monitor.snapshots.averaging import RunningAverage
from phasewatch.monitor.snapshots.folder import SnapshotFolder
from phasewatch.monitor.snapshots.snapshot import Snapshot, same_weights
from phasewatch.monitor.trajectories.trajectory import Point, Trajectory

BACKGROUND_NICE = 10
"""How far a background measurement steps back behind training on the same processor."""


class PhaseMonitor:
    """Watches a training run: one call per step, `monitor(step)`.

    Training with it is bit-identical to training without it. After construction it raises nothing: what goes wrong is
    a warning. A run folder that holds points already is resumed: what it lacks is measured, and a step it holds is
    not measured again.

    Args:
        model: the model in training.
        probe: measures its snapshots.
        run: the run's folder; made if it isn't there.
        at: which steps: `every(100)`, `log_spaced(1, 50_000, num=80)`, `Budget(0.1, at=...)`, or any `step -> bool`.
        sinks: told of each point and each transition; each in a thread of its own.
        measure: "inline" measures before the call returns. "background" measures in another process, so that the loop
            pays for copying the snapshot alone; the probe must have been made with a function that builds its model.
        keep_snapshots: keep each snapshot's file after it is measured, so that it can be measured again.
        average: measure the mean of the weights over about this share of the steps so far, such as 0.02, in place of
            the weights of one step, whose noise hides what λ̂ does late in training. The snapshots are then of the
            averaged parameters with the model's buffers as they are (batch norm's statistics are not those of the
            averaged weights), and loss, λ̂ and metrics of a point are all theirs; training's own loss isn't in it.
            λ̂ is seen to move later by about that share of the step. It costs a copy of the parameters on their device
            and a pass over them in each call, so call it at each step. The average is kept in memory alone: a run
            killed and begun anew from its seed repeats it bit for bit; one that goes on from a checkpoint begins
            another there, in which that first step weighs (that step / step)^(1/average), 5 % when three times that
            share of the steps have passed. To watch an average that training keeps itself, give that model instead.
        sink_timeout: seconds that a sink may take for one item before it gets nothing more.

    Raises:
        PhasewatchError: for what can't work, before the first step.
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Probe,
        *,
        run: str | Path,
        at: Schedule,
        sinks: Sequence[Sink] = (),
        measure: Literal["inline", "background"] = "inline",
        keep_snapshots: bool = True,
        average: float | None = None,
        sink_timeout: float = 30.0,
    ) -> None:
        if not callable(at):
            raise PhasewatchError(
                f"PhaseMonitor(at={at!r}) must be a schedule such as every(100), "
                "or any function from a step to True or False."
            )
        if measure not in {"inline", "background"}:
            raise PhasewatchError(f"PhaseMonitor(measure={measure!r}) must be 'inline' or 'background'.")
        if not isinstance(model, nn.Module):
            raise PhasewatchError(f"PhaseMonitor(model=...) must be a torch.nn.Module; a {type(model).__name__} came.")
        if not isinstance(probe, Probe):
            raise PhasewatchError(f"PhaseMonitor(probe=...) must be a Probe; a {type(probe).__name__} came.")
        if not isinstance(run, str | Path):
            raise PhasewatchError(f"PhaseMonitor(run={run!r}) must be the path of a folder.")
        sinks = _checked(sinks)
        if average is not None and (
            isinstance(average, bool) or not isinstance(average, int | float) or not 0 < average <= 0.5
        ):
            raise PhasewatchError(
                f"PhaseMonitor(average={average!r}) must be a number above 0 and at most 0.5, such as 0.02: "
                "the share of the steps so far to average over, and no decay."
            )
        if not isinstance(sink_timeout, int | float) or not sink_timeout > 0:
            raise PhasewatchError(f"PhaseMonitor(sink_timeout={sink_timeout!r}) must be a number of seconds above 0.")
        try:
            probe.model.load(Snapshot.of(model, 0))
        except PhasewatchError as error:
            raise PhasewatchError(f"PhaseMonitor(model=...) is not the model of its probe: {error}") from error
        package = packed(probe, SnapshotFolder(Path(run) / "snapshots")) if measure == "background" else None
        self._folder = RunFolder(run, probe.settings)
        keep_average(self._folder, average, f"PhaseMonitor(average={average!r})")
        self._model = model
        self._probe = probe
        self._at = at
        self._sinks = sinks
        self._keep_snapshots = keep_snapshots
        self._average = None if average is None else RunningAverage(average)
        self._sink_timeout = sink_timeout
        self._first_step: int | None = None
        self._publisher: Publisher | None = None
        self._recorder: Recorder | None = None
        self._worker = _MeasuringProcess(package) if package else None
        self._queue: queue.SimpleQueue[Snapshot | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._taken: set[int] = set()
        self._hurry = threading.Event()
        self._told: set[str] = set()
        self._closed = False

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self._folder.path

    @property
    def trajectory(self) -> Trajectory:
        """The points measured so far."""
        return Trajectory(self._folder.points[:])

    def __call__(self, step: int) -> bool:
        """Take a snapshot if one is due, and measure it or send it to be measured.

        Args:
            step: the training step that the model is at; an integer of any library.

        Returns:
            Whether a snapshot was taken.
        """
        if self._closed:
            self._tell_once("close", f"monitor({step!r}) came after monitor.close(): nothing is measured any more.")
            return False
        try:
            return self._observe(_whole(step))
        except Exception as error:
            kind = str(error) if isinstance(error, PhasewatchError) else type(error).__name__
            self._tell_once(kind, f"monitor({step!r}) failed, and training goes on: {in_words(error)}")
            return False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(measure_rest=error is None)

    def close(self, *, measure_rest: bool = True) -> None:
        """Measure what still waits, tell the sinks that this is the end, and write the report.

        Args:
            measure_rest: False leaves what still waits to a resumed run or a replay.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self._finish(measure_rest)
        except KeyboardInterrupt:
            say(f"stopped; what {self.run} lacks is measured when the run is resumed, or by a replay of it")
            raise
        except Exception as error:
            warn(f"monitor.close() failed, and training goes on: {in_words(error)}")
        finally:
            self._hurry.set()
            if self._worker:
                self._worker.stop()
            self._folder.close()

    def _tell_once(self, kind: str, message: str) -> None:
        """Warn the first time: what fails at one step of a night fails at a million."""
        if kind not in self._told:
            self._told.add(kind)
            warn(message)

    def _observe(self, step: int) -> bool:
        if self._first_step is None:
            self._first_step = step
        if self._average:
            self._average.update(self._model, step)
        if not self._at(step) or (self._recorder and step in self._taken):
            return False
        snapshot = (self._average.snapshot if self._average else Snapshot.of)(self._model, step)
        if self._recorder is None:
            self._start(snapshot)
        if step in self._taken:
            return False
        self._taken.add(step)
        if self._thread:
            self._queue.put(snapshot)
        else:
            self._take(snapshot)
        return True

    def _start(self, snapshot: Snapshot | None) -> None:
        """Begin or resume the run, now that the first snapshot tells whether it is the same training."""
        if snapshot and self._is_another_training(snapshot):
            self._divert()
        folder = self._folder
        self._publisher = Publisher(self._sinks, timeout=self._sink_timeout, known=folder.points)
        self._recorder = Recorder(
            folder,
            self._publisher,
            self._measure,
            budget=self._at if isinstance(self._at, Budget) else None,
            keep_snapshots=self._keep_snapshots,
            waits=self._worker is None,
        )
        self._taken = self._recorder.steps
        if self._worker:
            self._thread = threading.Thread(target=self._run, name="phasewatch", daemon=True)
            self._thread.start()

    def _is_another_training(self, snapshot: Snapshot) -> bool:
        """Whether training began anew in a folder that holds another's results, or whose snapshot can't show whose.

        A run resumed on hardware that doesn't repeat sums bit for bit has other weights too, so that one goes on.
        """
        saved = self._folder.snapshots.steps
        recorded = self._folder.steps.union(saved)
        if self._first_step is None or not recorded:
            return False
        began_anew = self._first_step <= min(recorded)
        if snapshot.step not in saved:
            return began_anew
        differs = not same_weights(snapshot, self._folder.snapshots.load(snapshot.step))
        # An average begun anew where training was resumed differs from the one that was saved there.
        if differs and not began_anew and not self._average:
            warn(
                f"The weights at step {snapshot.step} are not those that {self.run} holds of that step. "
                "If this is another training and not the same one resumed, stop it and choose another run=."
            )
        return differs and began_anew

    def _divert(self) -> None:
        taken = self._folder
        number = 2
        while (path := taken.path.with_name(f"{taken.path.name}-{number}")).exists():
            number += 1
        self._folder = RunFolder(path, self._probe.settings)
        keep_average(self._folder, self._average.share if self._average else None, "PhaseMonitor(average=...)")
        if self._worker:
            self._worker = _MeasuringProcess(packed(self._probe, self._folder.snapshots))
        taken.close()
        warn(
            f"{taken.path} holds another training's points, or no snapshot to tell whose; this one is kept in {path}. "
            f"If you resume this one later, say run={str(path)!r}."
        )

    def _measure(self, step: int, snapshot: Snapshot | None) -> Point:
        if self._worker and snapshot is None:
            return self._worker.measure(step)
        return self._probe(snapshot or self._folder.snapshots.load(step))

    def _take(self, snapshot: Snapshot) -> None:
        assert self._recorder
        self._recorder.take(snapshot)
        while self._queue.empty() and not self._hurry.is_set() and self._recorder.measure_next():
            pass

    def _run(self) -> None:
        """The background thread: saves snapshots as they come, and measures between them."""
        while (snapshot := self._queue.get()) is not None:
            try:
                self._take(snapshot)
            except Exception as error:
                warn(f"The snapshot of step {snapshot.step} was lost, and training goes on: {in_words(error)}")

    def _finish(self, measure_rest: bool) -> None:
        if self._recorder is None:
            if self._first_step is not None:
                held = f" The {len(self._folder.points)} points in {self.run} are older." if self._folder.points else ""
                warn(
                    f"PhaseMonitor(at={self._at!r}) never fired from step {self._first_step} on; nothing was "
                    f"measured.{held}"
                )
            if not self._folder.points and not self._folder.snapshots.steps:
                Publisher(self._sinks, timeout=self._sink_timeout).close()
                return
            self._start(None)
        assert self._recorder
        assert self._publisher
        if not measure_rest:
            self._hurry.set()
            if self._worker:
                self._worker.stop()
        if self._thread:
            if measure_rest and (left := self._queue.qsize() + len(self._recorder.waiting)) > 1:
                say(f"measuring the last {left} snapshots of {self.run}")
            self._queue.put(None)
            self._thread.join()
        while measure_rest and self._recorder.measure_next(over=True):
            pass
        if self._worker:
            self._worker.stop()
        self._folder.write_transitions(self._publisher.close())
        if left_out := self._recorder.waiting:
            why = "were left out by the budget" if measure_rest else "were not measured"
            warn(
                f"{len(left_out)} snapshots of {self.run} {why}: steps {', '.join(map(str, left_out))}. "
                f"replay({str(self.run)!r}, probe, run={str(self.run)!r}) measures them."
            )
        if self._folder.points:
            try:
                write_report(self.run)
            except OSError as error:
                warn(f"{self.run}/report.html could not be written ({error.strerror or error}).")


def _checked(sinks: Sequence[Sink]) -> list[Sink]:
    if not isinstance(sinks, Iterable):
        raise PhasewatchError(f"PhaseMonitor(sinks=...) must be a list of sinks; a {type(sinks).__name__} came.")
    sinks = list(sinks)
    for sink in sinks:
        if (
            isinstance(sink, type)
            or not callable(getattr(sink, "write", None))
            or not callable(getattr(sink, "close", None))
        ):
            raise PhasewatchError(
                f"PhaseMonitor(sinks=[{sink!r}]) must hold objects with write(point_or_transition) and close()."
            )
    return sinks


def _whole(step: Any) -> int:
    try:
        number = int(step)
        if number == step and number >= 0:
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise PhasewatchError("a training step is a whole number of at least 0.")


class _MeasuringProcess:
    """A worker that is started when it is first needed, not by the training thread, and again when it dies."""

    def __init__(self, package: bytes) -> None:
        self._package = package
        self._lock = threading.Lock()
        self._stopped = False
        self._worker: Worker | None = None

    def measure(self, step: int) -> Point:
        """Measure a step from disk.

        Args:
            step: the step.

        Returns:
            The point.

        Raises:
            Stopped: if the process was told to end.
            WorkerDied: if the process ended; the next measurement has a new one.
        """
        with self._lock:
            if self._stopped:
                raise Stopped
            worker = self._worker = self._worker or Worker(self._package, nice=BACKGROUND_NICE)
        try:
            return worker.measure(step)
        except WorkerDied:
            if self._stopped:
                raise Stopped from None
            worker.stop()
            self._worker = None
            raise

    def stop(self) -> None:
        """End the process at once."""
        with self._lock:
            self._stopped = True
            if self._worker:
                self._worker.stop()
