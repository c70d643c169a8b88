"""Claim: workers spend at least 0.9 of their time measuring, two on this machine and 256 on a slow file system.

Here: the snapshots of a small transformer are measured by one process and by two workers, with all that starting them
takes. The efficiency is what one process takes over twice what two take; where other programs keep the processors busy,
the same by CPU seconds tells more, those of one process over those of the replay and its workers.

Simulated: each worker is a thread that runs the worker's own code on real files, in a folder where every call of the
system that reaches the server of a network file system takes 5 ms. Measuring is waiting, for as long as points took
before; the points are real ones. One replay shares out the steps, and records the points in a run's folder. The
efficiency is the time of all measuring over workers times wall time. Whole points leave some workers without work at
the end: beside it stands the same against the best known order of these points.

    python experiments/fan_out.py            # about 15 minutes
    python experiments/fan_out.py --quick    # a minute
"""

import itertools
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from command_line import command_line
from torch import nn
from torch.nn import functional as F

import phasewatch as pw
from phasewatch.monitor.runs.board import Board, digest
from phasewatch.monitor.runs.executor import InProcess, Order, Result, in_batches
from phasewatch.monitor.runs.fan_out import FanOut
from phasewatch.monitor.runs.folder import RunFolder
from phasewatch.monitor.runs.members import Member
from phasewatch.monitor.runs.record import Recorder
from phasewatch.monitor.runs.work import _measure
from phasewatch.monitor.trajectories.points import Point

CALL_SECONDS = 0.005
"""What a call to the file system takes. Attributes of folders are cached by every client, and cost nothing."""

POINT_SECONDS = [8.0, 10.0, 11.0, 12.0, 14.0, 20.0]
"""Assumed, not recorded: what a point of the regression transformer may take on a core, 4 chains of 1 500 steps."""


class Model(nn.Module):
    """A transformer's block on short sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 64)
        self.block = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.out = nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, shape (batch, position, 32)."""
        return self.out(self.block(self.embed(x)))


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the next token."""
    return F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())


def cpu_seconds() -> float:
    """What this process and those that it has waited for have used."""
    return sum(os.times()[:4])


def here(points: int, draws: int) -> None:
    """One process against two workers of this machine."""
    with tempfile.TemporaryDirectory() as name:
        series = pw.SnapshotFolder(Path(name) / "checkpoints")
        for step in range(1, points + 1):
            torch.manual_seed(step)
            series.save(pw.Snapshot.of(Model(), step))
        data = torch.randint(32, (512, 17), generator=torch.Generator().manual_seed(0))
        sampler = pw.SGLD(step_size=1e-5, chains=4, draws=draws, burn_in=draws // 4, batch_size=32)
        probe = pw.Probe(Model, loss, data, sampler=sampler, threads=1)
        next(pw.replay(series, probe))  # what only the first point takes
        seconds, cpu, found = {}, {}, {}
        for workers in (1, 2):
            began, used = time.perf_counter(), cpu_seconds()
            found[workers] = {point.step: point for point in pw.replay(series, probe, workers=workers)}
            seconds[workers], cpu[workers] = time.perf_counter() - began, cpu_seconds() - used
        assert found[1] == found[2]
        print(
            f"| this machine, {points} points of {seconds[1] / points:.1f} s | 2 | {seconds[1] / 2 / seconds[2]:.2f} | "
            f"| {cpu[1] / cpu[2]:.2f} by CPU seconds; bit for bit those of one process |",
            flush=True,
        )


# Simulated


@contextmanager
def slow_disk(folder: Path) -> Iterator[dict[str, int]]:
    """Every call that reaches the server of a file in a folder takes its time; counted by name."""
    counts: dict[str, int] = {}
    names = {}

    def slow(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def slowly(path: Any, *arguments: Any, **more: Any) -> Any:
            reaches = isinstance(path, int) and path in names
            if isinstance(path, str | os.PathLike):
                text = os.fspath(path)
                is_file = "." in os.path.basename(text) or text.rsplit("/", 2)[-2:-1] == ["claims"]
                reaches = (text.startswith(str(folder)) and is_file) or (name == "listdir" and "work" in text)
            if reaches:
                counts[name] = counts.get(name, 0) + 1
                time.sleep(CALL_SECONDS)
            found = call(path, *arguments, **more)
            if name == "open" and reaches:
                names[found] = None
            return found

        return slowly

    with ExitStack() as patches:
        for name in ("open", "lstat", "stat", "listdir", "write", "fsync"):
            patches.enter_context(mock.patch.object(os, name, slow(name, getattr(os, name))))
        yield counts


class Waiting:
    """Measures by waiting, and answers with real points."""

    def __init__(self, point: Point, seconds: dict[int, float]) -> None:
        self._point, self._seconds = point, seconds

    def measure(self, steps: list[int], then: list[int]) -> Iterator[Result]:
        """Wait for each."""
        for step in steps:
            time.sleep(self._seconds[step])
            yield step, replace(self._point, step=step)


SETTINGS = {"seed": 0}


class Settings:
    """What is asked of a probe by those that don't measure."""

    settings = SETTINGS


