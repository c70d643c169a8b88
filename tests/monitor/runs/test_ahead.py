"""Snapshots that are read while others are measured."""

import threading

import pytest
from tiny_run import a_snapshot, make_probe, wait_for

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.runs import ahead
from phasewatch.monitor.runs.ahead import Ahead
from phasewatch.monitor.runs.executor import InProcess
from phasewatch.monitor.snapshots.snapshot import same_weights


class Slow:
    """A series that notes what is read, in which thread, and reads only when it is let."""

    def __init__(self):
        self.read, self.threads = [], []
        self.may = threading.Event()
        self.may.set()

    def load(self, step):
        self.may.wait(10)
        self.read.append(step)
        self.threads.append(threading.current_thread())
        if step == 13:
            raise PhasewatchError("damaged")
        return a_snapshot(step, seed=step)


def test_what_is_expected_is_read_once_and_beside_the_caller():
    series = Slow()
    snapshots = Ahead(series)
    assert snapshots.load(1).step == 1
    snapshots.expect([2, 3])
    wait_for(lambda: series.read == [1, 2, 3])
    assert same_weights(snapshots.load(2), a_snapshot(2, seed=2))
    snapshots.expect([3, 4])
    assert snapshots.load(3).step == 3
    assert snapshots.load(4).step == 4
    assert snapshots.load(5).step == 5
    assert series.read == [1, 2, 3, 4, 5]
    here = threading.current_thread()
    assert [thread is here for thread in series.threads] == [True, False, False, False, True]


def test_what_cant_be_read_ahead_fails_when_it_is_asked_for():
    snapshots = Ahead(Slow())
    snapshots.load(1)
    snapshots.expect([13, 14])
    with pytest.raises(PhasewatchError, match="damaged"):
        snapshots.load(13)
    assert snapshots.load(14).step == 14


@pytest.mark.parametrize(("free", "read"), [(31, [1]), (32, [1, 2]), (63, [1, 2]), (64, [1, 2, 3]), (None, [1, 2, 3])])
def test_no_more_is_read_ahead_than_half_of_the_free_memory_holds(monkeypatch, free, read):
    series = Slow()
    snapshots = Ahead(series)
    size = sum(tensor.nbytes for tensor in snapshots.load(1).tensors.values())
    assert size == 16
    monkeypatch.setattr(ahead, "_free_memory", lambda: free)
    snapshots.expect([2, 3])
    threads = [thread for thread in threading.enumerate() if thread.name == "phasewatch-ahead"]
    for thread in threads:
        thread.join(5)
    assert series.read == read


def test_the_next_snapshot_is_read_while_one_is_measured():
    series, probe = Slow(), make_probe()
    seen = []

    class Watched:
        together = 1

        def __call__(self, snapshot):
            if snapshot.step < 3:
                wait_for(lambda: snapshot.step + 1 in series.read)
            seen.append((snapshot.step, list(series.read)))
            return probe(snapshot)

    points = dict(InProcess(Watched(), series).measure([1, 2], then=[3]))
    assert seen == [(1, [1, 2]), (2, [1, 2, 3])]
    assert points == {step: probe(a_snapshot(step, seed=step)) for step in (1, 2)}
