"""The command line: demo, calibrate, replay, work, transitions, emergence and report."""

import importlib
import io
import json
import os
import sys
import warnings
from contextlib import chdir, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from phasewatch.monitor.errors import MOST_CHARACTERS, PhasewatchError, PhasewatchWarning, missing_package
from phasewatch.monitor.files import replacing
from phasewatch.monitor.formatting import printable
from phasewatch.monitor.runs.signals import ended_by_signals
from phasewatch.places import options_for
from phasewatch.probe_file import load_probe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from phasewatch.monitor.runs.sink import Sink
    from phasewatch.monitor.trajectories.trajectory import Trajectory

SERIES = "A run's folder, any folder or archive of checkpoints, or hf://ORG/NAME."
Revisions = Annotated[
    str | None, typer.Option(help="A pattern of the branches, files or folders to use, such as 'stage1-*'.")
]
Key = Annotated[str | None, typer.Option(help="Which state dict of a checkpoint to read, such as ema.")]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Tells when a model in training reorganised itself, and how.",
)


def main() -> None:
    """Run the command line; what can't be done is one sentence and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an arrow that the terminal can't show is no reason to stop
    with warnings.catch_warnings():
        warnings.showwarning = _say
        try:
            with ended_by_signals():
                app()
        except PhasewatchError as error:
            print(f"phasewatch: {error}", file=sys.stderr)
            sys.exit(2)
        except ModuleNotFoundError as error:
            said = missing_package(error, "This command")
            if said is error:
                raise
            print(f"phasewatch: {said}", file=sys.stderr)
            sys.exit(2)
        except OSError as error:
            file = error.filename2 or error.filename  # the second is a rename's target, what the user named
            _tell(f"phasewatch: {f'{file}: ' if file else ''}{error.strerror or error}.")
            sys.exit(2)


@app.command()
def demo(
    run: Annotated[Path, typer.Option(help="Folder of the run; a number is added if it exists.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the model, its data and the probe.")] = 0,
    steps: Annotated[int, typer.Option(min=100, help="Training steps.")] = 7000,
    wandb: Annotated[bool, typer.Option(help="Also write an offline W&B run.")] = True,
) -> None:
    """Train a small transformer on in-context linear regression and watch its transitions."""
    from phasewatch.demo import run_demo

    run = _free(run)
    print(f"Training {steps} steps on this machine's CPU, and measuring beside it. Points and snapshots go to {run}/.")
    run_demo(run, seed=seed, steps=steps, wandb=wandb)
    print(f"\nThe report, with the picture: {run}/report.html")
    print(f"The points and snapshots:     {run}/points.jsonl, {run}/snapshots/")
    if wandb:
        folder = Path(os.environ.get("WANDB_DIR", ".")) / "wandb"
        print(f"W&B, offline:                 {folder}/ (`wandb sync` sends it, `wandb leet` opens it here)")


@app.command()
def calibrate(
    series: Annotated[str, typer.Argument(help=SERIES)],
    probe: Annotated[str, typer.Option(metavar="FILE.py:NAME", help="A Probe, or a function that returns one.")],
    steps: Annotated[
        list[int] | None,
        typer.Option("--step", help="Calibrate at this step; once for each. The first, middle and last if not given."),
    ] = None,
    budget: Annotated[int, typer.Option(min=1, help="Gradient evaluations, of a chain and step each.")] = 20_000,
    error: Annotated[float, typer.Option(help="Standard error to aim for, as a share of the last estimate.")] = 0.03,
    plot: Annotated[Path | None, typer.Option(help="Save the picture: .png, .svg or .pdf.")] = None,
    revisions: Revisions = None,
    key: Key = None,
) -> None:
    """Choose the sampler's settings for a series of checkpoints, and say why."""
    from phasewatch.monitor.probing.automatic import early_middle_late
    from phasewatch.monitor.probing.calibrate import calibrate as calibrate_series
    from phasewatch.monitor.probing.calibration import Calibration
    from phasewatch.monitor.snapshots.series import open_series

    opened = open_series(series, revisions=revisions, key=key)
    loaded = load_probe(probe)
    chosen = steps or early_middle_late(opened.steps)

    def show(calibration: Calibration) -> None:
        print(calibration)
        if plot:
            _import_matplotlib()
            from phasewatch.callbacks.figures.calibration import draw_calibration

            _save(draw_calibration(calibration), plot)

    _tell(f"Trying settings at steps {', '.join(map(str, chosen))} of {series}.")
    calibrate_series([opened.load(step) for step in chosen], loaded, budget=budget, error=error, show=show)


