"""Measuring a saved series of checkpoints again, in order, with one process or several."""

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from phasewatch.monitor.errors import PhasewatchError, in_words, say, warn, whole_number
from phasewatch.monitor.probing.attributes import ChangedNumbers
from phasewatch.monitor.probing.automatic import WORD, calibrated, early_middle_late
from phasewatch.monitor.probing.probe import Probe
from phasewatch.monitor.runs.calibration import RunCalibration, calibrated_before, tell
from phasewatch.monitor.runs.executor import Executor, InProcess
from phasewatch.monitor.runs.folder import RunFolder
from phasewatch.monitor.runs.numbers import NumbersFile
from phasewatch.monitor.runs.processes import Processes, packed
from phasewatch.monitor.runs.record import Recorder
from phasewatch.monitor.runs.sink import Sink
from phasewatch.monitor.snapshots.averaging import AveragedSnapshots
from phasewatch.monitor.snapshots.folder import SnapshotFolder
from phasewatch.monitor.snapshots.series import FetchedSeries, open_series
from phasewatch.monitor.snapshots.snapshot import Snapshot, Snapshots
from phasewatch.monitor.trajectories.trajectory import Point

OnError = Callable[[str], None]


def replay(
    series: str | Path | Snapshots,
    probe: Probe,
    *,
    run: str | Path | None = None,
    workers: int = 1,
    on: Callable[[Probe, Snapshots], Executor] | None = None,
    sinks: Sequence[Sink] = (),
    progress: bool = False,
    on_error: OnError = warn,
    sampler: Literal["calibrate"] | None = None,
) -> Generator[Point]:
    """Measure every snapshot of a series.

    A checkpoint that can't be read or measured costs its own point and a message; the others go on. A run whose setting
    was calibrated is measured with that setting, unless the probe has a sampler other than the monitor's had.

    Args:
        series: a run's folder, a folder of checkpoints, or what `open_series` returned.
        probe: measures; made with a function that builds its model if `workers` is more than 1.
        run: a folder to keep the points in. What it holds is not measured again.
        workers: processes, one checkpoint each at a time. With one, this process measures.
        on: makes the executor that measures, from the probe and the series, in place of `workers`.
        sinks: told of each point and transition.
        progress: show a bar with the time left.
        on_error: takes a sentence for each checkpoint that could not be measured; a warning by default.
        sampler: "calibrate" first finds the setting, on the first, the middle and the last checkpoint.

    Returns:
        The points: those that `run` holds already first, then the others as they are measured, in order of step with
        one worker.

    Raises:
        PhasewatchError: before anything is measured, if the series, the folder or the probe can't be used.

    Example:
        >>> import tempfile, torch
        >>> from phasewatch import SGLD, Probe, Snapshot, SnapshotFolder, replay
        >>> folder = SnapshotFolder(tempfile.mkdtemp())
        >>> for step in (10, 20):
        ...     _ = torch.manual_seed(step)
        ...     folder.save(Snapshot.of(torch.nn.Linear(2, 1), step))
        >>> def loss(model, batch):
        ...     return model(batch).square().mean()
        >>> sampler = SGLD(step_size=1e-3, nbeta=10.0, chains=2, draws=10, burn_in=5, batch_size=16)
        >>> probe = Probe(lambda: torch.nn.Linear(2, 1), loss, torch.randn(64, 2), sampler=sampler)
        >>> [point.step for point in replay(folder, probe)]
        [10, 20]
    """
    if sampler is not None and sampler != WORD:
        raise PhasewatchError(
            f"replay(sampler={sampler!r}) must be 'calibrate' or left out. A setting belongs to the probe: "
            "Probe(sampler=...) or probe.with_sampler(...)."
        )
    workers = whole_number("replay(workers=...)", workers, least=1)
    snapshots = open_series(series) if isinstance(series, str | Path) else series
    _refuse_another_model(snapshots, probe)
    if on is not None and workers > 1:
        raise PhasewatchError(f"replay(workers={workers}, on=...) says twice where to measure. Give one of them.")
    probe, known = _calibrated_before(run, snapshots, probe)
    if known is None and sampler is not None:
        known = RunCalibration(probe.sampler.as_json())
    executor: Executor | None = None
    if known is None or known.steps:
        executor = _executor(probe, snapshots, workers, on)
    folder = None if run is None else _opened(run, probe, snapshots)
    if folder and known:
        folder.keep_calibration(known.as_json(), probe.settings)
    if executor is None:
        try:
            probe = _calibrated(probe, snapshots, folder)
            executor = _executor(probe, snapshots, workers, on)
        except BaseException:
            if folder:
                folder.close()
            raise
    _recall_numbers(probe, snapshots, [] if folder is None else folder.steps)
    return _replayed(snapshots, executor, folder, sinks, progress, on_error, probe.settings)


