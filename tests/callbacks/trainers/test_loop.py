import errno
import json
import os
import threading
import warnings
from contextlib import ExitStack

import cloudpickle
import numpy as np
import pytest
import torch
from tiny_run import Told, lines, loss, make_data, make_model, make_probe, no_room, one_warning, train, wait_for
from torch import nn

from phasewatch.callbacks.trainers import session
from phasewatch.callbacks.trainers.arguments import check_probe
from phasewatch.callbacks.trainers.loop import PhaseMonitor
from phasewatch.callbacks.trainers.schedule import Budget, every, log_spaced
from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.probing.probe import Probe
from phasewatch.monitor.runs import processes
from phasewatch.monitor.runs.folder import RunFolder
from phasewatch.monitor.runs.processes import WorkerDied
from phasewatch.monitor.runs.replay import replay
from phasewatch.monitor.snapshots import folder as snapshot_folder
from phasewatch.monitor.snapshots.averaging import RunningAverage
from phasewatch.monitor.trajectories.trajectory import Trajectory


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """No report, which takes most of a small run's time, but where it is what is tested."""
    if "report" not in request.function.__name__:
        monkeypatch.setattr(session, "write_report", lambda run: None)


@pytest.fixture(scope="module")
def probe():
    return make_probe()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run"


def counted(probe, monkeypatch):
    """The steps that a probe is asked to measure from now on."""
    steps = []
    measure = Probe.__call__

    def call(self, snapshot):
        steps.append(snapshot.step)
        return measure(self, snapshot)

    monkeypatch.setattr(Probe, "__call__", call)
    return steps


def crash_after(steps, probe, **options):
    model = make_model(5)
    with PhaseMonitor(model, probe, **options) as monitor:
        for step in steps:
            model.bias.data.add_(0.01)
            assert monitor(step)
        raise ZeroDivisionError


def measured(path):
    return list(Trajectory.read(path / "points.jsonl").steps)


def test_a_run_leaves_its_points_snapshots_transitions_and_report(path, probe):
    told = Told()
    monitor = train(path, steps=6, probe=probe, sinks=[told])
    assert measured(path) == [2, 4, 6]
    assert monitor.run == path
    assert list(monitor.trajectory) == told.points == list(Trajectory.read(path / "points.jsonl"))
    assert told.closed == 1
    assert sorted(file.name for file in path.iterdir() if file.name != ".lock") == [
        "numbers.jsonl", "points.jsonl", "report.html", "run.json", "snapshots", "transitions.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"at": None}, r"PhaseMonitor\(at=None\) must be a schedule such as every\(100\)"),
        ({"at": 100}, r"PhaseMonitor\(at=100\) must be a schedule"),
        ({"measure": "bakground"}, r"PhaseMonitor\(measure='bakground'\) must be 'inline' or 'background'"),
        ({"model": nn.Linear(4, 1)}, r"PhaseMonitor\(model=...\) is not the model of its probe: .*weight has shape"),
        ({"model": nn.Bilinear(2, 2, 1)}, r"PhaseMonitor\(model=...\) is not the model of its probe"),
        ({"model": nn.ReLU()}, r"PhaseMonitor\(model=...\) is not the model of its probe: .*lacks"),
        ({"model": None}, r"PhaseMonitor\(model=...\) must be a torch.nn.Module; a NoneType came"),
        ({"probe": make_probe}, r"PhaseMonitor\(probe=...\) must be a Probe; a function came"),
        ({"run": None}, r"PhaseMonitor\(run=None\) must be the path of a folder"),
        ({"sinks": Told()}, r"PhaseMonitor\(sinks=...\) must be a list of sinks; a Told came"),
        ({"sinks": [Told]}, r"PhaseMonitor\(sinks=\[<class .*Told'>\]\) must hold objects with write"),
        ({"sinks": [print]}, r"PhaseMonitor\(sinks=\[<built-in function print>\]\) must hold objects with write"),
        ({"average": 0}, r"PhaseMonitor\(average=0\) must be a finite number above 0 and at most 0.5, such as 0.02"),
        ({"average": 0.99}, r"PhaseMonitor\(average=0.99\) must be .*share of the steps so far to average over"),
        ({"average": True}, r"PhaseMonitor\(average=True\) must be a finite number above 0"),
        ({"average": "ema"}, r"PhaseMonitor\(average='ema'\) must be a finite number above 0"),
        ({"average": float("nan")}, r"PhaseMonitor\(average=nan\) must be a finite number above 0"),
    ],
)
def test_misuse_is_refused_before_the_first_step_and_leaves_no_folder(path, probe, changes, message):
    arguments = {"model": make_model(), "probe": probe, "run": path, "at": every(2), **changes}
    with pytest.raises(PhasewatchError, match=message):
        PhaseMonitor(arguments.pop("model"), arguments.pop("probe"), **arguments)
    assert not path.exists()