@app.command()
def replay(
    series: Annotated[str, typer.Argument(help=SERIES)],
    probe: Annotated[
        str | None,
        typer.Option(metavar="FILE.py:NAME", help="A Probe, or a function that returns one; --wandb goes without."),
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Where the points are kept; SERIES-replay, beside the series, if not given.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that measure at the same time.")] = 1,
    on: Annotated[
        str | None,
        typer.Option(help="Where they run: local, slurm, ray://HOST:PORT, or external: see phasewatch work."),
    ] = None,
    slurm: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE,...", help="Options of sbatch, such as partition=gpu.")
    ] = None,
    ray: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE,...", help="Options of Ray's actors, such as num_gpus=1.")
    ] = None,
    status: Annotated[bool, typer.Option("--status", help="SERIES is a run: say how far its replay has come.")] = False,
    sampler: Annotated[
        Literal["calibrate"] | None, typer.Option(help="Find the setting on the first, the middle and the last first.")
    ] = None,
    wandb: Annotated[
        bool, typer.Option(help="Also write a W&B run; without a probe, of what a run's folder holds already.")
    ] = False,
    revisions: Revisions = None,
    key: Key = None,
    keep: Annotated[bool, typer.Option(help="Keep what is fetched from a hub in its cache.")] = False,
    budget: Annotated[
        int | None, typer.Option(min=2, help="Checkpoints to measure at most, chosen by where transitions show.")
    ] = None,
    within: Annotated[
        float | None, typer.Option(help="Measure until boundaries are known within this factor, such as 1.2.")
    ] = None,
) -> None:
    """Measure a saved series of checkpoints; what is measured already is not measured again."""
    if status:
        from phasewatch.monitor.runs.status import status as status_of

        print(status_of(series))
        return
    _import_matplotlib()
    if probe is None:
        if not wandb:
            raise PhasewatchError("phasewatch replay SERIES needs --probe FILE.py:NAME, which says how to measure.")
        from phasewatch.callbacks.sinks.wandb import send_run

        if not send_run(Path(series)):
            raise typer.Exit(2)
        print(f"The points of {printable(series)} are in W&B.")
        return
    from phasewatch.monitor.runs.replay import replay as replay_series
    from phasewatch.monitor.snapshots.series import open_series
    from phasewatch.monitor.trajectories.trajectory import Trajectory

    options = options_for(on, {"slurm": slurm, "ray": ray})
    opened = open_series(series, revisions=revisions, key=key, keep=keep)
    loaded = load_probe(probe)
    run = run or _default_run(series)
    sinks: list[Sink] = []
    if wandb:
        from phasewatch.callbacks.sinks.wandb import WandbSink
        from phasewatch.callbacks.sinks.wandb_run import refuse_foreign_settings

        refuse_foreign_settings()
        sinks.append(WandbSink(own_run=True, name=run.name))
    if opened.left_out:
        _tell(f"Left out, since they carry no step or are copies: {', '.join(map(printable, opened.left_out))}")
    _tell(f"{len(opened)} checkpoints of {series}, measured into {run}/")
    failures: list[str] = []
    file = run / "points.jsonl"
    points = replay_series(
        opened,
        loaded,
        run=run,
        workers=workers,
        on=on,
        options=options,
        sampler=sampler,
        sinks=sinks,
        progress=sys.stderr.isatty(),
        on_error=failures.append,
        budget=budget,
        within=within,
    )
    try:
        for _ in points:
            pass
    except KeyboardInterrupt:
        points.close()
        kept = len(Trajectory.read(file)) if file.exists() else 0
        print(file=sys.stderr)
        _tell(
            f"phasewatch: stopped. {kept} of {len(opened)} checkpoints are measured and kept in {file}; "
            "the same command goes on from there."
        )
        raise typer.Exit(130) from None
    finally:
        for failure in failures:
            _tell(f"phasewatch: {failure}")
    _show(Trajectory.read(file))
    from phasewatch.callbacks.sinks.report import write_report

    print(f"The report: {printable(write_report(run))}")
    if failures:
        raise typer.Exit(2)