def _refuse_another_model(snapshots: Snapshots, probe: Probe) -> None:
    """Compare the probe's model with the shapes of a series that lies elsewhere, before gigabytes of it are fetched.

    Raises:
        PhasewatchError: if a tensor is missing or has another shape.
    """
    if not isinstance(snapshots, FetchedSeries) or (shapes := snapshots.shapes(snapshots.steps[0])) is None:
        return
    described = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with probe.subject.measuring():
        probe.subject.model.fitting(Snapshot(snapshots.steps[0], described))


def _executor(
    probe: Probe, snapshots: Snapshots, workers: int, on: Callable[[Probe, Snapshots], Executor] | None
) -> Executor:
    if on is not None:
        return on(probe, snapshots)
    return InProcess(probe, snapshots) if workers == 1 else Processes(packed(probe, snapshots), workers=workers)


def _calibrated_before(
    run: str | Path | None, snapshots: Snapshots, probe: Probe
) -> tuple[Probe, RunCalibration | None]:
    """The probe of the setting that the run was calibrated to, or the run that the snapshots are of."""
    folders = [] if run is None else [Path(run)]
    if isinstance(snapshots, SnapshotFolder):
        folders.append(snapshots.path.parent)
    for folder in folders:
        ready, known = calibrated_before(folder, probe)
        if known and known.steps:
            say(f"measuring with the setting that {folder} was calibrated to: {ready.sampler}")
        if known:
            return ready, known
    return probe, None


def _calibrated(probe: Probe, snapshots: Snapshots, folder: RunFolder | None) -> Probe:
    """The probe with a setting found on an early, a middle and a late snapshot, which the folder keeps."""
    steps = early_middle_late(snapshots.steps)
    setting = calibrated(snapshots, steps, probe)
    found = probe.with_sampler(setting.sampler)
    if folder:
        known = RunCalibration(probe.sampler.as_json(), tuple(steps))
        folder.keep_calibration(known.as_json(), found.settings, setting.why)
    tell(setting, steps, folder.path if folder else None)
    return found


def _recall_numbers(probe: Probe, snapshots: Snapshots, measured: Collection[int]) -> None:
    """Say where training had other numbers than the probe has beside the tensors of the snapshots."""
    if not isinstance(snapshots, SnapshotFolder):
        return
    kept, changed = NumbersFile(snapshots.path.parent), ChangedNumbers(probe.subject)
    for step in snapshots.steps:
        if step not in measured:
            changed.recall(step, kept.at(step))


def _opened(run: str | Path, probe: Probe, snapshots: Snapshots) -> RunFolder:
    folder = RunFolder(run, probe.settings)
    if _is_its_own(folder, snapshots):
        return folder
    if strangers := sorted(folder.steps - set(snapshots.steps)):
        folder.close()
        raise PhasewatchError(
            f"replay(run={str(run)!r}) holds points of steps that the series doesn't have, such as {strangers[0]}, "
            "so they are of another series. Choose another run=."
        )
    if isinstance(snapshots, AveragedSnapshots):
        averaging = {"neighbours": snapshots.neighbours, "within": snapshots.within}
        folder.keep_averaging(averaging, "replay(averaged(...))")
    else:
        folder.keep_averaging(None, "replay(...)")
    return folder


def _is_its_own(folder: RunFolder, snapshots: Snapshots) -> bool:
    """Whether the series is the run's own snapshots, some of which may have been deleted after they were measured."""
    if isinstance(snapshots, AveragedSnapshots):
        return False
    home = folder.path.resolve()
    return any(home in snapshots.source(step).resolve().parents for step in snapshots.steps)


def _replayed(
    snapshots: Snapshots,
    executor: Executor,
    folder: RunFolder | None,
    sinks: Sequence[Sink],
    progress: bool,
    on_error: OnError,
    settings: Mapping[str, Any],
) -> Generator[Point]:
    known = folder.points[:] if folder else []
    missing = sorted(set(snapshots.steps) - {point.step for point in known})
    recorder = Recorder(sinks, folder, settings)
    bar = tqdm(total=len(known) + len(missing), initial=len(known), unit="checkpoint", disable=not progress)
    bad = 0
    try:
        yield from known
        for step, result in executor.measure(missing):
            bar.update()
            if isinstance(result, Exception):
                bad += 1
                on_error(f"Step {step} is left out: {in_words(result)}")
                continue
            recorder.record(result)
            yield result
    finally:
        executor.close()
        bar.close()
        try:
            recorder.close()
        finally:
            if folder:
                folder.close()
    if bad and bad == len(missing) and not known:
        raise PhasewatchError(f"None of the {bad} checkpoints could be measured; the messages above say why.")
