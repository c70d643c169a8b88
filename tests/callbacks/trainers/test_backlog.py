import errno
import math
import warnings

import numpy as np
import pytest
from made_points import a_point
from tiny_run import Told, a_snapshot, no_room, one_warning

from phasewatch.callbacks.trainers import backlog as backlog_module
from phasewatch.callbacks.trainers.backlog import Backlog
from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.runs import plan
from phasewatch.monitor.runs.folder import RunFolder
from phasewatch.monitor.runs.plan import Plan
from phasewatch.monitor.runs.record import Recorder
from phasewatch.monitor.snapshots import folder as snapshot_folder
from phasewatch.monitor.snapshots.snapshot import same_weights
from phasewatch.monitor.trajectories.trajectory import Trajectory


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(plan.time, "perf_counter", clock)
    return clock


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run", {})
    yield folder
    folder.close()


class Measurer:
    """Both the executor, asked for steps, and the probe, given snapshots from memory."""

    def __init__(self, measure):
        self.result = measure

    def measure(self, steps):
        for step in steps:
            try:
                yield step, self.result(step, None)
            except Closed:
                return
            except Exception as error:
                yield step, error

    def close(self):
        pass

    def __call__(self, snapshot):
        return self.result(snapshot.step, snapshot)


class Closed(Exception):
    """The executor was closed while it measured."""


def make_backlog(
    folder, measure=lambda step, snapshot: a_point(step), sinks=(), fraction=None, keep_snapshots=True, waits=True
):
    measurer = Measurer(measure)
    recorder = Recorder(sinks, folder)
    plan = Plan(fraction, waits=waits)
    return Backlog(folder, recorder, measurer, measurer, plan, keep_snapshots=keep_snapshots, waits=waits)


def measure_all(backlog):
    while backlog.measure_next():
        pass


@pytest.fixture
def refusing(monkeypatch):
    """A disk that takes no snapshots until `clear` is called."""

    class Refusing(list):
        def save(self, *_, **__):
            self.append(1)
            raise OSError(errno.ENOSPC, "No space left on device")

    refusing = Refusing()
    with monkeypatch.context() as patch:
        patch.setattr(snapshot_folder, "save_file", refusing.save)
        refusing.make_room = patch.undo
        yield refusing


def test_a_snapshot_is_saved_then_measured_from_disk_then_recorded(folder):
    calls = []

    def measure(step, snapshot):
        calls.append((step, snapshot, folder.snapshots.steps))
        return a_point(step)

    told = Told()
    backlog = make_backlog(folder, measure, [told])
    for step in (1, 5):
        backlog.take(a_snapshot(step))
    assert backlog.waiting == [1, 5]
    measure_all(backlog)
    assert calls == [(1, None, (1, 5)), (5, None, (1, 5))]
    assert backlog.waiting == []
    assert backlog.steps == folder.steps == {1, 5}


def test_snapshots_without_a_point_wait_on_resuming(folder):
    for step in (1, 2, 3):
        folder.save(a_snapshot(step))
    folder.append(a_point(2))
    backlog = make_backlog(folder)
    assert backlog.waiting == [1, 3]
    assert backlog.steps == {1, 2, 3}
    measure_all(backlog)
    assert folder.steps == {1, 2, 3}
    assert len(folder.points) == 3


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), PhasewatchError("damaged")])
def test_a_measurement_that_fails_costs_its_own_point_and_is_tried_again_on_resuming(folder, error):
    def measure(step, snapshot):
        if step == 2:
            raise error
        return a_point(step)

    backlog = make_backlog(folder, measure)
    for step in (1, 2, 3):
        backlog.take(a_snapshot(step))
    with one_warning(f"Step 2 could not be measured, and training goes on: .*{error}"):
        measure_all(backlog)
    assert folder.steps == {1, 3}
    assert make_backlog(folder).waiting == [2]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), Closed()])
def test_an_interrupted_measurement_waits_on(folder, interruption):
    raising = [interruption]

    def measure(step, snapshot):
        if raising:
            raise raising.pop()
        return a_point(step)

    backlog = make_backlog(folder, measure)
    backlog.take(a_snapshot(7))
    if isinstance(interruption, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            backlog.measure_next()
    else:
        assert not backlog.measure_next()
    assert backlog.waiting == [7]
    measure_all(backlog)
    assert [point.step for point in folder.points] == [7]


def test_an_interruption_while_a_point_is_told_repeats_none(folder, monkeypatch):
    def interrupted(self, point):
        raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "_tell", interrupted)
    backlog = make_backlog(folder)
    backlog.take(a_snapshot(7))
    with pytest.raises(KeyboardInterrupt):
        backlog.measure_next()
    assert not backlog.measure_next()
    assert len(folder.points) == 1


def test_a_snapshot_that_the_disk_refuses_is_measured_from_memory(folder, refusing):
    held = []

    def measure(step, snapshot):
        held.append(snapshot)
        return a_point(step)

    backlog = make_backlog(folder, measure)
    with one_warning("No space left on device"):
        for step in (1, 2, 3):
            backlog.take(a_snapshot(step))
            measure_all(backlog)
    assert [snapshot.step for snapshot in held] == [1, 2, 3]
    assert folder.steps == {1, 2, 3}


