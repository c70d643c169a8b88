"""Trains for an hour while everything around the monitor fails, and checks that training never notices.

Each round trains a small model twice, alone and watched, with sinks that raise and hang, a disk that fills and gets
room again, a slow one, a folder that is deleted, a clock that jumps, and measuring processes that are killed. The
weights must agree bit for bit, every run must go on where it ended, and after the first rounds no memory, process,
file or thread may be left over; what is, is named.

    python experiments/soak.py --minutes 60
"""

import contextlib
import ctypes
import gc
import json
import os
import random
import shutil
import signal
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from command_line import command_line
from torch import Tensor, nn
from torch.nn import functional as F

import phasewatch as pw
from phasewatch.callbacks.sinks.wandb_rows import find_and_draw
from phasewatch.monitor.runs import folder as run_folder
from phasewatch.monitor.snapshots.folder import SnapshotFolder

STEPS = 60
"""Of each round."""

WARM_UP = 4
"""Rounds before what is open is counted: each kind of trouble has come by then."""

MOST_GROWTH = 64 * 2**20
"""Bytes that an hour may add: what Python and its allocator keep, and nothing for each round."""


def make_model() -> nn.Module:
    """A model of 33 parameters."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean squared error."""
    x, y = batch
    return F.mse_loss(model(x), y)


def make_probe(data: tuple[Tensor, Tensor]) -> pw.Probe:
    """Two short chains."""
    sampler = pw.SGLD(step_size=1e-3, localization=10.0, nbeta=20.0, chains=2, draws=4, burn_in=1, batch_size=16)
    return pw.Probe(make_model, loss, data, sampler=sampler, threads=1)


class Failing:
    """A sink that raises on every second item."""

    def __init__(self) -> None:
        self._count = 0

    def write(self, item: Any) -> None:
        """Raise, or don't."""
        self._count += 1
        if self._count % 2:
            raise ConnectionResetError("no server")

    def close(self) -> None:
        """Raise."""
        raise TimeoutError("no answer")


class Hanging:
    """A sink that hangs until the round is over."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.close_seconds = 0.5

    def write(self, item: Any) -> None:
        """Hang."""
        self.over.wait()

    def close(self) -> None:
        """Hang."""
        self.over.wait()


class Drawing:
    """A sink that draws in its thread, as those of W&B and of notebooks do."""

    def attach(self, trajectory: Callable[[], pw.Trajectory]) -> None:
        """Take what returns the points."""
        self._trajectory = trajectory

    def write(self, item: Any) -> None:
        """Wait for the end."""

    def close(self) -> None:
        """Draw."""
        find_and_draw(self._trajectory())


class Trouble:
    """What goes wrong around a monitor, by chance."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._full = False
        self._slow = 0.0
        self._jump = 0.0
        self.counts: dict[str, int] = {}

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """Put a disk and a clock in the place of the real ones."""
        save, append, clock = SnapshotFolder.save, run_folder.open_append, time.time

        trouble = self

        def saving(self: SnapshotFolder, snapshot: pw.Snapshot) -> None:
            time.sleep(trouble._slow)
            if trouble._full:
                raise OSError(28, "No space left on device")
            save(self, snapshot)

        def appending(path: str | Path) -> Any:
            time.sleep(trouble._slow)
            return open("/dev/full", "ab") if trouble._full else append(path)

        SnapshotFolder.save, run_folder.open_append, time.time = saving, appending, lambda: clock() + trouble._jump
        try:
            yield
        finally:
            SnapshotFolder.save, run_folder.open_append, time.time = save, append, clock

    def happen(self, monitor: pw.PhaseMonitor) -> None:
        """Something of it, or nothing."""
        kinds = ["full", "room", "slow", "fast", "jump", "kill", "delete"]
        kind = self._chance.choice(kinds) if self._chance.random() < 0.2 else "nothing"
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if kind in ("full", "room"):
            self._full = kind == "full"
        elif kind in ("slow", "fast"):
            self._slow = 0.05 if kind == "slow" else 0.0
        elif kind == "jump":
            self._jump = self._chance.uniform(-1e6, 1e6)
        elif kind == "kill":
            for child in children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
        elif kind == "delete":
            shutil.rmtree(monitor.run, ignore_errors=True)

    def end(self) -> None:
        """The disk has room and is fast."""
        self._full, self._slow = False, 0.0


