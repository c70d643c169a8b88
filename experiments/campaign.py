"""The runs of an experiment: each trained once, its snapshots kept, replayed by a probe, and its points kept for good.

A run lives in a folder that `phasewatch report` opens. What is there isn't trained or measured again, so that an
experiment that was stopped goes on where it was; a run whose points lie under results/points/ is only read, so that
the tables can be made again in seconds. To train it again, give another --results.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path

import torch
from command_line import command_line
from torch import nn
from tqdm import tqdm

from phasewatch import Point, Probe, Sink, Snapshot, SnapshotFolder, Trajectory, WandbSink, log_spaced, replay
from phasewatch.callbacks.sinks.report import write_report
from phasewatch.callbacks.trainers.schedule import Steps
from phasewatch.monitor.sampling.settings import Sampler
from phasewatch.monitor.snapshots.snapshot import Snapshots

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Run:
    """One training of an experiment. Its functions have names in a module, so that another process can run them.

    Attributes:
        name: of its folder and of its points, such as "2-layers-seed-3".
        seed: torch's own when the model is made.
        make_model: builds the model.
        training: trains it in place, and yields the number of steps taken after each of them.
        make_probe: builds what measures the snapshots, of the model as it starts and the device to measure on.
        at: the steps that are measured; training ends with the last of them.
        trained_by: the experiment whose run of this name has the snapshots, if not its own.
    """

    name: str
    seed: int
    make_model: Callable[[], nn.Module]
    training: Callable[[nn.Module], Iterator[int]]
    make_probe: Callable[[nn.Module, str], Probe]
    at: Steps
    trained_by: str = ""

    def initial_model(self) -> nn.Module:
        """The model before its training."""
        torch.manual_seed(self.seed)
        return self.make_model()


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes:
        seeds: of each setting.
        first_seed: the first of them.
        quick: a small size that runs in a minute, to see that it runs; its points aren't kept.
        runs: the folder of the experiment's runs.
        results: the folder of points and tables.
        jobs: processes that train and measure on the CPU side by side.
        only: what the names of the runs that are trained and measured begin with; those that are kept are read anyway.
        device: where snapshots are measured, "cpu" or "cuda".
        train_on: where models are trained.
        wandb: log each run to W&B.
    """

    seeds: range
    quick: bool
    runs: Path
    results: Path
    jobs: int
    only: str
    device: str
    train_on: str
    wandb: bool

    def folder(self, experiment: str) -> Path:
        """The folder of another experiment's runs."""
        return self.runs.with_name(f"{experiment}-quick" if self.quick else experiment)

    def sampler(self, full: Sampler) -> Sampler:
        """A sampler, of the smallest size with --quick."""
        if not self.quick:
            return full
        return replace(full, chains=2, draws=4, burn_in=2, batch_size=full.batch_size and 8)

    def run(
        self,
        seed: int,
        *,
        make_model: Callable[[], nn.Module],
        training: Callable[..., Iterator[int]],
        make_probe: Callable[..., Probe],
        sampler: Sampler,
        at: Steps,
        setting: str = "",
    ) -> Run:
        """A run with a seed; with --quick a dozen steps of it.

        Args:
            seed: of the model and of its training.
            make_model: builds the model.
            training: trains a model with a `seed`.
            make_probe: builds what measures, with a `sampler`.
            sampler: the settings of it.
            at: the steps that are measured.
            setting: what its name begins with, where there are several.
        """
        return Run(
            name=f"{setting}-seed-{seed}" if setting else f"seed-{seed}",
            seed=seed,
            make_model=make_model,
            training=partial(training, seed=seed),
            make_probe=partial(make_probe, sampler=self.sampler(sampler)),
            at=log_spaced(1, 12, num=6) if self.quick else at,
        )


