"""A run that finds its own setting: when, what it keeps of it, and what it says."""

import json
import warnings

import pytest
import torch
from tiny_run import loss, make_data, make_model, make_probe, one_warning

from phasewatch.callbacks.trainers import session
from phasewatch.callbacks.trainers.loop import PhaseMonitor
from phasewatch.callbacks.trainers.schedule import Budget, every
from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.probing import automatic
from phasewatch.monitor.probing.calibrate import calibrate
from phasewatch.monitor.runs.replay import replay
from phasewatch.monitor.sampling.settings import SGLD, Langevin

GIVEN = Langevin(batch_size=16, draws=4, burn_in=2, chains=2)
FOUND = Langevin(batch_size=16, draws=6, burn_in=2, chains=3, step_size=2e-3, localization=7.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(session, "write_report", lambda run: None)


@pytest.fixture
def tried(monkeypatch):
    """What a calibration is asked for from now on; it finds a setting at once, or fails as often as `fails` says."""
    steps, fails = [], []

    def chosen(snapshots, probe, *, show):
        steps.append([snapshot.step for snapshot in snapshots])
        if fails:
            raise PhasewatchError(fails.pop())
        show("what was tried")
        return FOUND

    monkeypatch.setattr(automatic, "calibrate", chosen)
    return steps, fails


def train(run, *, steps=10, probe=None, at=None, first=1, **options):
    torch.manual_seed(0)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    probe = probe or make_probe(sampler=GIVEN)
    with PhaseMonitor(model, probe, run=run, at=at or every(1), **{"sampler": "calibrate", **options}) as monitor:
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            loss(model, make_data()).backward()
            optimizer.step()
            if step >= first:
                monitor(step)
    return monitor, model


def header(run):
    return json.loads((run / "run.json").read_text())


def test_the_first_snapshots_wait_for_it_and_all_are_measured_with_what_it_finds(tmp_path, tried, capsys):
    run = tmp_path / "run"
    monitor, _ = train(run)
    assert tried[0] == [[1, 2, 3]]
    expected = list(replay(run / "snapshots", make_probe(sampler=FOUND)))
    assert list(monitor.trajectory) == expected
    assert header(run)["settings"]["sampler"] == FOUND.as_json()
    assert header(run)["calibration"] == {"given": GIVEN.as_json(), "steps": [1, 2, 3]}
    assert (run / "calibration.txt").read_text() == "what was tried\n"
    said = capsys.readouterr().err.strip().splitlines()
    assert any(line.startswith("phasewatch: calibrating on steps 1, 2, 3, which takes up to 20 000") for line in said)
    assert f"phasewatch: calibrated on steps 1, 2, 3: {FOUND}; {run}/calibration.txt says why" in said


@pytest.mark.parametrize(
    ("at", "calibrate_at", "expected"),
    [(every(2), 6, [2, 4, 6]), (every(2), 5, [2, 4, 6]), (every(1), 1, [1]), (every(1), 99, [1, 6, 10])],
)
def test_a_stated_step_is_waited_for(tmp_path, tried, at, calibrate_at, expected):
    monitor, _ = train(tmp_path / "run", at=at, calibrate_at=calibrate_at)
    assert tried[0] == [expected]
    assert len(monitor.trajectory) == (10 if at == every(1) else 5)


def test_it_is_tried_again_with_more_snapshots_before_it_falls_back(tmp_path, tried):
    steps, fails = tried
    fails += ["no"] * 2
    train(tmp_path / "run", steps=14)
    assert steps == [[1, 2, 3], [1, 4, 6], [1, 7, 12]]


def test_where_nothing_works_one_sentence_names_what_is_taken(tmp_path, tried):
    run = tmp_path / "run"
    steps, fails = tried
    fails += ["it found nothing."] * 9
    with one_warning(r"calibration on steps 1, 7, 12 failed, and Langevin\(.* kappa=0\.5\) is taken: it found nothing"):
        monitor, _ = train(run, steps=14)
    assert len(steps) == 3
    assert header(run)["settings"]["sampler"]["kappa"] == 0.5
    assert len(monitor.trajectory) == 14
    assert list(replay(run, make_probe(sampler=GIVEN))) == list(monitor.trajectory)
    own = SGLD(step_size=1e-3, draws=4, burn_in=1, batch_size=16)
    assert automatic.fallback(own) == own


def test_a_training_too_short_for_it_calibrates_at_its_end(tmp_path, tried):
    monitor, _ = train(tmp_path / "run", steps=2)
    assert tried[0] == [[1, 2]]
    assert monitor.trajectory.steps.tolist() == [1, 2]


def test_a_run_that_goes_on_and_a_replay_take_the_setting_and_do_not_calibrate_again(tmp_path, tried):
    run = tmp_path / "run"
    train(run, steps=5)
    monitor, _ = train(run, steps=8, first=6)
    assert tried[0] == [[1, 2, 3]]
    assert monitor.trajectory.steps.tolist() == list(range(1, 9))
    for way in ({"run": run}, {"run": tmp_path / "again"}, {}):
        assert list(replay(run, make_probe(sampler=GIVEN), **way)) == list(monitor.trajectory)
    assert header(tmp_path / "again")["calibration"]["steps"] == [1, 2, 3]
    other = next(replay(run, make_probe(sampler=SGLD(step_size=1e-3, draws=4, burn_in=1, batch_size=16))))
    assert other.llc != monitor.trajectory[0].llc


def test_a_training_that_ends_before_it_is_finished_by_a_replay(tmp_path, tried):
    run = tmp_path / "run"
    monitor = PhaseMonitor(make_model(), make_probe(sampler=GIVEN), run=run, at=every(1), sampler="calibrate")
    monitor(1)
    with one_warning("1 snapshots of .* were not measured"):
        monitor.close(measure_rest=False)
    points = list(replay(run, make_probe(sampler=GIVEN), run=run))
    assert [point.step for point in points] == [1]
    assert tried[0] == [[1]]
    assert header(run)["settings"]["sampler"] == FOUND.as_json()
    assert list(replay(run, make_probe(sampler=FOUND))) == points


def test_a_replay_calibrates_on_the_first_the_middle_and_the_last_snapshot(tmp_path, tried):
    train(tmp_path / "run", sampler=None, steps=5)
    points = list(replay(tmp_path / "run", make_probe(sampler=GIVEN), run=tmp_path / "new", sampler="calibrate"))
    assert tried[0] == [[1, 3, 5]]
    assert points == list(replay(tmp_path / "run", make_probe(sampler=FOUND)))
    again = list(replay(tmp_path / "run", make_probe(sampler=GIVEN), run=tmp_path / "new", sampler="calibrate"))
    assert again == points
    assert len(tried[0]) == 1
    with pytest.raises(PhasewatchError, match="holds points of a setting that was given and not calibrated"):
        replay(tmp_path / "run", make_probe(sampler=GIVEN), run=tmp_path / "run", sampler="calibrate")


def test_a_budget_pays_for_it(tmp_path, tried):
    monitor, _ = train(tmp_path / "run", at=Budget(1e-9, at=every(1)), steps=6)
    assert tried[0] == [[1, 2, 3]]
    assert len(monitor.trajectory) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": GIVEN}, r"must be 'calibrate' or left out. A setting belongs to the probe"),
        ({"sampler": "sgld"}, r"PhaseMonitor\(sampler='sgld'\) must be 'calibrate'"),
        ({"sampler": None, "calibrate_at": 5}, r"give sampler='calibrate' too"),
        ({"calibrate_at": -1}, r"calibrate_at=-1\) must be a whole number of at least 0"),
    ],
)
def test_misuse_is_a_sentence(tmp_path, options, message):
    with pytest.raises(PhasewatchError, match=message):
        train(tmp_path / "run", **options)
    with pytest.raises(PhasewatchError, match=r"replay\(sampler='x'\) must be 'calibrate'"):
        replay(tmp_path, make_probe(), sampler="x")


