"""What the experiments share."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from processes import alive, gone, reads_proc
from torch import nn
from torch.nn import functional as F

from phasewatch import Langevin, Probe, SnapshotFolder, Trajectory, log_spaced


def loss(model, batch):
    x, y = batch
    return F.mse_loss(model(x), y)


def data():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 3, generator=generator)
    return x, x.sum(-1, keepdim=True) + 0.1 * torch.randn(64, 1, generator=generator)


def make_model():
    return nn.Linear(3, 1)


def training(model, killed_at=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.5)
    step = 0
    while True:
        optimizer.zero_grad()
        loss(model, data()).backward()
        optimizer.step()
        step += 1
        if step == killed_at:
            raise KeyboardInterrupt
        yield step


def make_probe(model, device, taken=None):
    def seen(model, batch):
        if taken is not None:
            taken.append(loss(model, batch).item())
        return 0.0

    sampler = Langevin(step_size=1e-3, localization=7, nbeta=30, chains=2, draws=4, burn_in=2, batch_size=16)
    return Probe(make_model, loss, data(), sampler=sampler, metrics={"seen": seen}, threads=1, device=device)


def on_the_cpu(model, device):
    return make_probe(model, "cpu")


def records(trajectory):
    return [point.as_json() for point in trajectory]


@pytest.fixture
def campaign(script):
    return script("campaign")


@pytest.fixture
def given(campaign, tmp_path):
    """The options of a command line that keeps everything in a temporary folder."""

    def options(folder="here"):
        runs, results = tmp_path / folder / "runs", tmp_path / folder / "results"
        arguments = ["--jobs", "1", "--runs", str(runs), "--results", str(results)]
        return campaign.options(None, "toy", seeds=2, arguments=arguments)

    return options


@pytest.fixture
def run(campaign):
    def make(name="seed-5", killed_at=None, taken=None):
        return campaign.Run(
            name=name,
            seed=5,
            make_model=make_model,
            training=partial(training, killed_at=killed_at),
            make_probe=partial(make_probe, taken=taken),
            at=log_spaced(1, 30, num=7),
        )

    return make


def test_a_run_whose_training_was_killed_comes_out_as_one_that_was_not(campaign, given, run):
    whole = campaign.measured("toy", [run()], given("whole"))["seed-5"]
    with pytest.raises(KeyboardInterrupt):
        campaign.measured("toy", [run(killed_at=12)], given())
    folder = given().runs / "seed-5"
    before = SnapshotFolder(folder / "snapshots").steps
    assert 0 < len(before) < len(run().at.steps)
    assert not list((given().results / "points" / "toy").iterdir())
    assert records(campaign.measured("toy", [run()], given())["seed-5"]) == records(whole)
    assert whole.steps.tolist() == sorted(run().at.steps)


def test_a_run_that_was_killed_while_it_was_measured_is_measured_on(campaign, given, run):
    class Killed(list):
        def append(self, value):
            if len(self) == 4:
                raise KeyboardInterrupt
            super().append(value)

    whole = campaign.measured("toy", [run()], given("whole"))["seed-5"]
    with pytest.raises(KeyboardInterrupt):
        campaign.measured("toy", [run(taken=Killed())], given())
    there = len(Trajectory.read(given().runs / "seed-5" / "points.jsonl"))
    assert 0 < there < len(whole)
    rest = []
    assert records(campaign.measured("toy", [run(taken=rest)], given())["seed-5"]) == records(whole)
    assert len(whole) - there <= len(rest) < len(whole) + 2


def test_points_that_are_kept_are_read_and_nothing_is_trained(campaign, given, run):
    whole = campaign.measured("toy", [run()], given())["seed-5"]
    again = campaign.measured("toy", [run(killed_at=1)], given())["seed-5"]
    assert records(again) == records(whole)


def test_a_seed_is_one_model(campaign, run):
    first, again = run().initial_model(), run().initial_model()
    assert torch.equal(first.weight, again.weight)


def test_only_the_runs_that_are_asked_for_are_made(campaign, given, run):
    options = campaign.options(
        None, "toy", seeds=1, arguments=["--jobs", "1", "--only", "b", "--runs", str(given().runs.parent),
                                         "--results", str(given().results)],
    )  # fmt: skip
    assert list(campaign.measured("toy", [run("a-1"), run("b-1")], options)) == ["b-1"]


@pytest.mark.parametrize("device", ["cpu", "elsewhere"])
def test_another_experiment_s_snapshots_are_measured_and_not_trained_again(campaign, given, run, device, monkeypatch):
    monkeypatch.setattr(campaign, "_pool", ThreadPoolExecutor)
    names = ["a", "b"]
    for name in names:
        campaign.train(run(name), given().folder("others"))
    again = [replace(run(name, killed_at=1), trained_by="others", make_probe=on_the_cpu) for name in names]
    found = campaign.measured("toy", again, replace(given(), device=device, jobs=2))
    assert [trajectory.steps.tolist() for trajectory in found.values()] == [sorted(run().at.steps)] * 2
    assert not list(given().runs.rglob("*.safetensors"))


ENDLESS = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from campaign import _pool

def work(_):
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    with _pool(1) as pool:
        list(pool.map(work, [None]))
"""


@reads_proc
def test_a_process_ends_when_its_parent_is_killed(campaign, tmp_path):
    (tmp_path / "endless.py").write_text(ENDLESS)
    arguments = [sys.executable, str(tmp_path / "endless.py"), str(Path(campaign.__file__).parent)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as parent:
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
        assert gone([pid], 5)
