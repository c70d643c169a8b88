"""Claim: whatever is killed, at whatever moment, the same command again leaves the points of an undisturbed run.

A replay of small snapshots runs with two workers, as processes of this machine, by `phasewatch work`, on a SLURM of
one node, or on a Ray of one machine, while random workers are killed with SIGKILL at random moments, and the replay
itself in every tenth kill. A replay that was killed is started again by the same command. When a run is complete it is
compared with an undisturbed one, and the next run begins. Processes of this machine answer through pipes, so that
nobody can tell how often they have measured a snapshot. experiments/results/kill_workers.md has the table.

    python experiments/kill_workers.py                       # 100 kills at each place, 8 to 25 minutes each
    python experiments/kill_workers.py --place slurm --kills 20

SLURM needs its programs (`.ci/slurm`), Ray `pip install 'phasewatch[ray]'`; a place that isn't there is left out.
"""

import contextlib
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from command_line import command_line

import phasewatch as pw

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
processes, ray_of, slurm_of = map(importlib.import_module, ("processes", "ray_head", "slurm_node"))

SNAPSHOTS = 100
SECONDS = 8.0
"""The longest time between two kills. A worker needs about four to start."""

PROBE = """
import time
import torch
import phasewatch as pw

def loss(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()

def nap(model, batch):
    time.sleep(0.3)
    return 1.0

x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
sampler = pw.SGLD(step_size=1e-3, nbeta=20.0, localization=10.0, chains=2, draws=8, burn_in=2, batch_size=16)
probe = pw.Probe(
    lambda: torch.nn.Linear(3, 1), loss, (x, x.sum(1, keepdim=True)), sampler=sampler, metrics={"nap": nap}, threads=1
)
"""


@dataclass
class Counts:
    """What happened at one place."""

    kills: int = 0
    replays_killed: int = 0
    runs: int = 0
    twice: int = 0
    lost: int = 0
    repeated: int = 0
    different: int = 0
    moments: Counter[int] = field(default_factory=Counter)


def snapshots(folder: Path) -> Path:
    """A series on disk."""
    made = pw.SnapshotFolder(folder / "checkpoints")
    for step in range(1, SNAPSHOTS + 1):
        torch.manual_seed(step)
        made.save(pw.Snapshot.of(torch.nn.Linear(3, 1), step))
    return made.path


def points(run: Path) -> list[tuple[int, str]]:
    """The whole lines of points.jsonl."""
    file = run / "points.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [(json.loads(line)["step"], line) for line in lines]


def workers_of(run: Path, replay: subprocess.Popen[bytes] | None) -> list[int]:
    """The processes that measure: those of the members' files, or the children of the replay."""
    found = []
    if replay and not (run / "work").exists():
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError, IndexError):
                stat = (folder / "stat").read_text().rsplit(")", 1)[1].split()
                if int(stat[1]) == replay.pid and "runs.worker" in (folder / "cmdline").read_text():
                    found.append(int(folder.name))
    for file in (run / "work" / "members").glob("*.jsonl"):
        pid = int(file.stem.split("-")[-2])
        if processes.alive(pid) and (replay is None or pid != replay.pid) and '"left"' not in file.read_text():
            found.append(pid)
    return found


def measured(run: Path) -> Counter[int]:
    """How many results of each step any worker has written."""
    found: Counter[int] = Counter()
    for file in (run / "work" / "members").glob("*.jsonl"):
        for line in file.read_text().split("\n")[:-1]:
            record = json.loads(line)
            if "point" in record:
                found[record["point"]["step"]] += 1
    return found


@contextlib.contextmanager
def cluster(place: str, folder: Path) -> Iterator[tuple[dict[str, str], list[str]]]:
    """The environment of a replay at a place, and its options."""
    if place == "slurm":
        with slurm_of.slurm(folder / "slurm") as env:
            yield {**env, "OMP_NUM_THREADS": "1"}, ["--on", "slurm"]
    elif place == "ray":
        with ray_of.ray_head(folder / "ray") as (env, address):
            yield env, ["--on", address]
    else:
        yield processes.environment(), ["--on", "external" if place == "plain" else "local"]


class Fleet:
    """Keeps two `phasewatch work` running, as any scheduler would."""

    def __init__(self, run: Path, series: Path, env: dict[str, str], folder: Path) -> None:
        self.command = [
            sys.executable,
            "-m",
            "phasewatch.cli",
            "work",
            str(run),
            str(series),
            "--probe",
            "probe.py:probe",
        ]
        self.env, self.folder = env, folder
        self.workers: list[subprocess.Popen[bytes]] = []

    def tend(self, is_over: bool) -> None:
        """Replace those that ended."""
        self.workers = [worker for worker in self.workers if worker.poll() is None]
        while not is_over and len(self.workers) < 2:
            with open(self.folder / "workers.out", "ab") as out:
                self.workers.append(
                    subprocess.Popen(self.command, env=self.env, cwd=self.folder, stdout=out, stderr=out)
                )

    def end(self) -> None:
        """Wait for them."""
        for worker in self.workers:
            worker.wait(90)