def simulated(workers: int, points: int, times: list[float], point: Point) -> None:
    """Workers on a slow file system."""
    choose = random.Random(workers)
    seconds = {step: choose.choice(times) for step in range(1, points + 1)}
    order = Order(cast("pw.Probe", Settings), cast("pw.SnapshotFolder", None), None, "threads", workers, {})
    with tempfile.TemporaryDirectory() as name, slow_disk(Path(name)) as calls:
        run = Path(name) / "run"
        folder = RunFolder(run, SETTINGS)
        threads: list[threading.Thread] = []
        ended: list[float] = []

        def work() -> None:
            board = Board(run)
            board.refresh()
            member = Member(board.members, {"settings": digest(SETTINGS)})
            _measure(board, member, cast("InProcess", Waiting(point, seconds)), 1)
            ended.append(time.perf_counter())
            member.leave()

        class Threads:
            where = ""

            def start(self, count: int) -> None:
                for _ in range(count):
                    threads.append(threading.Thread(target=work))
                    threads[-1].start()

            def count(self) -> int:
                return sum(thread.is_alive() for thread in threads)

            def stop(self) -> None:
                for thread in threads:
                    thread.join()

        executor = FanOut(replace(order, run=run), Threads())
        recorder = Recorder((), folder)
        began = time.perf_counter()
        recorded: list[float] = []
        for batch in in_batches(executor, list(seconds)):
            recorder.record(*[result for _, result in batch if isinstance(result, Point)])
            recorded += [time.perf_counter()] * len(batch)
        wall = time.perf_counter() - began
        executor.close()
        folder.close()
        lines = (run / "points.jsonl").read_bytes().count(b"\n")
        assert lines == points == len(recorded)
        # At the end some workers have nothing left to do: as in any way of sharing whole points out.
        ideal = ideal_wall(list(seconds.values()), workers)
        print(
            f"| simulated, {points} points of {sum(times) / len(times):.1f} s, {CALL_SECONDS * 1000:.0f} ms a call "
            f"| {workers} | {sum(seconds.values()) / workers / wall:.2f} | {ideal / wall:.2f} "
            f"| {sum(calls.values()) / points:.0f} calls a point; all recorded {recorded[-1] - max(ended):.1f} s after "
            "the last worker |",
            flush=True,
        )


def ideal_wall(seconds: list[float], workers: int) -> float:
    """What the best known order takes that needs no time to share out: the longest first, each to whoever is free."""
    free = [0.0] * workers
    for one in sorted(seconds, reverse=True):
        first = min(range(workers), key=free.__getitem__)
        free[first] += one
    return max(free)


def main() -> None:
    """Print the table."""
    quick = command_line(__doc__, quick="8 workers, short points").parse_args().quick
    torch.set_num_threads(1)
    torch.manual_seed(0)
    series = pw.Trajectory.read(sorted((Path(__file__).parent / "results/points/regression_stages").glob("*.jsonl"))[0])
    point = next(iter(series))
    print("| where | workers | efficiency | of what whole points allow | |")
    print("| --- | --- | --- | --- | --- |")
    if quick:
        simulated(8, 64, [0.5, 1.0], point)
        here(6, 50)
        return
    for workers, times in itertools.product((16, 64, 256), (POINT_SECONDS,)):
        simulated(workers, 16 * workers, times, point)
    here(40, 2000)


if __name__ == "__main__":
    main()