def test_a_probe_that_cannot_travel_is_refused_and_holds_no_lock(path):
    model = make_model()
    with pytest.raises(PhasewatchError, match="give the function that builds it") as caught:
        PhaseMonitor(model, make_probe(model), run=path, at=every(2), measure="background")
    train(path, steps=2, probe=make_probe())
    assert caught.value.__traceback__ is not None  # a notebook holds on to it, and so to the monitor half made


def test_other_settings_are_refused_before_the_first_step(path, probe):
    train(path, steps=2, probe=probe)
    with pytest.raises(PhasewatchError, match=r"was measured with other settings: .*seed was 0 and is 3"):
        PhaseMonitor(make_model(), make_probe(seed=3), run=path, at=every(2))


def test_two_monitors_on_one_folder(path, probe):
    with PhaseMonitor(make_model(), probe, run=path, at=every(2)) as first:
        with pytest.raises(PhasewatchError, match="Another monitor or replay is writing to run="):
            PhaseMonitor(make_model(), probe, run=path, at=every(2))
        assert first(2)
    with PhaseMonitor(make_model(), probe, run=path, at=every(2)) as second:
        assert not second(2)


@pytest.mark.parametrize("step", [4, np.int64(4), np.uint8(4), torch.tensor(4), torch.tensor([4]), 4.0, np.float32(4)])
def test_a_step_may_be_any_whole_number(path, probe, step):
    with PhaseMonitor(make_model(), probe, run=path, at=log_spaced(4, 4, 1)) as monitor:
        assert monitor(step)
    assert measured(path) == [4]
    assert json.loads(lines(path))["step"] == 4


@pytest.mark.parametrize("step", [-1, -4.0, 4.5, float("nan"), float("inf"), None, "4", torch.tensor(-2), 2**63, 1e300])
def test_a_step_that_is_none_costs_one_warning_and_nothing_else(path, probe, step):
    with PhaseMonitor(make_model(), probe, run=path, at=lambda step: True) as monitor:
        with one_warning("training goes on: a training step is a whole number"):
            for _ in range(5):
                assert not monitor(step)
        assert monitor(3)
    assert measured(path) == [3]


def test_a_step_that_python_cannot_write_out_costs_one_warning(path, probe):
    with PhaseMonitor(make_model(), probe, run=path, at=lambda step: True) as monitor:
        with one_warning("a int.* training goes on: a training step is a whole number"):
            assert not monitor(10**5000)
        assert monitor(3)


@pytest.mark.parametrize("yes", [True, np.True_, torch.tensor(True), 1])
def test_a_schedule_may_answer_in_any_type(path, probe, yes):
    with PhaseMonitor(make_model(), probe, run=path, at=lambda step: yes if step == 3 else not yes) as monitor:
        assert [monitor(step) for step in range(1, 5)] == [False, False, True, False]


def test_a_schedule_that_raises_costs_one_warning(path, probe):
    def at(step):
        if step != 30:
            raise KeyError(step)
        return True

    with PhaseMonitor(make_model(), probe, run=path, at=at) as monitor:
        with one_warning(r"monitor\(1\) failed, and training goes on: KeyError: 1"):
            taken = [step for step in range(1, 50) if monitor(step)]
    assert taken == [30]


def test_a_schedule_that_never_fires_is_told_at_the_end(path, probe):
    told = Told()
    with one_warning(r"PhaseMonitor\(at=Every\(n=1000\)\) never fired from step 1 on"):
        train(path, probe=probe, at=every(1000), sinks=[told])
    assert (told.items, told.closed) == ([], 1)
    assert not (path / "points.jsonl").exists()


def test_a_monitor_that_was_never_called_says_nothing(path, probe):
    PhaseMonitor(make_model(), probe, run=path, at=every(2)).close()