def one_run(place: str, run: Path, series: Path, env: dict[str, str], on: list[str], most: int, counts: Counts) -> None:
    """Replay until all is measured, killing on the way."""
    folder = series.parent
    choose = random.Random(counts.runs)
    command = [sys.executable, "-m", "phasewatch.cli", "replay", str(series), "--probe", "probe.py:probe"]
    command += ["--run", str(run), "--workers", "2", *on]
    fleet = Fleet(run, series, env, folder) if place == "plain" else None
    replay: subprocess.Popen[bytes] | None = None
    before: list[tuple[int, str]] = []
    while True:
        if replay is None:
            with open(folder / "replay.out", "ab") as out:
                replay = subprocess.Popen(command, env=env, cwd=folder, stdout=out, stderr=out)
        end = time.monotonic() + choose.uniform(0, SECONDS)
        while time.monotonic() < end and replay.poll() is None:
            if fleet and (run / "work" / "tasks.jsonl").exists():
                fleet.tend(False)
            time.sleep(0.05)
        now = points(run)
        assert now[: len(before)] == before, "a line of points.jsonl has changed"
        before = now
        if (status := replay.poll()) is not None:
            if status == 0:
                break
            counts.lost += 1
            replay = None
            said = (folder / "replay.out").read_text().splitlines()
            why = [line for line in said if "left out" in line] or said
            print(f"{place}, run {counts.runs} ended early: {why[-1]}", flush=True)
            continue
        if counts.kills >= most:
            continue
        if choose.random() < 0.1:
            replay.kill()
            replay.wait()
            replay = None
            counts.kills += 1
            counts.replays_killed += 1
        elif workers := workers_of(run, replay):
            with contextlib.suppress(ProcessLookupError):
                os.kill(choose.choice(workers), signal.SIGKILL)
                counts.kills += 1
        counts.moments[len(now)] += 1
    if fleet:
        fleet.end()


def kill_at(place: str, most: int) -> Counts:
    """Kill so many times at a place."""
    counts = Counts()
    with tempfile.TemporaryDirectory() as name, cluster(place, Path(name)) as (env, on):
        folder = Path(name)
        series = snapshots(folder)
        (folder / "probe.py").write_text(PROBE)
        command = [sys.executable, "-m", "phasewatch.cli", "replay", str(series), "--probe", "probe.py:probe"]
        subprocess.run([*command, "--run", "undisturbed"], env=env, cwd=folder, check=True, capture_output=True)
        undisturbed = dict(points(folder / "undisturbed"))
        while counts.kills < most:
            counts.runs += 1
            run = folder / f"run-{counts.runs}"
            kills = counts.kills
            one_run(place, run, series, env, on, most, counts)
            found = points(run)
            results = measured(run)
            counts.repeated += len(found) - len(dict(found))
            counts.different += sum(dict(found).get(step) != line for step, line in undisturbed.items())
            counts.twice += sum(results.values()) - len(results)
            print(
                f"{place}, run {counts.runs}: {counts.kills - kills} kills, {len(found)} points, "
                f"{sum(results.values()) - len(results)} measured twice, "
                f"{sum(dict(found).get(s) != x for s, x in undisturbed.items())} differ",
                flush=True,
            )
            if len(dict(found)) != SNAPSHOTS:
                print((folder / "replay.out").read_text()[-3000:])
    return counts


def main() -> None:
    """Kill at each place."""
    parser = command_line(__doc__, quick="12 kills at each place")
    parser.add_argument("--place", action="append", choices=["local", "plain", "slurm", "ray"])
    parser.add_argument("--kills", type=int, default=100)
    options = parser.parse_args()
    most = 12 if options.quick else options.kills
    reasons = {"slurm": slurm_of.missing(), "ray": ray_of.missing()}
    print("| place | kills | of the replay | runs | ended early | measured twice | repeated | lost or different |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for place in options.place or ["local", "plain", "slurm", "ray"]:
        if reason := reasons.get(place):
            print(f"| {place} | left out: it {reason} |")
            continue
        c = kill_at(place, most)
        moments = len(c.moments)
        print(
            f"| {place} | {c.kills}, at {moments} numbers of points | {c.replays_killed} | {c.runs} | {c.lost} "
            f"| {'not counted' if place == 'local' else c.twice} | {c.repeated} | {c.different} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
