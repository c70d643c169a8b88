"""A run so small that a test can have hundreds of it: a linear model in float32, two chains, four draws."""

import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from phasewatch.callbacks.trainers.loop import PhaseMonitor
from phasewatch.callbacks.trainers.schedule import every
from phasewatch.monitor.errors import PhasewatchWarning
from phasewatch.monitor.probing.probe import Probe
from phasewatch.monitor.runs import folder as run_folder
from phasewatch.monitor.sampling.settings import SGLD
from phasewatch.monitor.snapshots.snapshot import Snapshot
from phasewatch.monitor.trajectories.trajectory import Point


def make_model(seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(3, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def loss(model, batch):
    x, y = batch
    return F.mse_loss(model(x), y)


def make_data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 3, generator=generator)
    return x, x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.1 * torch.randn(64, 1, generator=generator)


def make_probe(model=make_model, **changes):
    sampler = SGLD(step_size=1e-3, localization=10.0, nbeta=20.0, chains=2, draws=4, burn_in=1, batch_size=16)
    of = changes.pop("loss", loss)
    return Probe(model, of, make_data(), **{"sampler": sampler, "threads": 1, **changes})


def a_snapshot(step, seed=0):
    return Snapshot.of(make_model(seed), step)


class Told:
    """A sink that remembers."""

    def __init__(self):
        self.items = []
        self.closed = 0

    def write(self, item):
        self.items.append(item)

    def close(self):
        self.closed += 1

    @property
    def points(self):
        return [item for item in self.items if isinstance(item, Point)]

    @property
    def transitions(self):
        return [item for item in self.items if not isinstance(item, Point)]


class ToldToFile:
    """A sink whose memory survives the death of the process: a line a point, each in one write."""

    def __init__(self, path):
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(self, item):
        if isinstance(item, Point):
            os.write(self._file, f"{item.step}\n".encode())

    def close(self):
        pass


def train(folder, *, steps=12, at=None, seed=0, model=None, probe=None, first=1, **options):
    """Train and watch; from `first` on only, as if resumed from a checkpoint of the user's own."""
    model = make_model(seed) if model is None else model
    probe = probe or make_probe()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with PhaseMonitor(model, probe, run=folder, at=at or every(2), **options) as monitor:
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            loss(model, make_data()).backward()
            optimizer.step()
            if step >= first:
                monitor(step)
    return monitor


def die_at_operation(folder: str, number: int):
    """SIGKILL this process just before its `number`-th change of a file under a folder."""
    count = 0

    def hook(event, arguments):
        nonlocal count
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not writes and event not in {"os.rename", "os.remove", "os.truncate", "os.mkdir"}:
            return
        if str(arguments[0]).startswith(folder):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@contextmanager
def one_warning(match):
    """The block gives one warning, in these words."""
    with pytest.warns(PhasewatchWarning, match=match) as told:
        yield
    assert len(told) == 1, [str(warning.message) for warning in told]


def lines(folder):
    """The whole lines of points.jsonl."""
    path = Path(folder) / "points.jsonl"
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1]


@contextmanager
def no_room():
    """A disk that is full for points.jsonl."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "open_append", lambda _: open("/dev/full", "ab"))
        yield
