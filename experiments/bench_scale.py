"""What size costs: long runs, long tables, long series, models of many tensors.

A point is to cost as much at 100,000 points as at 100. That is `Recorder.record` with a run's folder and a sink, the
search for transitions included, averaged over the points between several searches. All else is to take time in
proportion to the size: compare `ratio of costs` with `ratio of sizes`. All are CPU seconds. Costs about five minutes on
a core.

    python experiments/bench_scale.py [--quick]
"""

import json
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import torch
from command_line import command_line
from safetensors.torch import save
from torch import nn

import phasewatch as pw
from phasewatch.callbacks.sinks.report import write_report
from phasewatch.callbacks.trainers.backlog import Backlog
from phasewatch.monitor.runs.executor import InProcess
from phasewatch.monitor.runs.folder import RunFolder
from phasewatch.monitor.runs.plan import Plan
from phasewatch.monitor.runs.record import Recorder
from phasewatch.monitor.trajectories import transitions

CHAINS = 4


def points(count: int) -> list[pw.Point]:
    """Points of a run with a rise of λ̂, a fall, and noise."""
    rng = np.random.default_rng(0)
    x = np.linspace(0, 1, count)
    llc = 100 / (1 + np.exp(-30 * (x - 0.3))) - 40 / (1 + np.exp(-40 * (x - 0.7))) + rng.normal(size=count)
    loss = 3 - x + 0.01 * rng.normal(size=count)
    chains = llc[:, None] + rng.normal(size=(count, CHAINS))
    made = pw.Trajectory.from_values(np.arange(1, count + 1), loss=loss, llc=llc)
    return [
        replace(point, llc=replace(point.llc, per_chain=tuple(of_one)))
        for point, of_one in zip(made, chains.tolist(), strict=True)
    ]


class Silent:
    """A sink that takes everything."""

    def write(self, item: object) -> None:
        """Take it."""

    def close(self) -> None:
        """Nothing is held back."""


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds, with nothing remembered of earlier searches."""
    transitions._LOOKS.clear()  # pyright: ignore[reportPrivateUsage]
    began = time.process_time()
    work()
    return time.process_time() - began


def rows(title: str, sizes: Sequence[int], cost: Callable[[int], float], unit: str = "s") -> None:
    """Print what each size costs."""
    print(f"\n## {title}\n\n| size | {unit} | ratio of sizes | ratio of costs |\n|---|---|---|---|")
    before: tuple[int, float] | None = None
    for size in sizes:
        found = cost(size)
        ratios = f"{size / before[0]:.3g} | {found / before[1]:.3g}" if before else " | "
        print(f"| {size} | {found:.3g} | {ratios} |", flush=True)
        before = size, found


def a_point(size: int) -> float:
    """Milliseconds that one more point costs a run of so many, from one search for transitions to the next but four."""
    more = max(20, 5 * (size // 100))
    every = points(size + more)
    with tempfile.TemporaryDirectory() as at:
        Path(at, "points.jsonl").write_text("".join(json.dumps(p.as_json()) + "\n" for p in every[:size]))
        header = {"schema": 2, "settings": {}, "averaging": None}
        Path(at, "run.json").write_text(json.dumps(header))
        folder = RunFolder(at, {})
        recorder = Recorder([Silent()], folder)
        took = seconds(lambda: [recorder.record(point) for point in every[size:]])
        recorder.close()
        folder.close()
    return 1e3 * took / more


def a_wait(size: int) -> float:
    """Milliseconds to take a snapshot and choose the next, in a run where so many wait."""
    more, model = 100, nn.Linear(2, 1)
    with tempfile.TemporaryDirectory() as at:
        folder = Waiting(Path(at), size)
        executor = SimpleNamespace(measure=lambda steps: [(step, RuntimeError("not measured")) for step in steps])
        backlog = Backlog(
            cast(RunFolder, folder),
            Recorder(),
            cast(InProcess, executor),
            cast(pw.Probe, None),
            Plan(None, waits=False),
            keep_snapshots=True,
            waits=False,
        )
        new = [pw.Snapshot.of(model, size + step) for step in range(1, more + 1)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            took = seconds(lambda: [(backlog.take(snapshot), backlog.measure_next()) for snapshot in new])
    return 1e3 * took / more


class Waiting:
    """A run's folder in which so many snapshots wait to be measured.

    Args:
        path: where snapshots are saved.
        count: how many wait.
    """

    def __init__(self, path: Path, count: int) -> None:
        self.steps = set[int]()
        self.snapshots = SimpleNamespace(steps=range(1, count + 1))
        self._folder = pw.SnapshotFolder(path)

    def save(self, snapshot: pw.Snapshot) -> bool:
        """Write one."""
        self._folder.save(snapshot)
        return True


def a_table(size: int) -> float:
    """Reading a csv, and the first search."""
    with tempfile.TemporaryDirectory() as at:
        path = Path(at, "run.csv")
        pw.Trajectory(points(size)).write(path)
        return seconds(lambda: pw.find_transitions(pw.Trajectory.read(path)))


def a_log(size: int) -> float:
    """Reading so many scalars of an event file of TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as at:
        with SummaryWriter(at) as writer:
            for step in range(size):
                writer.add_scalar("train/loss", 2 + 1 / (step + 1), step)
        return seconds(lambda: pw.Trajectory.read(at, signal="train/loss"))