def test_closing_twice_and_calling_after(path, probe):
    told = Told()
    monitor = PhaseMonitor(make_model(), probe, run=path, at=every(1), sinks=[told])
    monitor(1)
    monitor.close()
    monitor.close()
    with one_warning(r"monitor\(2\) came after monitor.close\(\)"):
        assert [monitor(step) for step in (2, 3, 4)] == [False] * 3
    assert told.closed == 1
    assert measured(path) == [1]


def test_a_step_that_comes_again_is_measured_once(path, probe):
    with PhaseMonitor(make_model(), probe, run=path, at=every(1)) as monitor:
        assert [monitor(step) for step in (1, 1, 2, 1)] == [True, False, True, False]
    assert measured(path) == [1, 2]


def test_an_exception_in_the_block_passes_and_says_how_to_go_on(path, probe):
    told = Told()
    budget = Budget(1e-9, at=every(1))
    message = r"2 snapshots of .*run were not measured: steps 2, 3. replay\('.*run', probe, run='.*run'\) measures"
    with one_warning(message), pytest.raises(ZeroDivisionError):
        crash_after((1, 2, 3), probe, run=path, at=budget, sinks=[told])
    assert told.closed == 1
    assert measured(path) == [1]
    list(replay(path, probe, run=path))
    assert measured(path) == [1, 2, 3]


def test_what_a_budget_left_out_is_named_and_a_replay_measures_it(path, probe):
    whole = path.with_name("whole")
    train(whole, probe=probe)
    with one_warning(r"5 snapshots of .*run were left out by the budget: steps 4, 6, 8, 10, 12. replay\("):
        train(path, probe=probe, at=Budget(1e-9, at=every(2)))
    assert measured(path) == [2]
    points = list(replay(str(path), probe, run=str(path)))
    assert points == list(Trajectory.read(whole / "points.jsonl"))


def test_a_generous_budget_measures_everything(path, probe):
    train(path, probe=probe, at=Budget(1e9, at=every(2)))
    assert measured(path) == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("held", [True, False])
def test_ctrl_c_during_a_measurement_passes_and_the_run_can_be_resumed(path, probe, monkeypatch, held):
    undisturbed = path.with_name("undisturbed")
    train(undisturbed, probe=probe)
    measure = Probe.__call__

    def interrupted(self, snapshot):
        if snapshot.step == 6:
            raise KeyboardInterrupt
        return measure(self, snapshot)

    with monkeypatch.context() as patch:
        patch.setattr(Probe, "__call__", interrupted)
        with (
            one_warning("1 snapshots of .* were not measured: steps 6"),
            pytest.raises(KeyboardInterrupt),
        ):
            train(path, probe=probe)
    assert measured(path) == [2, 4]
    steps = counted(probe, monkeypatch)
    train(path, probe=probe, first=7 if held else 1)
    assert steps == [6, 8, 10, 12]
    assert lines(path) == lines(undisturbed)


def test_the_same_training_begun_anew_measures_nothing_again(path, probe, monkeypatch):
    train(path, probe=probe)
    before = lines(path)
    steps = counted(probe, monkeypatch)
    told = Told()
    train(path, probe=probe, steps=16, sinks=[told])
    assert steps == [14, 16]
    assert lines(path).startswith(before)
    assert [point.step for point in told.points] == list(range(2, 17, 2))
    assert not path.with_name("run-2").exists()


@pytest.mark.parametrize("second", [{"seed": 1}, {"seed": 1, "at": every(1)}, {"seed": 1, "at": every(4)}])
def test_another_training_is_kept_beside_the_first(path, probe, second):
    train(path, probe=probe)
    before = lines(path)
    with one_warning(r"run holds another training's points.*kept in .*run-2.*say run='.*-2'"):
        monitor = train(path, probe=probe, **second)
    assert monitor.run == path.with_name("run-2")
    assert lines(path) == before
    at = second.get("at") or every(2)
    assert measured(monitor.run) == [step for step in range(1, 13) if at(step)]
    with one_warning("run-3"):
        train(path, probe=probe, seed=2)
    RunFolder(path, probe.settings).close()  # no lock was left behind


