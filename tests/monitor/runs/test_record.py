import json
import threading
import time
import warnings

import numpy as np
import pytest
from made_points import a_point, rising_points
from tiny_run import Told, lines, one_warning, wait_for

from phasewatch.monitor.errors import say, warn
from phasewatch.monitor.runs import record
from phasewatch.monitor.runs import sink as sink_module
from phasewatch.monitor.runs.folder import RunFolder
from phasewatch.monitor.runs.record import Recorder
from phasewatch.monitor.runs.sink import send
from phasewatch.monitor.trajectories.trajectory import Trajectory
from phasewatch.monitor.trajectories.transitions import find_transitions


class Failing(Told):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, item):
        super().write(item)
        raise self.error


class FailingClose(Told):
    def close(self):
        raise OSError("the server is gone")


class Hanging(Told):
    """Takes one item, and its thread is never seen again until `release`."""

    def __init__(self):
        super().__init__()
        self.release = threading.Event()

    def write(self, item):
        super().write(item)
        self.release.wait()


@pytest.fixture
def hanging():
    sink = Hanging()
    yield sink
    sink.release.set()


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run", {})
    yield folder
    folder.close()


def written(folder):
    return json.loads((folder.path / "transitions.json").read_text())


def test_each_sink_gets_every_point_in_order_and_is_closed_once():
    sinks = [Told(), Told()]
    recorder = Recorder(sinks)
    points = [a_point(step) for step in (5, 1, 3)]
    for point in points:
        recorder.record(point)
    recorder.close()
    for told in sinks:
        assert told.items == points
        assert told.closed == 1


def test_a_transition_is_told_once_when_it_is_confirmed(folder):
    points, sink = rising_points(), Told()
    recorder = Recorder([sink], folder)
    (known,) = find_transitions(Trajectory(points))
    assert not known.provisional
    confirmed_at = None
    for point in points:
        assert recorder.record(point)
        if confirmed_at is None and any(not t["provisional"] for t in written(folder)):
            confirmed_at = point
    recorder.close()
    assert written(folder) == [known.as_json()]
    assert sink.points == folder.points == points
    (told,) = sink.transitions
    assert not told.provisional
    assert sink.items[sink.items.index(told) - 1] == confirmed_at
    assert abs(told.start - known.start) < 5
    assert abs(told.end - known.end) < 5


def test_a_provisional_transition_is_told_at_the_end():
    points, sink = rising_points()[:22], Told()
    recorder = Recorder([sink])
    for point in points:
        recorder.record(point)
    recorder.close()
    (found,) = find_transitions(Trajectory(points))
    assert found.provisional
    assert sink.items == [*points, found]


@pytest.mark.parametrize(("known", "transitions"), [(35, 0), (22, 1)], ids=["confirmed", "not yet confirmed"])
def test_resuming_tells_earlier_points_again_but_not_earlier_transitions(folder, known, transitions):
    points, sink = rising_points(), Told()
    for point in points[:known]:
        folder.append(point)
    assert any(not t.provisional for t in find_transitions(Trajectory(points[:known]))) is (transitions == 0)
    recorder = Recorder([sink], folder)
    for point in points[known:]:
        recorder.record(point)
    recorder.close()
    assert sink.points == points
    assert len(sink.transitions) == transitions


def test_a_sink_that_asks_for_the_trajectory_gets_it_before_its_first_item(folder):
    class Asking(Told):
        def attach(self, trajectory):
            assert self.items == []
            self.trajectory = trajectory

        def write(self, item):
            super().write((item, self.trajectory().steps.tolist()))

    folder.append(a_point(1))
    asking, plain = Asking(), Told()
    recorder = Recorder([asking, plain], folder)
    recorder.record(a_point(5))
    wait_for(lambda: len(asking.items) == 2)
    recorder.record(a_point(3))
    recorder.close()
    assert [item for item, _ in asking.items] == plain.items == [a_point(1), a_point(5), a_point(3)]
    assert asking.items[-1][1] == [1, 3, 5]
    assert list(recorder.trajectory()) == [a_point(1), a_point(3), a_point(5)]


def test_a_sink_that_raises_at_attach_gets_its_items_all_the_same():
    class Failing(Told):
        def attach(self, trajectory):
            raise OSError("the server is gone")

    failing = Failing()
    with one_warning("The sink Failing failed.*the server is gone"):
        recorder = Recorder([failing])
        recorder.record(a_point(1))
        recorder.close()
    assert failing.items == [a_point(1)]


def test_without_a_folder_points_are_kept_in_memory():
    recorder = Recorder()
    assert recorder.record(a_point(2))
    assert recorder.record(a_point(1))
    recorder.close()
    assert recorder.trajectory().steps.tolist() == [1, 2]


def test_a_point_is_in_the_file_before_a_sink_hears_of_it(folder):
    class Reading(Told):
        def write(self, item):
            super().write([json.loads(line)["step"] for line in lines(folder.path).splitlines()])

    sink = Reading()
    recorder = Recorder([sink], folder)
    recorder.record(a_point(1))
    wait_for(lambda: sink.items)
    recorder.close()
    assert sink.items == [[1]]


@pytest.mark.parametrize("error", [OSError("the server is gone"), SystemExit(3), KeyboardInterrupt(), MemoryError()])
def test_a_sink_that_raises_costs_one_warning_and_nobody_else_anything(error):
    bad, good = Failing(error), Told()
    recorder = Recorder([bad, good])
    points = rising_points()
    with one_warning(f"The sink Failing failed.*{type(error).__name__}"):
        for point in points:
            recorder.record(point)
        recorder.close()
    assert good.points == bad.points == points
    assert len(good.transitions) == len(bad.transitions) == 1
    assert (good.closed, bad.closed) == (1, 1)


