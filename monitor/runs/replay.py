"""Measuring a saved series of checkpoints again, in order, with one process or several."""

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from tqdm import tqdm

from phasewatch.monitor.errors import PhasewatchError, in_words, warn, whole_number
from phasewatch.monitor.probing.probe import Probe
from phasewatch.monitor.runs.folder import RunFolder, keep_average
from phasewatch.monitor.runs.processes import Worker, WorkerDied, packed
from phasewatch.monitor.runs.publish import Publisher, Sink
from phasewatch.monitor.snapshots.averaging import AveragedSnapshots
from phasewatch.monitor.snapshots.series import open_series
from phasewatch.monitor.snapshots.snapshot import Snapshots
from phasewatch.monitor.trajectories.trajectory import Point

OnError = Callable[[str], None]
Result = tuple[int, Point | Exception]


def replay(
    series: str | Path | Snapshots,
    probe: Probe,
    *,
    run: str | Path | None = None,
    workers: int = 1,
    sinks: Sequence[Sink] = (),
    sink_timeout: float = 30.0,
    progress: bool = False,
    on_error: OnError = warn,
) -> Generator[Point]:
    """Measure every snapshot of a series.

    A checkpoint that can't be read or measured costs its own point and a message; the others go on.

    Args:
        series: a run's folder, a folder of checkpoints, or what `open_series` returned.
        probe: measures; made with a function that builds its model if `workers` is more than 1.
        run: a folder to keep the points in. What it holds is not measured again.
        workers: processes, one checkpoint each at a time. With one, this process measures.
        sinks: told of each point and transition.
        sink_timeout: seconds that a sink may take for one item before it gets nothing more.
        progress: show a bar with the time left.
        on_error: takes a sentence for each checkpoint that could not be measured; a warning by default.

    Returns:
        The points: those that `run` holds already first, then the others as they are measured, in order of step with
        one worker.

    Raises:
        PhasewatchError: before anything is measured, if the series, the folder or the probe can't be used.
    """
    workers = whole_number("replay(workers=...)", workers, least=1)
    snapshots = open_series(series) if isinstance(series, str | Path) else series
    package = packed(probe, snapshots) if workers > 1 else None
    folder = None if run is None else RunFolder(run, probe.settings)
    if folder and (strangers := sorted(folder.steps - set(snapshots.steps))) and not _is_its_own(folder, snapshots):
        folder.close()
        raise PhasewatchError(
            f"replay(run={str(run)!r}) holds points of steps that the series doesn't have, such as {strangers[0]}, "
            "so they are of another series. Choose another run=."
        )
    if folder and isinstance(snapshots, AveragedSnapshots):
        keep_average(folder, {"neighbours": snapshots.neighbours, "within": snapshots.within}, "replay(averaged(...))")
    elif folder and not _is_its_own(folder, snapshots):
        keep_average(folder, None, "replay(...)")
    make_publisher = partial(Publisher, sinks, timeout=sink_timeout)
    return _replayed(snapshots, probe, folder, package, workers, make_publisher, progress, on_error)


def _is_its_own(folder: RunFolder, snapshots: Snapshots) -> bool:
    """Whether the series lies in the run's folder, whose snapshots may have been deleted after they were measured."""
    return any(folder.path.resolve() in snapshots.source(step).resolve().parents for step in snapshots.steps)


def _replayed(
    snapshots: Snapshots,
    probe: Probe,
    folder: RunFolder | None,
    package: bytes | None,
    workers: int,
    make_publisher: Callable[..., Publisher],
    progress: bool,
    on_error: OnError,
) -> Generator[Point]:
    known = folder.points[:] if folder else []
    missing = sorted(set(snapshots.steps) - {point.step for point in known})
    publisher = make_publisher(known=known)
    bar = tqdm(total=len(known) + len(missing), initial=len(known), unit="checkpoint", disable=not progress)
    bad = 0
    try:
        yield from known
        measured = _in_turn(snapshots, probe, missing) if package is None else _in_workers(package, missing, workers)
        with closing(measured):
            for step, result in measured:
                bar.update()
                if isinstance(result, Exception):
                    bad += 1
                    on_error(f"Step {step} is left out: {in_words(result)}")
                    continue
                if folder:
                    folder.append(result)
                transitions = publisher.publish(result)
                if folder:
                    folder.write_transitions(transitions)
                yield result
    finally:
        transitions = publisher.close()
        bar.close()
        if folder:
            try:
                folder.write_transitions(transitions)
            finally:
                folder.close()
    if bad and bad == len(missing) and not known:
        raise PhasewatchError(f"None of the {bad} checkpoints could be measured; the messages above say why.")


def _in_turn(snapshots: Snapshots, probe: Probe, steps: Sequence[int]) -> Generator[Result]:
    """In order, as many at once as the probe measures best together; one by one where that fails."""
    together = probe.together if steps else 1
    for start in range(0, len(steps), together):
        group = steps[start : start + together]
        try:
            points = probe.measure([snapshots.load(step) for step in group]) if len(group) > 1 else []
        except Exception:
            points = []
        yield from zip(group, points, strict=False)
        for step in group[len(points) :]:
            try:
                yield step, probe(snapshots.load(step))
            except Exception as error:
                yield step, error


def _in_workers(package: bytes, steps: Sequence[int], workers: int) -> Generator[Result]:
    """Each of `workers` threads drives a process; this one alone sees their results."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    results: queue.SimpleQueue[Result] = queue.SimpleQueue()
    for step in steps:
        waiting.put(step)
    running: dict[int, Worker] = {}
    stopped = threading.Event()

    def drive(number: int) -> None:
        while not stopped.is_set():
            try:
                step = waiting.get_nowait()
            except queue.Empty:
                break
            try:
                if number not in running:
                    running[number] = Worker(package)
                if stopped.is_set():
                    break
                results.put((step, running[number].measure(step)))
            except Exception as error:
                results.put((step, error))
                if isinstance(error, WorkerDied):
                    running.pop(number).stop()
        if number in running:
            running.pop(number).stop()

    threads = [threading.Thread(target=drive, args=(i,), daemon=True) for i in range(min(workers, len(steps)))]
    for thread in threads:
        thread.start()
    try:
        for _ in steps:
            yield results.get()
    finally:
        stopped.set()
        for worker in list(running.values()):
            worker.kill()
        for thread in threads:
            thread.join()