def children() -> list[int]:
    """The processes that this one started and that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            if int(fields[1]) == os.getpid() and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def held() -> dict[str, Counter[str]]:
    """What this process holds, by name: files, threads and processes."""
    gc.collect()
    files, processes = Counter[str](), Counter[str]()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists them is closed by now
            files[os.readlink(f"/proc/self/fd/{descriptor}").partition(":[")[0]] += 1
    for child in children():
        with contextlib.suppress(OSError):
            processes[Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")[:200]] += 1
    threads = Counter(Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").iterdir())
    return {"files": files, "threads": threads, "processes": processes}


def resident() -> int:
    """Bytes of memory that this process holds, without those that its allocator keeps for later."""
    with contextlib.suppress(AttributeError, OSError):  # not every C library can
        ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def train(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    monitor: pw.PhaseMonitor | None = None,
    trouble: Trouble | None = None,
) -> list[Tensor]:
    """Train, and return the weights."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        loss(model, data).backward()
        optimizer.step()
        if monitor and trouble:
            trouble.happen(monitor)
            monitor(step)
    return [parameter.detach().clone() for parameter in model.parameters()]


def play(seed: int, data: tuple[Tensor, Tensor], folder: Path) -> dict[str, int]:
    """One round: train alone, watched and in trouble, and once more where the run ended."""
    chance = random.Random(seed)
    measure = "background" if seed % 2 else "inline"
    alone = train(make_model(), data)
    trouble, hanging = Trouble(chance), Hanging()
    with trouble.around():
        for sinks in ([Failing(), hanging, Drawing()], []):
            model = make_model()
            monitor = pw.PhaseMonitor(model, make_probe(data), run=folder, at=pw.every(5), sinks=sinks, measure=measure)
            watched = train(model, data, monitor, trouble)
            trouble.end()
            monitor.close()
            assert all(map(torch.equal, alone, watched)), f"round {seed}: training was changed"
    hanging.over.set()
    # There is none where the folder was deleted before a point was measured, and another where training began anew.
    for points in folder.parent.glob("*/points.jsonl"):
        steps = [json.loads(line)["step"] for line in points.read_text().splitlines()]
        assert len(steps) == len(set(steps)), f"round {seed}: a point twice"
    return trouble.counts


def main() -> None:
    """Play rounds until the time is over."""
    parser = command_line(__doc__, quick="half a minute")
    parser.add_argument("--minutes", type=float, default=60.0, help="how long")
    arguments = parser.parse_args()
    seconds = 30.0 if arguments.quick else 60 * arguments.minutes
    warnings.simplefilter("ignore", pw.PhasewatchWarning)
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(64, 4, generator=generator), torch.randn(64, 1, generator=generator)
    began, rounds, first, first_bytes = time.monotonic(), 0, held(), resident()
    counts = Counter[str]()
    while time.monotonic() - began < seconds or rounds <= WARM_UP:
        with tempfile.TemporaryDirectory() as parent:
            counts.update(play(rounds, data, Path(parent, "run")))
        rounds += 1
        time.sleep(0.2)
        if rounds == WARM_UP:
            first, first_bytes = held(), resident()
        if rounds % 20 == 0:
            print(f"{rounds} rounds are bit-identical; {resident() // 2**20} MiB", flush=True)
    last, last_bytes = held(), resident()
    print(f"{rounds} rounds of {4 * STEPS} steps in {time.monotonic() - began:.0f} s, all bit-identical")
    print("trouble:", ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items()) if kind != "nothing"))
    for kind in first:
        print(f"{kind} held after {WARM_UP} rounds: {first[kind].total()}, at the end: {last[kind].total()}")
    print(f"MiB held after {WARM_UP} rounds: {first_bytes // 2**20}, at the end: {last_bytes // 2**20}")
    assert last_bytes - first_bytes < MOST_GROWTH, "memory leaks"
    for kind in first:
        assert last[kind].total() <= first[kind].total(), f"{kind} leak: {dict(last[kind] - first[kind])}"


if __name__ == "__main__":
    main()