@app.command()
def work(
    run: Annotated[
        Path, typer.Argument(help="The run's folder, in which `phasewatch replay --on ...` shares its work.")
    ],
    series: Annotated[
        str | None, typer.Argument(help="The series of that replay; the run's own snapshots if not given.")
    ] = None,
    probe: Annotated[
        str | None,
        typer.Option(metavar="FILE.py:NAME", help="The probe of that replay; it is never read from the run."),
    ] = None,
    revisions: Revisions = None,
    key: Key = None,
    keep: Annotated[bool, typer.Option(help="Keep what is fetched from a hub in its cache.")] = False,
) -> None:
    """Measure what a replay shares out, on any machine that sees the run's folder, until nothing is left."""
    from phasewatch.monitor.runs.calibration import calibrated_before
    from phasewatch.monitor.runs.work import work as work_on
    from phasewatch.monitor.snapshots.series import open_series

    if probe is None:
        raise PhasewatchError(
            f"phasewatch work {run} needs --probe FILE.py:NAME, the one of the replay: code is never taken from a run."
        )
    loaded, _ = calibrated_before(run, load_probe(probe))
    opened = open_series(series or str(run), revisions=revisions, key=key, keep=keep)
    count = work_on(run, lambda: (loaded, opened))
    print(f"{count} checkpoints measured here; the replay collects them in {printable(run)}/points.jsonl.")


@app.command()
def transitions(
    file: Annotated[
        str,
        typer.Argument(
            help="A run's folder, a csv or jsonl, trainer_state.json, TensorBoard's event files, a .wandb file, or "
            "wandb://ENTITY/PROJECT/RUN."
        ),
    ],
    signal: Annotated[str, typer.Option(help="Whose transitions: llc, loss, or any other column or metric.")] = "llc",
    step: Annotated[
        str | None, typer.Option(help="The column of the training step; found by its name if left out.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Save the picture: .png, .svg or .pdf.")] = None,
    width: Annotated[float, typer.Option(min=2, max=40, help="Of the picture, in inches; 3.4 is a column.")] = 3.4,
    as_json: Annotated[bool, typer.Option("--json", help="Print the transitions as JSON.")] = False,
) -> None:
    """Find the transitions of a trajectory."""
    from phasewatch.monitor.trajectories.coincide import coincide
    from phasewatch.monitor.trajectories.trajectory import Trajectory
    from phasewatch.monitor.trajectories.transitions import FEWEST, find_transitions

    trajectory = Trajectory.read(file, signal=signal, step=step)
    usable = len(trajectory.usable(signal))
    if usable < FEWEST:
        needed = "λ̂ and loss" if signal == "llc" else signal
        there = f"a finite {needed} at {usable} of {len(trajectory)} points" if len(trajectory) else "no points"
        raise PhasewatchError(f"{file} has {there}, and transitions take at least {FEWEST}; measure more.")
    found = find_transitions(trajectory, signal=signal)
    if plot:
        _import_matplotlib()
        from phasewatch.callbacks.figures.trajectory import draw_trajectory

        _save(draw_trajectory(trajectory, found, signal=signal, width=width), plot)
    if as_json:
        print(json.dumps([transition.as_json() for transition in found], indent=1, allow_nan=False))
        return
    from phasewatch.callbacks.sinks.terminal import print_transitions

    of_llc = [] if signal == "llc" else find_transitions(trajectory)
    remarks = str(coincide(of_llc, found)) if of_llc and found else ""
    print_transitions(trajectory, found, signal=signal, remarks=remarks)