def test_a_sink_that_raises_at_close_costs_one_warning():
    bad, good = FailingClose(), Told()
    recorder = Recorder([bad, good])
    recorder.record(a_point(1))
    with one_warning("FailingClose.*the server is gone"):
        recorder.close()
    assert len(good.items) == len(bad.items) == good.closed == 1


def test_a_sink_that_hangs_costs_a_warning_then_and_at_the_end_and_no_time(hanging, monkeypatch):
    monkeypatch.setattr(sink_module, "SLOW_SECONDS", 0.1)
    monkeypatch.setattr(sink_module, "CLOSE_SECONDS", 0.2)
    good = Told()
    recorder = Recorder([hanging, good])
    points = rising_points()
    began = time.perf_counter()
    recorder.record(points[0])
    assert time.perf_counter() - began < 0.1
    time.sleep(0.15)
    with one_warning(r"The sink Hanging has taken more than 0.1 seconds"):
        for point in points[1:]:
            recorder.record(point)
    with one_warning("Hanging has not finished 0.2 seconds after the end and is left behind"):
        recorder.close()
    assert hanging.items == points[:1]
    assert good.points == points
    assert len(good.transitions) == 1
    assert good.closed == 1


def test_a_sink_that_hung_gets_what_it_missed_when_it_goes_on(hanging, monkeypatch):
    monkeypatch.setattr(sink_module, "SLOW_SECONDS", 0.05)
    recorder = Recorder([hanging])
    recorder.record(a_point(1))
    wait_for(lambda: hanging.items)
    time.sleep(0.1)
    with one_warning("has taken more than 0.05 seconds for one item, and others wait for it"):
        recorder.record(a_point(2))
    hanging.release.set()
    recorder.record(a_point(3))
    recorder.close()
    assert [point.step for point in hanging.points] == [1, 2, 3]
    assert hanging.closed == 1


def test_a_sink_says_how_long_the_end_waits_for_it_and_what_to_do_then(hanging):
    hanging.close_seconds, hanging.advice = 0.1, "Send them again."
    recorder = Recorder([hanging])
    recorder.record(a_point(1))
    with one_warning(r"has not finished 0.1 seconds after the end.*go on\. Send them again\."):
        recorder.close()


def test_a_measured_run_is_sent_to_a_sink(hanging):
    points = Trajectory(rising_points())
    told = Told()
    assert send(points, find_transitions(points), told)
    assert told.points == list(points)
    assert len(told.transitions) == told.closed == 1
    hanging.close_seconds = 0.1
    with one_warning("Hanging has not finished"):
        assert not send(points, [], hanging)


def test_close_waits_for_a_slow_sink_but_not_for_one_that_hangs(hanging, monkeypatch):
    monkeypatch.setattr(sink_module, "CLOSE_SECONDS", 2.0)

    class Slow(Told):
        def write(self, item):
            time.sleep(0.05)
            super().write(item)

    slow = Slow()
    recorder = Recorder([slow, hanging])
    for step in range(10):
        recorder.record(a_point(step))
    began = time.perf_counter()
    with one_warning("Hanging"):
        recorder.close()
    assert time.perf_counter() - began < 5
    assert len(slow.items) == 10
    assert slow.closed == 1


@pytest.mark.parametrize("action", ["error", "always"])
def test_warnings_turned_into_errors_interrupt_nothing(action, capsys):
    good = Told()
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        with warnings.catch_warnings(record=action == "always"):
            recorder = Recorder([Failing(ValueError("no")), good])
            for step in range(3):
                recorder.record(a_point(step))
            recorder.close()
    assert len(good.items) == 3
    assert ("phasewatch: The sink Failing" in capsys.readouterr().err) is (action == "error")


def test_a_search_for_transitions_that_fails_does_not_stop_the_points(folder, monkeypatch):
    def fails(_):
        raise RuntimeWarning("invalid value")

    monkeypatch.setattr(record, "find_transitions", fails)
    told = Told()
    with one_warning("Transitions could not be looked for.*invalid value"):
        recorder = Recorder([told], folder)
        recorder.record(a_point(2))
        recorder.close()
    assert written(folder) == []
    assert [point.step for point in told.points] == [2]
    assert told.closed == 1


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), ValueError("I/O operation on closed file")])
def test_a_terminal_that_is_gone_interrupts_nothing(monkeypatch, error):
    class Gone:
        def write(self, _):
            raise error

    monkeypatch.setattr("sys.stderr", Gone())
    say("nobody hears this")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn("nor this")


def test_a_long_run_is_searched_each_time_it_has_grown_by_a_hundredth_and_at_the_end(monkeypatch):
    searched = []
    monkeypatch.setattr(record, "find_transitions", lambda trajectory: searched.append(len(trajectory)) or [])
    recorder = Recorder()
    for step in range(2000):
        recorder.record(a_point(step))
    recorder.close()
    assert searched[:201] == list(range(201))
    assert len(searched) < 201 + 100 * np.log(10) * 1.2
    assert max(np.diff(searched[201:]) / searched[201:-1]) <= 0.01
    assert searched[-1] == 2000


def test_a_point_sorts_no_others(monkeypatch):
    monkeypatch.setattr(record, "find_transitions", lambda trajectory: [])
    made = []
    monkeypatch.setattr(record, "Trajectory", lambda *points: made.append(1) or Trajectory(*points))
    recorder = Recorder()
    for step in range(1000):
        recorder.record(a_point(step))
    before = len(made)
    for _ in range(50):
        recorder.trajectory()
    assert before < 400
    assert len(made) <= before + 1
