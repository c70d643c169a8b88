import errno
import math

import numpy as np
import pytest
from tiny_run import Told, a_point, a_snapshot, one_warning

from phasewatch.callbacks.trainers import recorder
from phasewatch.callbacks.trainers.recorder import Recorder, Stopped
from phasewatch.callbacks.trainers.schedule import Budget, every
from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.runs.folder import RunFolder
from phasewatch.monitor.runs.publish import Publisher
from phasewatch.monitor.snapshots import snapshot
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
    monkeypatch.setattr(recorder.time, "perf_counter", clock)
    return clock


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run", {})
    yield folder
    folder.close()


def make_recorder(folder, measure=lambda step, snapshot: a_point(step), sinks=(), **options):
    publisher = Publisher(sinks)
    defaults = {"budget": None, "keep_snapshots": True, "waits": True}
    return Recorder(folder, publisher, measure, **{**defaults, **options})


def measure_all(recorder):
    while recorder.measure_next():
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
        patch.setattr(snapshot, "save_file", refusing.save)
        refusing.make_room = patch.undo
        yield refusing


def test_a_snapshot_is_saved_then_measured_from_disk_then_recorded(folder):
    calls = []

    def measure(step, snapshot):
        calls.append((step, snapshot, folder.snapshots.steps))
        return a_point(step)

    told = Told()
    recorder = make_recorder(folder, measure, [told])
    for step in (1, 5):
        recorder.take(a_snapshot(step))
    assert recorder.waiting == [1, 5]
    measure_all(recorder)
    assert calls == [(1, None, (1, 5)), (5, None, (1, 5))]
    assert recorder.waiting == []
    assert recorder.steps == folder.steps == {1, 5}


def test_snapshots_without_a_point_wait_on_resuming(folder):
    for step in (1, 2, 3):
        folder.save(a_snapshot(step))
    folder.append(a_point(2))
    recorder = make_recorder(folder)
    assert recorder.waiting == [1, 3]
    assert recorder.steps == {1, 2, 3}
    measure_all(recorder)
    assert folder.steps == {1, 2, 3}
    assert len(folder.points) == 3


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), PhasewatchError("damaged")])
def test_a_measurement_that_fails_costs_its_own_point_and_is_tried_again_on_resuming(folder, error):
    def measure(step, snapshot):
        if step == 2:
            raise error
        return a_point(step)

    recorder = make_recorder(folder, measure)
    for step in (1, 2, 3):
        recorder.take(a_snapshot(step))
    with one_warning(f"Step 2 could not be measured, and training goes on: .*{error}"):
        measure_all(recorder)
    assert folder.steps == {1, 3}
    assert make_recorder(folder).waiting == [2]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), Stopped()])