def options(description: str | None, experiment: str, *, seeds: int, arguments: Sequence[str] | None = None) -> Options:
    """Read the command line that all experiments with runs have in common.

    Args:
        description: of the experiment, for --help.
        experiment: its name.
        seeds: how many are run if nothing is said.
        arguments: in place of the command line.

    Returns:
        The options.
    """
    parser = command_line(description, quick="one small run, to see that it works; nothing is claimed")
    parser.add_argument("--seeds", type=int, default=seeds, help="how many (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, help="of those (default: %(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders go (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=None, help="where points and tables go (default: results/)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes side by side (default: all cores)")
    parser.add_argument("--only", default="", help="train and measure only runs whose names begin with this")
    parser.add_argument("--train-on", default="cpu", help="where to train: cpu or cuda (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where to measure: cpu or cuda (default: %(default)s)")
    parser.add_argument("--wandb", action="store_true", help="log each run to W&B, offline without a key")
    given = parser.parse_args(arguments)
    runs = given.runs / (f"{experiment}-quick" if given.quick else experiment)
    return Options(
        seeds=range(given.first_seed, given.first_seed + (1 if given.quick else given.seeds)),
        quick=given.quick,
        runs=runs,
        results=given.results or (runs if given.quick else RESULTS),
        jobs=given.jobs,
        only=given.only,
        device=given.device,
        train_on=given.train_on,
        wandb=given.wandb,
    )


def measured(experiment: str, runs: Sequence[Run], given: Options) -> dict[str, Trajectory]:
    """Train and measure what isn't there, and read the rest.

    Args:
        experiment: its name.
        runs: of it, with different names.
        given: by the command line.

    Returns:
        The trajectory of each run that is measured, by name.
    """
    given = replace(given, runs=given.folder(experiment))
    kept = given.results / "points" / experiment
    kept.mkdir(parents=True, exist_ok=True)
    files = {run.name: kept / f"{run.name}.jsonl" for run in runs}
    missing = [run for run in runs if run.name.startswith(given.only) and not files[run.name].exists()]
    one = partial(_train_and_measure, given=given, experiment=experiment)
    if given.device == "cpu" and given.jobs > 1 and len(missing) > 1:
        with _pool(given.jobs) as pool:
            for _ in tqdm(pool.map(one, missing), desc=experiment, total=len(missing), unit="run"):
                pass
    else:
        if given.jobs > 1 and len(missing) > 1:
            with _pool(given.jobs) as pool:
                trained = pool.map(partial(_trained, given=given), missing)
                list(tqdm(trained, desc="training", total=len(missing)))
        for run in missing:
            one(run, progress=True)
    return {name: Trajectory.read(file) for name, file in files.items() if file.exists()}


def train(run: Run, folder: Path, *, device: str = "cpu", progress: bool = False) -> SnapshotFolder:
    """Train a run and keep its snapshots, unless they are all there.

    Args:
        run: what to train.
        folder: of the experiment's runs.
        device: where to.
        progress: show a bar.

    Returns:
        The snapshots.
    """
    snapshots = snapshots_of(run, folder)
    if set(snapshots.steps) >= run.at.steps:
        return snapshots
    model = run.initial_model()
    if device != "cpu":
        model.to(device)
    if 0 in run.at.steps:
        snapshots.save(Snapshot.of(model, 0))
    last = max(run.at.steps)
    for step in tqdm(islice(run.training(model), last), desc=run.name, total=last, disable=not progress):
        if run.at(step):
            snapshots.save(Snapshot.of(model, step))
    return snapshots


def snapshots_of(run: Run, folder: Path) -> SnapshotFolder:
    """Where a run's snapshots lie in the folder of its experiment's runs."""
    return SnapshotFolder(folder / run.name / "snapshots")


def _trained(run: Run, given: Options, *, progress: bool = False) -> SnapshotFolder:
    folder = given.folder(run.trained_by) if run.trained_by else given.runs
    return train(run, folder, device=given.train_on, progress=progress)


def _train_and_measure(run: Run, given: Options, experiment: str, *, progress: bool = False) -> None:
    snapshots = Selection(_trained(run, given, progress=progress), tuple(sorted(run.at.steps)))
    probe = run.make_probe(run.initial_model(), given.device)
    folder = given.runs / run.name
    sinks: list[Sink] = []
    if given.wandb:
        sinks.append(WandbSink(own_run=True, project="phasewatch-experiments", group=experiment, name=run.name))
    for _ in replay(snapshots, probe, run=folder, sinks=sinks, progress=progress):
        pass
    write_report(folder)
    kept = given.results / "points" / experiment / f"{run.name}.jsonl"
    unfinished = kept.with_suffix(".unfinished.jsonl")
    Trajectory(without_traces(point) for point in Trajectory.read(folder / "points.jsonl")).write(unfinished)
    os.replace(unfinished, kept)


def without_traces(point: Point) -> Point:
    """A point without the traces of doubtful chains, which take twenty times as much room as all the rest."""
    parts = {name: replace(estimate, trace=()) for name, estimate in point.parts.items()}
    return replace(point, llc=replace(point.llc, trace=()), parts=parts)


@dataclass(frozen=True)
class Selection:
    """Some of a series' snapshots.

    Attributes:
        all: the series.
        steps: of those that are wanted, in order.
    """

    all: Snapshots
    steps: tuple[int, ...]

    def load(self, step: int) -> Snapshot:
        """Read one."""
        return self.all.load(step)

    def source(self, step: int) -> Path:
        """Where one comes from."""
        return self.all.source(step)


def _pool(jobs: int) -> ProcessPoolExecutor:
    """Processes of one thread each, since these models are too small for more."""
    return ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_start)


def _start() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Or a process whose parent was killed would train on for hours, into the folder that the next one goes on in."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