class Dead(torch.nn.Module):
    """No weight near its own changes the loss, so that a calibration is soon over."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((3,), -9.0))

    def forward(self, x):
        return (x.abs() * self.weight).relu().sum(1, keepdim=True) + self.weight.sum() * 0


@pytest.mark.slow
def test_another_process_calibrates_too_and_falls_back_alike(tmp_path):
    points = []
    for measure in ("inline", "background"):
        run = tmp_path / measure
        monitor = PhaseMonitor(Dead(), make_probe(Dead, sampler=GIVEN), run=run, at=every(1), sampler="calibrate",
                               calibrate_at=1, measure=measure)  # fmt: skip
        with one_warning(r"calibration on step 1 failed, and Langevin\(.* is taken: .* the loss is flat"):
            monitor(1)
            monitor.close()
        points.append(list(monitor.trajectory))
        assert header(run)["settings"]["sampler"]["kappa"] == 0.5
        assert header(run)["calibration"]["steps"] == [1]
    assert len(points[0]) == 1
    assert points[0] == points[1]


@pytest.mark.slow
def test_training_is_untouched_by_a_real_one_and_another_process_comes_to_the_same(tmp_path):
    """The snapshots are of the minimum, where the first calibration works."""
    given = make_probe(sampler=Langevin(batch_size=None))

    def settled(measure):
        torch.manual_seed(0)
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = None
        for step in range(1, 204):
            optimizer.zero_grad()
            loss(model, make_data()).backward()
            optimizer.step()
            if step == 200 and measure:
                options = {"run": tmp_path / measure, "measure": measure, "sampler": "calibrate"}
                monitor = PhaseMonitor(model, given, at=every(1), **options)
            if monitor:
                monitor(step)
        if monitor:
            monitor.close()
        return [*model.parameters(), torch.get_rng_state()], monitor

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, _ = settled(None)
        inline, here = settled("inline")
        background, there = settled("background")
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(plain, inline, background, strict=True))
    assert list(here.trajectory) == list(there.trajectory)
    assert header(tmp_path / "inline")["settings"] == header(tmp_path / "background")["settings"]
    snapshots = [here._session.folder.snapshots.load(step) for step in (200, 201, 202)]
    expected = calibrate(snapshots, given, show=None)
    assert header(tmp_path / "inline")["settings"]["sampler"] == expected.as_json()