def test_another_training_is_told_by_snapshots_that_were_never_measured(path, probe):
    with one_warning("were not measured"), pytest.raises(ZeroDivisionError):
        crash_after((1, 2), probe, run=path, at=Budget(1e-9, at=every(1)))
    (path / "points.jsonl").unlink()
    with one_warning("another training's points.*run-2"):
        train(path, probe=probe, at=every(1), steps=3)
    assert measured(path.with_name("run-2")) == [1, 2, 3]


def test_where_no_snapshot_was_kept_training_begun_anew_is_measured_beside(path, probe):
    train(path, probe=probe, keep_snapshots=False)
    with one_warning("or no snapshot to tell whose.*run-2"):
        train(path, probe=probe, seed=1, keep_snapshots=False)
    assert measured(path.with_name("run-2")) == measured(path)
    assert lines(path.with_name("run-2")) != lines(path)


def test_a_resumed_training_goes_on_in_its_folder(path, probe, monkeypatch):
    train(path, probe=probe, steps=6)
    steps = counted(probe, monkeypatch)
    train(path, probe=probe, steps=12, first=5)
    assert steps == [8, 10, 12]
    assert measured(path) == [2, 4, 6, 8, 10, 12]


# Averaged weights


def test_points_are_those_of_the_averaged_weights(path, probe):
    average, model = RunningAverage(0.2), make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    expected = []
    for step in range(1, 7):
        optimizer.zero_grad()
        loss(model, make_data()).backward()
        optimizer.step()
        average.update(model, step)
        if step % 2 == 0:
            expected.append(probe(average.snapshot(model, step)))
    monitor = train(path, probe=probe, steps=6, average=0.2)
    assert list(monitor.trajectory) == expected
    plain = train(path.with_name("plain"), probe=probe, steps=6)
    assert all(a.loss != b.loss for a, b in zip(monitor.trajectory, plain.trajectory, strict=True))


def test_a_run_with_averages_begun_anew_from_its_seed_is_the_one_that_was_stopped(path, probe, monkeypatch):
    undisturbed = path.with_name("undisturbed")
    train(undisturbed, probe=probe, average=0.2)
    train(path, probe=probe, steps=7, average=0.2)
    steps = counted(probe, monkeypatch)
    train(path, probe=probe, average=0.2)
    assert steps == [8, 10, 12]
    assert lines(path) == lines(undisturbed)


def test_a_resumed_training_begins_a_new_average_and_says_nothing_of_another_training(path, probe, monkeypatch, capsys):
    def stopped_then_resumed(folder):
        train(folder, probe=probe, steps=8, average=0.2)
        with monkeypatch.context() as patch:
            steps = counted(probe, patch)
            train(folder, probe=probe, first=7, average=0.2)
        assert steps == [10, 12]
        return lines(folder)

    first = stopped_then_resumed(path)
    assert first == stopped_then_resumed(path.with_name("again"))
    assert capsys.readouterr().err == ""
    from_seven = path.with_name("from seven")
    train(from_seven, probe=probe, first=7, average=0.2)
    assert first.splitlines()[-2:] == lines(from_seven).splitlines()[-2:]


@pytest.mark.parametrize(("before", "now"), [(None, 0.2), (0.2, None), (0.2, 0.1)])
@pytest.mark.parametrize("kept", [True, False])
def test_plain_points_and_averaged_ones_are_never_mixed(path, probe, before, now, kept):
    train(path, probe=probe, steps=4, average=before, keep_snapshots=kept)
    message = (
        rf"PhaseMonitor\(average={now}\): run='.*run' holds snapshots or points taken with average={before}. .* choose"
    )
    with pytest.raises(PhasewatchError, match=message):
        PhaseMonitor(make_model(), probe, run=path, at=every(2), average=now)
    train(path, probe=probe, steps=6, first=5, average=before)  # no lock was left behind
    assert measured(path) == [2, 4, 6]


def test_a_folder_that_holds_nothing_yet_takes_any_average(path, probe):
    for average in (0.2, None, 0.1):
        PhaseMonitor(make_model(), probe, run=path, at=every(2), average=average).close()
    train(path, probe=probe, steps=2, average=0.1)
    assert json.loads((path / "run.json").read_text())["averaging"] == 0.1


def test_another_training_with_averages_is_kept_beside_the_first(path, probe):
    train(path, probe=probe, average=0.2)
    with one_warning(r"run holds another training's points.*run-2"):
        train(path, probe=probe, seed=1, average=0.2)
    beside = path.with_name("run-2")
    train(beside, probe=probe, seed=1, average=0.2)
    with pytest.raises(PhasewatchError, match=r"holds snapshots or points taken with average=0\.2"):
        PhaseMonitor(make_model(1), probe, run=beside, at=every(2))