def test_an_interrupted_measurement_waits_on(folder, interruption):
    raising = [interruption]

    def measure(step, snapshot):
        if raising:
            raise raising.pop()
        return a_point(step)

    recorder = make_recorder(folder, measure)
    recorder.take(a_snapshot(7))
    if isinstance(interruption, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            recorder.measure_next()
    else:
        assert not recorder.measure_next()
    assert recorder.waiting == [7]
    measure_all(recorder)
    assert [point.step for point in folder.points] == [7]


def test_an_interruption_while_a_point_is_told_repeats_none(folder):
    class Interrupted(Publisher):
        def publish(self, point):
            raise KeyboardInterrupt

    options = {"budget": None, "keep_snapshots": True, "waits": True}
    recorder = Recorder(folder, Interrupted([]), lambda step, snapshot: a_point(step), **options)
    recorder.take(a_snapshot(7))
    with pytest.raises(KeyboardInterrupt):
        recorder.measure_next()
    assert not recorder.measure_next()
    assert len(folder.points) == 1


def test_a_snapshot_that_the_disk_refuses_is_measured_from_memory(folder, refusing):
    held = []

    def measure(step, snapshot):
        held.append(snapshot)
        return a_point(step)

    recorder = make_recorder(folder, measure)
    with one_warning("No space left on device"):
        for step in (1, 2, 3):
            recorder.take(a_snapshot(step))
            measure_all(recorder)
    assert [snapshot.step for snapshot in held] == [1, 2, 3]
    assert folder.steps == {1, 2, 3}


def test_another_process_gets_a_snapshot_when_the_disk_has_room_again(folder, refusing):
    held = []

    def measure(step, snapshot):
        held.append(snapshot)
        return a_point(step)

    recorder = make_recorder(folder, measure, waits=False)
    with one_warning("No space left on device"):
        for step in (1, 2):
            recorder.take(a_snapshot(step))
            measure_all(recorder)
    assert recorder.waiting == [1, 2]
    assert held == []
    refusing.make_room()
    measure_all(recorder)
    assert held == [None, None]
    assert folder.steps == {1, 2}


def test_when_training_is_over_what_the_disk_still_refuses_is_measured_all_the_same(folder, refusing):
    recorder = make_recorder(folder, waits=False)
    with one_warning("No space left on device"):
        recorder.take(a_snapshot(1))
        assert not recorder.measure_next()
        assert recorder.measure_next(over=True)
    assert folder.steps == {1}


def test_files_are_removed_once_their_points_are_on_disk(folder):
    recorder = make_recorder(folder, keep_snapshots=False)
    recorder.take(a_snapshot(1))
    recorder.take(a_snapshot(2))
    assert recorder.measure_next()
    assert folder.snapshots.steps == (2,)
    measure_all(recorder)
    assert folder.snapshots.steps == ()
    assert folder.steps == {1, 2}


def test_no_file_is_removed_while_its_point_is_in_memory_alone(folder):
    recorder = make_recorder(folder, keep_snapshots=False)
    points = folder.path / "points.jsonl"
    points.symlink_to("/dev/full")
    with one_warning("No space left on device"):
        for step in (1, 2):
            recorder.take(a_snapshot(step))
            measure_all(recorder)
    assert folder.snapshots.steps == (1, 2)
    points.unlink()
    recorder.take(a_snapshot(3))
    measure_all(recorder)
    assert folder.snapshots.steps == ()
    assert list(Trajectory.read(points).steps) == [1, 2, 3]


@pytest.mark.parametrize(("fraction", "cost", "step_time"), [(0.1, 3.0, 0.05), (0.5, 1.0, 0.02), (0.05, 0.3, 0.01)])
def test_a_budget_keeps_its_share_and_spreads_over_log_step(folder, clock, fraction, cost, step_time):
    spent = 0.0

    def measure(step, snapshot):
        nonlocal spent
        clock.now += cost
        spent += cost
        return a_point(step)

    last = 20_000
    recorder = make_recorder(folder, measure, budget=Budget(fraction, at=every(1)))
    began = clock.now
    due = {round(last ** (i / 99)) for i in range(100)}
    for step in range(1, last + 1):
        clock.now += step_time
        if step in due:
            recorder.take(a_snapshot(step))
            measure_all(recorder)
            assert spent <= max(fraction * (clock.now - began - spent), cost) * (1 + 1e-9)
    measured = np.array(sorted(folder.steps))
    assert recorder.waiting == sorted(due - folder.steps)
    assert spent + 2 * cost > fraction * step_time * last or not recorder.waiting
    gaps = np.diff(np.log(measured))
    assert gaps.max() < 0.6 * math.log(last), "the steps measured leave most of the run out"


def test_measuring_beside_training_takes_its_share_of_all_time(folder, clock):
    def measure(step, snapshot):
        clock.now += 1.0
        return a_point(step)

    recorder = make_recorder(folder, measure, budget=Budget(0.25, at=every(1)), waits=False)
    for step in range(1, 101):
        clock.now += 1.0
        recorder.take(a_snapshot(step))
        measure_all(recorder)
    elapsed = clock.now - 100.0
    assert 0.2 * elapsed <= len(folder.points) <= 0.25 * elapsed


def test_what_a_budget_measures_late_is_where_the_widest_gaps_are(folder, clock):
    recorder = make_recorder(folder, budget=Budget(1.0, at=every(1)))
    recorder._measured, recorder._measuring = 1, 1e9  # nothing is affordable yet
    for step in [*range(1, 9), 16, 32, 64, 1000]:
        recorder.take(a_snapshot(step))
    recorder._measuring = 0.0
    order = []
    while recorder.measure_next():
        order.append(folder.points[-1].step)
    assert order[:3] == [1, 1000, 32]


def test_a_measurement_that_fails_is_paid_for_too(folder, clock):
    def measure(step, snapshot):
        clock.now += 10.0
        raise RuntimeError("out of memory")

    recorder = make_recorder(folder, measure, budget=Budget(0.1, at=every(1)))
    recorder.take(a_snapshot(1))
    recorder.take(a_snapshot(2))
    with one_warning("Step 1"):
        measure_all(recorder)
    assert recorder.waiting == [2]
    assert clock.now == 110.0
