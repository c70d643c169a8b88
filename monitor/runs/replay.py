"""Measuring a saved series of checkpoints again, in order, with one process or several."""

import itertools
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from phasewatch.monitor.errors import PhasewatchError, in_words, say, warn, whole_number
from phasewatch.monitor.files import leads_out
from phasewatch.monitor.probing.attributes import ChangedNumbers
from phasewatch.monitor.probing.automatic import WORD, calibrated, early_middle_late
from phasewatch.monitor.probing.probe import Probe
from phasewatch.monitor.runs.boundaries import how_well_known
from phasewatch.monitor.runs.calibration import RunCalibration, calibrated_before, tell
from phasewatch.monitor.runs.coarse_to_fine import FIRST, Aim, first_steps, is_enough, next_step
from phasewatch.monitor.runs.executor import Executor, Order, executor_on, in_batches
from phasewatch.monitor.runs.folder import RunFolder
from phasewatch.monitor.runs.numbers import NumbersFile
from phasewatch.monitor.runs.record import Recorder
from phasewatch.monitor.runs.sink import Sink
from phasewatch.monitor.runs.together import Leader, follow, is_follower
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
    on: str | Callable[[Probe, Snapshots], Executor] | None = None,
    options: Mapping[str, Any] | None = None,
    sinks: Sequence[Sink] = (),
    progress: bool = False,
    on_error: OnError = warn,
    sampler: Literal["calibrate"] | None = None,
    budget: int | None = None,
    within: float | None = None,
) -> Generator[Point]:
    """Measure every snapshot of a series, or with `budget` or `within` those that tell where its transitions lie.

    Then 16 snapshots spread evenly over the series are measured first, and both ends. What they show decides where the
    others lie: the gaps that touch the 95 % intervals of boundaries are halved, the widest first; elsewhere a gap
    counts for a quarter. At the end a sentence says of each boundary how well it is known, and what would help.

    A checkpoint that can't be read or measured costs its own point and a message; the others go on. A run whose setting
    was calibrated is measured with that setting, unless the probe has a sampler other than the monitor's had.

    Where the probe's model is spread over processes, every rank calls `replay` and goes through what it returns. Rank 0
    chooses the steps and writes; the others measure along, and get the points that are measured now.

    Args:
        series: a run's folder, a folder of checkpoints, or what `open_series` returned.
        probe: measures; made with a function that builds its model if `workers` is more than 1.
        run: a folder to keep the points in. What it holds is not measured again.
        workers: processes that measure at the same time. With one on this machine, this process measures.
        on: where they run: "local", "slurm", "ray://HOST:PORT", "ray" for the cluster of this machine, or "external"
            for those that you start yourself with `phasewatch work`; all but the first share the work through `run`.
            Or a function that makes the executor that measures, from the probe and the series.
        options: of the place, such as {"partition": "gpu", "gpus_per_node": 1} for SLURM and {"num_gpus": 1} for Ray.
        sinks: told of each point and transition.
        progress: show a bar with the time left.
        on_error: takes a sentence for each checkpoint that could not be measured; a warning by default.
        sampler: "calibrate" first finds the setting, on the first, the middle and the last checkpoint.
        budget: how many checkpoints are measured at most, those that `run` holds already included.
        within: measure until the end of each boundary's interval is at most this many times its start, or no checkpoint
            in it is left; 1.2 for a fifth.

    Returns:
        The points: those that `run` holds already first, then the others as they are measured, in order of step with
        one worker unless `budget` or `within` chooses the order.

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
    aim = None if budget is None and within is None else Aim(budget, within)
    snapshots = open_series(series) if isinstance(series, str | Path) else series
    _refuse_another_model(snapshots, probe)
    if callable(on) and (workers > 1 or options):
        given = f"workers={workers}" if workers > 1 else "options=..."
        raise PhasewatchError(f"replay({given}, on=...) says twice where to measure. Give one of them.")
    if probe.is_sharded and (workers > 1 or sampler or on not in {None, "local"}):
        raise PhasewatchError(
            "replay(workers=..., on=..., sampler=...) go with a probe of a whole model, and this probe's model is "
            "spread over the processes that measure. Leave them out; pw.calibrate, called on every rank, finds a "
            "setting."
        )
    probe, known = _calibrated_before(run, snapshots, probe)
    if is_follower(probe):
        return follow(probe, snapshots)
    if known is None and sampler is not None:
        known = RunCalibration(probe.sampler.as_json())

    def made_by(probe: Probe) -> Executor:
        if probe.is_sharded:
            return Leader(probe, snapshots)
        if callable(on):
            return on(probe, snapshots)
        return executor_on(
            Order(probe, snapshots, None if run is None else Path(run), on or "local", workers, options or {})
        )

    executor: Executor | None = None
    if known is None or known.steps:
        executor = made_by(probe)
    try:
        folder = None if run is None else _opened(run, probe, snapshots)
    except PhasewatchError:
        if executor:
            executor.close()
        raise
    if folder and known:
        folder.keep_calibration(known.as_json(), probe.settings)
    if executor is None:
        try:
            probe = _calibrated(probe, snapshots, folder)
            executor = made_by(probe)
        except BaseException:
            if folder:
                folder.close()
            raise
    _recall_numbers(probe, snapshots, [] if folder is None else folder.steps)
    at_once = max(workers, probe.together)
    return _replayed(snapshots, executor, folder, sinks, progress, on_error, probe.settings, aim, at_once)


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
    folder = RunFolder(run, probe.settings, chains=probe.subject.loss.path)
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
    return any(not leads_out(snapshots.source(step), folder.path) for step in snapshots.steps)


def _replayed(
    snapshots: Snapshots,
    executor: Executor,
    folder: RunFolder | None,
    sinks: Sequence[Sink],
    progress: bool,
    on_error: OnError,
    settings: Mapping[str, Any],
    aim: Aim | None,
    at_once: int,
) -> Generator[Point]:
    known = folder.points[:] if folder else []
    missing = sorted(set(snapshots.steps) - {point.step for point in known})
    recorder = Recorder(sinks, folder, settings)
    total = len(known) + len(missing)
    if aim and aim.budget is not None:
        total = min(total, max(aim.budget, len(known)))
    bar = tqdm(total=total, initial=len(known), unit="checkpoint", disable=not progress)
    tried = bad = 0
    rounds = iter([missing]) if aim is None else _coarse_to_fine(snapshots.steps, recorder, aim, at_once)
    try:
        yield from known
        for batch in itertools.chain.from_iterable(in_batches(executor, steps) for steps in rounds):
            points = [result for _, result in batch if isinstance(result, Point)]
            bar.update(len(batch))
            tried += len(batch)
            for step, result in batch:
                if isinstance(result, Exception):
                    bad += 1
                    on_error(f"Step {step} is left out: {in_words(result)}")
            if points:
                recorder.record(*points)
                yield from points
        if aim:
            for line in how_well_known(recorder.trajectory(), recorder.transitions(), snapshots.steps, aim):
                say(line)
    finally:
        executor.close()
        bar.close()
        try:
            recorder.close()
        finally:
            if folder:
                folder.close()
    if bad and bad == tried and not known:
        raise PhasewatchError(f"None of the {bad} checkpoints could be measured; the messages above say why.")


def _coarse_to_fine(steps: Sequence[int], recorder: Recorder, aim: Aim, at_once: int) -> Iterator[list[int]]:
    """Steps to measure together, of which each round asks the points of those before.

    A step that could not be measured is not asked for again, and counts as measured for the budget.
    """
    asked = set(recorder.trajectory().steps.tolist())
    budget = len(steps) if aim.budget is None else aim.budget
    chosen = [step for step in first_steps(steps, min(budget, FIRST + 2)) if step not in asked]
    while len(asked) < budget:
        if not chosen and is_enough(steps, asked, recorder.found, aim):
            return
        while (
            len(chosen) < at_once and (step := next_step(steps, asked.union(chosen), recorder.found, aim)) is not None
        ):
            chosen.append(step)
        if not chosen:
            return
        chosen = chosen[: budget - len(asked)]
        yield chosen
        asked.update(chosen)
        chosen = []