def test_a_snapshot_that_was_measured_from_memory_is_written_when_there_is_room_again(folder, refusing):
    backlog = make_backlog(folder)
    with one_warning("waits in memory until it can"):
        for step in (1, 2, 3):
            backlog.take(a_snapshot(step, seed=step))
            measure_all(backlog)
    assert backlog.unwritten == [1, 2, 3]
    assert folder.snapshots.steps == ()
    refusing.make_room()
    backlog.take(a_snapshot(4))
    assert backlog.unwritten == []
    assert folder.snapshots.steps == (1, 2, 3, 4)
    for step in (1, 2, 3):
        assert same_weights(folder.snapshots.load(step), a_snapshot(step, seed=step))


def test_snapshots_that_the_disk_refuses_for_long_do_not_fill_the_memory(folder, refusing, monkeypatch):
    monkeypatch.setattr(backlog_module, "MOST_UNWRITTEN", 2 * 16)  # bytes of two of these models
    backlog = make_backlog(folder)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in (1, 2, 3):
            backlog.take(a_snapshot(step))
            measure_all(backlog)
    assert [str(warning.message) for warning in told][1:] == [
        "The snapshot of step 1 is measured and isn't kept, since the disk refuses it."
    ]
    assert backlog.unwritten == [2, 3]


def test_another_process_gets_a_snapshot_when_the_disk_has_room_again(folder, refusing):
    held = []

    def measure(step, snapshot):
        held.append(snapshot)
        return a_point(step)

    backlog = make_backlog(folder, measure, waits=False)
    with one_warning("No space left on device"):
        for step in (1, 2):
            backlog.take(a_snapshot(step))
            measure_all(backlog)
    assert backlog.waiting == [1, 2]
    assert held == []
    refusing.make_room()
    measure_all(backlog)
    assert held == [None, None]
    assert folder.steps == {1, 2}


def test_when_training_is_over_what_the_disk_still_refuses_is_measured_all_the_same(folder, refusing):
    backlog = make_backlog(folder, waits=False)
    with one_warning("No space left on device"):
        backlog.take(a_snapshot(1))
        assert not backlog.measure_next()
        assert backlog.measure_next(over=True)
    assert folder.steps == {1}


def test_files_are_removed_once_their_points_are_on_disk(folder):
    backlog = make_backlog(folder, keep_snapshots=False)
    backlog.take(a_snapshot(1))
    backlog.take(a_snapshot(2))
    assert backlog.measure_next()
    assert folder.snapshots.steps == (2,)
    measure_all(backlog)
    assert folder.snapshots.steps == ()
    assert folder.steps == {1, 2}


def test_no_file_is_removed_while_its_point_is_in_memory_alone(folder):
    backlog = make_backlog(folder, keep_snapshots=False)
    points = folder.path / "points.jsonl"
    with no_room(), one_warning("No space left on device"):
        for step in (1, 2):
            backlog.take(a_snapshot(step))
            measure_all(backlog)
    assert folder.snapshots.steps == (1, 2)
    backlog.take(a_snapshot(3))
    measure_all(backlog)
    assert folder.snapshots.steps == ()
    assert list(Trajectory.read(points).steps) == [1, 2, 3]


@pytest.mark.parametrize(("fraction", "cost", "step_time"), [(0.1, 3.0, 0.05), (0.5, 1.0, 0.02), (0.05, 0.3, 0.01)])
def test_a_budget_keeps_its_share_and_spreads_over_the_run(folder, clock, fraction, cost, step_time):
    spent = 0.0

    def measure(step, snapshot):
        nonlocal spent
        clock.now += cost
        spent += cost
        return a_point(step)

    last = 20_000
    backlog = make_backlog(folder, measure, fraction=fraction)
    began = clock.now
    due = {round(last ** (i / 99)) for i in range(100)}
    for step in range(1, last + 1):
        clock.now += step_time
        if step in due:
            backlog.take(a_snapshot(step))
            measure_all(backlog)
            assert spent <= max(fraction * (clock.now - began - spent), cost) * (1 + 1e-9)
    measured = np.array(sorted(folder.steps))
    assert backlog.waiting == sorted(due - folder.steps)
    assert spent + 2 * cost > fraction * step_time * last or not backlog.waiting
    gaps = np.diff(np.log(measured))
    assert gaps.max() < 0.6 * math.log(last), "the steps measured leave most of the run out"


def test_measuring_beside_training_takes_its_share_of_all_time(folder, clock):
    def measure(step, snapshot):
        clock.now += 1.0
        return a_point(step)

    backlog = make_backlog(folder, measure, fraction=0.25, waits=False)
    for step in range(1, 101):
        clock.now += 1.0
        backlog.take(a_snapshot(step))
        measure_all(backlog)
    elapsed = clock.now - 100.0
    assert 0.2 * elapsed <= len(folder.points) <= 0.25 * elapsed


def test_what_a_budget_measures_late_is_where_the_widest_gaps_are(folder, clock):
    backlog = make_backlog(folder, fraction=1.0)
    backlog._plan._measured, backlog._plan._measuring = 1, 1e9  # nothing is affordable yet
    for step in [*range(1, 9), 16, 32, 64, 1000]:
        backlog.take(a_snapshot(step))
    backlog._plan._measuring = 0.0
    order = []
    while backlog.measure_next():
        order.append(folder.points[-1].step)
    assert order[:3] == [1, 1000, 6]  # in the middle of the twelve


def test_a_measurement_that_fails_is_paid_for_too(folder, clock):
    def measure(step, snapshot):
        clock.now += 10.0
        raise RuntimeError("out of memory")

    backlog = make_backlog(folder, measure, fraction=0.1)
    backlog.take(a_snapshot(1))
    backlog.take(a_snapshot(2))
    with one_warning("Step 1"):
        measure_all(backlog)
    assert backlog.waiting == [2]
    assert clock.now == 110.0