def test_what_was_left_out_of_an_averaged_run_is_measured_by_a_replay_of_it(path, probe):
    whole = path.with_name("whole")
    train(whole, probe=probe, average=0.2)
    with one_warning("were left out by the budget"):
        train(path, probe=probe, at=Budget(1e-9, at=every(2)), average=0.2)
    assert list(replay(path, probe, run=path)) == list(Trajectory.read(whole / "points.jsonl"))


def test_files_of_snapshots_are_removed_if_they_are_not_wanted(path, probe):
    kept = path.with_name("kept")
    train(kept, probe=probe)
    train(path, probe=probe, keep_snapshots=False)
    assert list((path / "snapshots").iterdir()) == []
    assert lines(path) == lines(kept)


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_for_a_while_costs_one_warning_and_no_point(path, probe, monkeypatch):
    undisturbed = path.with_name("undisturbed")
    train(undisturbed, probe=probe)
    model = make_model()
    told, full_disk = Told(), ExitStack()

    def at(step):
        if step == 4:
            full_disk.enter_context(no_room())
            monkeypatch.setattr(snapshot_folder, "save_file", full)
            monkeypatch.setattr(RunFolder, "write_transitions", real_write_transitions)
        if step == 10:
            full_disk.close()
            monkeypatch.undo()
            monkeypatch.setattr(session, "write_report", lambda run: None)
        return step % 2 == 0

    real_write_transitions = RunFolder.write_transitions
    with one_warning("can't be written to .No space left on device"):
        train(path, model=model, probe=probe, at=at, sinks=[told])
    assert lines(path) == lines(undisturbed)
    assert [point.step for point in told.points] == [2, 4, 6, 8, 10, 12]


def test_training_is_the_same_whatever_happens_to_the_monitor(path, probe, monkeypatch):
    def weights_after(**options):
        model = make_model()
        train(path.with_name(f"run {len(list(path.parent.iterdir()))}"), model=model, probe=probe, **options)
        return list(model.parameters())

    class Failing(Told):
        def write(self, item):
            raise SystemExit(1)

    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(12):
        optimizer.zero_grad()
        loss(model, make_data()).backward()
        optimizer.step()
    plain = list(model.parameters())
    with one_warning("Failing"):
        assert all(map(torch.equal, plain, weights_after(sinks=[Failing()])))
    monkeypatch.setattr(Probe, "__call__", full)
    with one_warning("could not be measured"):
        assert all(map(torch.equal, plain, weights_after(at=every(12))))


def test_nothing_interrupts_training_where_warnings_are_errors(path, probe, monkeypatch, capsys):
    class Failing(Told):
        def write(self, item):
            raise OSError("the server is gone")

    monkeypatch.setattr(snapshot_folder, "save_file", full)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor = train(path, probe=probe, sinks=[Failing()])
        assert not monitor("nonsense")
    assert measured(path) == [2, 4, 6, 8, 10, 12]
    said = capsys.readouterr().err
    assert said.count("phasewatch: The sink Failing failed") == 1
    assert said.count("No space left on device") == 1


def test_a_report_that_cannot_be_written_does_not_interrupt(path, probe, monkeypatch):
    monkeypatch.setattr(session, "write_report", full)
    with one_warning(r"report.html could not be written \(No space left"):
        train(path, probe=probe)
    assert len(measured(path)) == 6
    RunFolder(path, probe.settings).close()


class SlowWorker:
    """Stands in for the measuring process, so that a test can say how long a measurement takes."""

    def __init__(self, package, *, nice=0, environment=None, place=0):
        self.place = place
        self.probe, self.series = cloudpickle.loads(package)
        self.ended = threading.Event()
        self.gate = threading.Event()
        SlowWorker.last = self

    def measure_all(self, steps, then=()):
        while not self.gate.wait(0.005):
            if self.ended.is_set():
                raise WorkerDied("the measuring process ended with status -9")
        return [self.probe(self.series.load(step)) for step in steps]

    def kill(self):
        self.ended.set()

    stop = kill


@pytest.fixture
def slow_worker(monkeypatch):
    monkeypatch.setattr(processes, "Worker", SlowWorker)


