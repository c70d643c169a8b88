import threading
import time
import warnings

import pytest
from tiny_run import Told, a_point, one_warning, rising_points

from phasewatch.monitor.errors import say, warn
from phasewatch.monitor.runs import publish
from phasewatch.monitor.runs.publish import Publisher
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


def test_each_sink_gets_every_point_in_order_and_is_closed_once():
    sinks = [Told(), Told()]
    publisher = Publisher(sinks)
    points = [a_point(step) for step in (5, 1, 3)]
    for point in points:
        publisher.publish(point)
    publisher.close()
    for sink in sinks:
        assert sink.items == points
        assert sink.closed == 1


def test_a_transition_is_told_once_when_it_is_confirmed():
    points, sink = rising_points(), Told()
    publisher = Publisher([sink])
    (known,) = find_transitions(Trajectory(points))
    assert not known.provisional
    confirmed_at = None
    for point in points:
        found = publisher.publish(point)
        if confirmed_at is None and any(not t.provisional for t in found):
            confirmed_at = point
    assert publisher.close() == [known]
    assert sink.points == points
    (told,) = sink.transitions
    assert not told.provisional
    assert sink.items[sink.items.index(told) - 1] == confirmed_at
    assert abs(told.start - known.start) < 5
    assert abs(told.end - known.end) < 5


def test_a_provisional_transition_is_told_at_the_end():
    points, sink = rising_points()[:22], Told()
    publisher = Publisher([sink])
    for point in points:
        publisher.publish(point)
    found = publisher.close()
    assert [t.provisional for t in found] == [True]
    assert sink.items == [*points, *found]


def test_resuming_tells_earlier_points_again_but_not_earlier_transitions():
    points, sink = rising_points(), Told()
    assert any(not t.provisional for t in find_transitions(Trajectory(points[:35])))
    publisher = Publisher([sink], known=points[:35])
    for point in points[35:]:
        publisher.publish(point)
    publisher.close()
    assert sink.items == points


def test_resuming_tells_of_a_transition_that_was_not_confirmed_yet():
    points, sink = rising_points(), Told()
    publisher = Publisher([sink], known=points[:22])
    for point in points[22:]:
        publisher.publish(point)
    publisher.close()
    assert sink.points == points
    assert len(sink.transitions) == 1


@pytest.mark.parametrize("error", [OSError("the server is gone"), SystemExit(3), KeyboardInterrupt(), MemoryError()])
def test_a_sink_that_raises_costs_one_warning_and_nobody_else_anything(error):
    bad, good = Failing(error), Told()
    publisher = Publisher([bad, good])
    points = rising_points()
    with one_warning(f"The sink Failing failed.*{type(error).__name__}"):
        for point in points:
            publisher.publish(point)
        publisher.close()
    assert good.points == bad.points == points
    assert len(good.transitions) == len(bad.transitions) == 1
    assert (good.closed, bad.closed) == (1, 1)


def test_a_sink_that_raises_at_close_costs_one_warning():
    bad, good = FailingClose(), Told()
    publisher = Publisher([bad, good])
    publisher.publish(a_point(1))
    with one_warning("FailingClose.*the server is gone"):
        publisher.close()
    assert len(good.items) == len(bad.items) == good.closed == 1


def test_a_sink_that_hangs_costs_one_warning_and_no_time(hanging):
    good = Told()
    publisher = Publisher([hanging, good], timeout=0.1)
    points = rising_points()
    began = time.perf_counter()
    publisher.publish(points[0])
    assert time.perf_counter() - began < 0.1
    time.sleep(0.15)
    with one_warning(r"The sink Hanging has taken more than 0.1 seconds"):
        for point in points[1:]:
            publisher.publish(point)
        publisher.close()
    assert hanging.items == points[:1]
    assert good.points == points
    assert len(good.transitions) == 1
    assert good.closed == 1


def test_close_waits_for_a_slow_sink_but_not_for_one_that_hangs(hanging):
    class Slow(Told):
        def write(self, item):
            time.sleep(0.05)
            super().write(item)

    slow = Slow()
    publisher = Publisher([slow, hanging], timeout=0.3)
    for step in range(10):
        publisher.publish(a_point(step))
    began = time.perf_counter()
    with one_warning("Hanging"):
        publisher.close()
    assert time.perf_counter() - began < 3
    assert len(slow.items) == 10
    assert slow.closed == 1


@pytest.mark.parametrize("action", ["error", "always"])
def test_warnings_turned_into_errors_interrupt_nothing(action, capsys):
    good = Told()
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        with warnings.catch_warnings(record=action == "always"):
            publisher = Publisher([Failing(ValueError("no")), good])
            for step in range(3):
                publisher.publish(a_point(step))
            publisher.close()
    assert len(good.items) == 3
    assert ("phasewatch: The sink Failing" in capsys.readouterr().err) is (action == "error")


def test_a_search_for_transitions_that_fails_does_not_stop_the_points(monkeypatch):
    def fails(_):
        raise RuntimeWarning("invalid value")

    monkeypatch.setattr(publish, "find_transitions", fails)
    sink = Told()
    with one_warning("Transitions could not be looked for.*invalid value"):
        publisher = Publisher([sink], known=[a_point(1)])
        assert publisher.publish(a_point(2)) == []
        publisher.close()
    assert [point.step for point in sink.points] == [1, 2]
    assert sink.closed == 1


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