@app.command()
def emergence(
    path: Annotated[
        Path, typer.Argument(help="Samples of lm_eval, a run's folder, or a csv or jsonl with the column step.")
    ],
    task: Annotated[str | None, typer.Option(help="Which of the samples' tasks.")] = None,
    sharp: Annotated[str | None, typer.Option(help="The sharp score, such as an accuracy.")] = None,
    smooth: Annotated[str | None, typer.Option(help="The smooth score of the same items, best a log p.")] = None,
    chance: Annotated[float | None, typer.Option(help="The sharp score of a guess.")] = None,
    at: Annotated[list[float] | None, typer.Option(help="Forecast this step; may be given again.")] = None,
    step: Annotated[
        str | None, typer.Option(help="A table's column of the steps or tokens; step if not given.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Save the picture: .png, .svg or .pdf.")] = None,
) -> None:
    """Say whether a jump is the metric's or the model's, and forecast it."""
    from phasewatch.monitor.emergence.overview import overview

    found = overview(path, task=task, sharp=sharp, smooth=smooth, chance=chance, at=at or (), step=step)
    if plot:
        _import_matplotlib()
        from phasewatch.callbacks.figures.emergence import draw_emergence

        _save(draw_emergence(found), plot)
    print(found)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    out: Annotated[Path | None, typer.Option(help="Where to write it; RUN/report.html if not given.")] = None,
) -> None:
    """Write a run's report: one HTML file that opens anywhere."""
    _import_matplotlib()
    from phasewatch.callbacks.sinks.report import report_and_points
    from phasewatch.callbacks.sinks.terminal import print_transitions
    from phasewatch.monitor.trajectories.tables import without_collector

    with without_collector():
        written, trajectory, found = report_and_points(run, out)
        if trajectory is not None:
            print_transitions(trajectory, found)
    print(f"The report: {printable(written)}")


def _show(trajectory: "Trajectory") -> None:
    from phasewatch.callbacks.sinks.terminal import print_transitions
    from phasewatch.monitor.trajectories.transitions import find_transitions

    print_transitions(trajectory, find_transitions(trajectory))


def _save(figure: "Figure", plot: Path) -> None:
    formats = figure.canvas.get_supported_filetypes()
    if plot.suffix[1:].lower() not in formats:
        raise PhasewatchError(f"--plot {plot} can't be written: its name has to end in .png, .svg or .pdf.")
    try:
        with replacing(plot) as unfinished:
            figure.savefig(unfinished, dpi=300, format=plot.suffix[1:].lower())
    except (OSError, ValueError) as error:
        raise PhasewatchError(f"--plot {plot} can't be written ({error}).") from error


def _default_run(series: str) -> Path:
    """Beside the series, so that two of one name never share a run; here if the series lies elsewhere."""
    path = Path(series.partition("://")[2].replace("/", "--") if "://" in series else series)
    path = path.resolve() if path.name in {"", ".."} else path
    return path.with_name(f"{path.name}-replay")


def _say(message: Warning | str, category: type[Warning], *where: Any) -> None:
    """Show a warning of our own as a sentence, and anybody else's as Python does."""
    if issubclass(category, PhasewatchWarning):
        _tell(f"phasewatch: {message}")
    else:
        for line in warnings.formatwarning(message, category, *where[:2]).splitlines():
            _tell(line)


def _tell(line: str) -> None:
    """Print one line beside the results, whatever is quoted in it."""
    print(printable(line, MOST_CHARACTERS), file=sys.stderr)


def _import_matplotlib() -> None:
    """Import it from another folder: it reads the `matplotlibrc` of the current one, which may be somebody else's."""
    with chdir(Path(__file__).parent), suppress(ModuleNotFoundError):  # what draws names the extra
        importlib.import_module("matplotlib")


def _free(run: Path) -> Path:
    number = 2
    free = run
    while free.exists():
        free = run.with_name(f"{run.name}-{number}")
        number += 1
    return free


if __name__ == "__main__":
    main()