def a_search(size: int) -> float:
    """Milliseconds of the first search, the least of three curves: searches of a curve that was seen cost less."""
    curves = [pw.Trajectory(points(size)[first:]) for first in range(3)]
    return 1e3 * min(seconds(partial(pw.find_transitions, curve)) for curve in curves)


def a_report(size: int) -> float:
    """Reading a run's points, finding transitions, and writing the page, whose size is printed."""
    with tempfile.TemporaryDirectory() as at:
        pw.Trajectory(points(size)).write(Path(at, "points.jsonl"))
        took = seconds(lambda: write_report(at))
        print(f"<!-- {size} points: {Path(at, 'report.html').stat().st_size / 1e6:.2f} MB -->")
        return took


def a_series(size: int) -> float:
    """Listing so many files, and asking for the step and the source of each."""
    with tempfile.TemporaryDirectory() as at:
        content = save({"w": torch.zeros(1)})
        for step in range(size):
            Path(at, f"step{step}.safetensors").write_bytes(content)

        def ask() -> None:
            series = pw.open_series(at)
            for step in series.steps:
                series.source(step)

        return seconds(ask)


class ManyTensors(nn.Module):
    """A linear function with its weights in many tensors.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.full((2,), 1 / count) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all tensors times x."""
        return x @ torch.stack(list(self.weights)).sum(dim=0)


def square(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """The mean square of the outputs."""
    return model(batch).square().mean()


def a_probe(tensors: int) -> float:
    """Making a probe."""
    model = ManyTensors(tensors)
    return seconds(lambda: pw.Probe(model, square, torch.ones(256, 2)))


def main() -> None:
    """Print the tables."""
    quick = command_line(__doc__, quick="small sizes, to see that it runs").parse_args().quick
    sizes = (100, 300) if quick else (100, 1_000, 10_000, 100_000)
    rows("One more point of a run, its share of the searches included", sizes, a_point, "ms")
    rows("One more snapshot where so many wait", sizes, a_wait, "ms")
    rows("The first `find_transitions`", (100, 300) if quick else (200, 1_000, 10_000, 100_000), a_search, "ms")
    rows("`phasewatch transitions` on a csv", sizes, a_table)
    rows("An event file of TensorBoard", (100, 300) if quick else (2_000, 20_000, 200_000), a_log)
    rows("A report", (100, 300) if quick else (1_000, 10_000, 100_000, 200_000), a_report)
    rows(
        "A series: listed, each step's source asked for",
        (20, 40) if quick else (5_000, 10_000, 20_000, 40_000),
        a_series,
    )
    a_probe(2)  # what the first one costs alone
    rows("A probe of so many tensors", (10, 20) if quick else (1_250, 2_500, 5_000, 10_000), a_probe)


if __name__ == "__main__":
    main()