@pytest.mark.usefixtures("slow_worker")
def test_in_the_background_an_exception_leaves_the_rest_to_a_resumed_run(path, probe):
    with one_warning("3 snapshots of .* were not measured: steps 1, 2, 3. replay"), pytest.raises(ZeroDivisionError):
        crash_after((1, 2, 3), probe, run=path, at=every(1), measure="background")
    train(path, probe=probe, steps=3, first=4)
    assert measured(path) == [1, 2, 3]


@pytest.mark.usefixtures("slow_worker")
def test_in_the_background_ctrl_c_while_closing_ends_the_measuring(path, probe, monkeypatch):
    monitor = PhaseMonitor(make_model(), probe, run=path, at=every(1), measure="background")
    for step in (1, 2, 3):
        monitor(step)
    wait_for(lambda: monitor._session.folder.snapshots.steps == (1, 2, 3))
    thread = monitor._session._measuring._measurer
    join = thread.join

    def interrupted(seconds):
        raise KeyboardInterrupt

    thread.join = interrupted
    with pytest.raises(KeyboardInterrupt):
        monitor.close()
    join(5)
    assert not thread.is_alive()
    assert monitor.trajectory.points == ()
    monkeypatch.undo()
    monkeypatch.setattr(session, "write_report", lambda run: None)
    with PhaseMonitor(make_model(), probe, run=path, at=every(1)) as resumed:
        assert resumed(9)
    assert measured(path) == [1, 2, 3, 9]


@pytest.mark.usefixtures("slow_worker")
def test_in_the_background_a_disk_that_is_full_loses_no_point(path, probe, monkeypatch):
    undisturbed = path.with_name("undisturbed")
    train(undisturbed, probe=probe)
    monkeypatch.setattr(snapshot_folder, "save_file", full)
    with one_warning("No space left on device"):
        train(path, probe=probe, measure="background")
    assert lines(path) == lines(undisturbed)


def test_another_training_that_joins_midway_is_told_so(tmp_path):
    train(tmp_path / "run", steps=6)
    other, probe = make_model(7), make_probe()
    monitor = PhaseMonitor(other, probe, run=tmp_path / "run", at=every(2))
    with one_warning(r"The weights at step 4 are not those that .*run holds of that step"):
        monitor(4)
    monitor.close()


@pytest.mark.parametrize(
    ("at", "calls", "taken", "jumped"),
    [
        (every(100), range(64, 400, 64), [128, 256, 320], "100, 200, 300"),  # a loop that counts samples
        (log_spaced(1, 1000, num=4), range(1, 1003, 2), [1, 11, 101, 1001], "10, 100, 1000"),
        (lambda step: step % 5 == 0, [4, 7, 8, 21], [7, 21], "5, 10, 15 and 1 more"),
        (every(10), [95, 10, 20], [95, 10, 20], "10, 20, 30 and 6 more"),  # begun anew from a checkpoint
        (every(100), [150, 160, 200], [150, 200], "100"),  # a first call after the first due step
        (every(10), [10, 11, 12, 20], [10, 20], None),
    ],
    ids=["samples", "two optimizers", "function", "back", "late", "none"],
)
def test_a_due_step_that_the_counter_jumps_over_is_measured_at_the_next_call(path, probe, at, calls, taken, jumped):
    model = make_model()
    monitor = PhaseMonitor(model, probe, run=path, at=at)
    found = []
    for step in calls:
        with torch.no_grad():
            model.weight.add_(0.01)
        if monitor(step):
            found.append(step)
    assert found == taken
    if jumped is None:
        monitor.close()
    else:
        with one_warning(rf"jumped over \({jumped}\)"):
            monitor.close()


def test_a_run_that_goes_on_takes_none_of_its_own_steps_for_jumped_over(path, probe):
    train(path, steps=6, probe=probe)
    with one_warning(r"jumped over \(8\)"):
        monitor = train(path, steps=9, first=9, probe=probe)
    assert monitor.trajectory.steps.tolist() == [2, 4, 6, 9]


def test_a_model_that_is_split_over_processes_by_hand_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    half = nn.Linear(2, 1)  # of the probe's nn.Linear(3, 1)
    with pytest.raises(
        PhasewatchError, match=r"weight has shape .*a stage of a pipeline, .*: replay the training's che"
    ):
        check_probe(half, make_probe(), None)
