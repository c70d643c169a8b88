"""What the experiments share."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from phasewatch import SGLD, Estimate, Health, Point, Probe, SnapshotFolder, Trajectory, find_transitions, log_spaced


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

    sampler = SGLD(step_size=1e-3, localization=7, nbeta=30, chains=2, draws=4, burn_in=2, batch_size=16)
    return Probe(make_model, loss, data(), sampler=sampler, metrics={"seen": seen}, threads=1, device=device)


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


@pytest.mark.parametrize("middle", [60, 300, 2500])
@pytest.mark.parametrize("signal", ["llc", "loss", "score"])
def test_half_of_a_logistic_in_log_step_is_done_at_its_middle(campaign, middle, signal):
    generator = np.random.default_rng(11)
    points = []
    for step in sorted(log_spaced(1, 30_000, num=70, linear=10).steps):
        curve = 1 / (1 + (middle / step) ** 3)  # logistic in log step
        noise = 0.003 * generator.standard_normal(3)
        estimate = Estimate(100 + 40 * (curve + noise[0]), 0.2, (), 30.0, 1.0, 100.0, 0.9, Health.OK)
        points.append(Point(step, 3 - 2 * (curve + noise[1]), estimate, {"score": 0.1 + 0.7 * (curve + noise[2])}))
    trajectory = Trajectory(points)
    transition = max(find_transitions(trajectory, metric=signal), key=lambda t: abs(t.after - t.before))
    assert transition.trend == ("down" if signal == "loss" else "up")
    half = campaign.halfway(trajectory, transition)
    assert transition.start < half < transition.end
    assert abs(math.log(half / middle)) < 0.05


def test_a_table_has_the_columns_that_any_row_has(campaign):
    rows = [{"run": "seed-0", "λ̂": 12.3456}, {"run": "seed-1", "kinds": "A B", "λ̂": 7}]
    assert campaign.markdown(rows) == [
        "| run | λ̂ | kinds |",
        "| --- | --- | --- |",
        "| seed-0 | 12.3 |  |",
        "| seed-1 | 7 | A B |",
    ]


def test_a_table_is_printed_and_kept(campaign, given, capsys):
    given().results.mkdir(parents=True)
    campaign.keep_table(given(), "toy", "A title", ["| a |", "| --- |", "| λ̂ |"])
    text = "# A title\n\n| a |\n| --- |\n| λ̂ |\n"
    assert (given().results / "toy.md").read_text("utf-8") == text
    assert capsys.readouterr().out == text + "\n"
