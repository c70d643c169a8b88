import pytest
from made_points import a_point
from tiny_run import a_snapshot

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.runs.executor import InProcess
from phasewatch.monitor.snapshots.folder import SnapshotFolder


class Probe:
    """Measures three snapshots at once, and fails on those of some steps."""

    together = 3

    def __init__(self, *failing):
        self.failing = failing
        self.calls = []

    def measure(self, snapshots):
        steps = [snapshot.step for snapshot in snapshots]
        self.calls.append(steps)
        if set(steps) & set(self.failing):
            raise RuntimeError("out of memory")
        return [a_point(step) for step in steps]

    def __call__(self, snapshot):
        return self.measure([snapshot])[0]


@pytest.fixture
def folder(tmp_path):
    folder = SnapshotFolder(tmp_path)
    for step in range(1, 8):
        folder.save(a_snapshot(step))
    return folder


def test_snapshots_are_measured_in_order_as_many_at_once_as_the_probe_takes(folder):
    probe = Probe()
    assert list(InProcess(probe, folder).measure(folder.steps)) == [(step, a_point(step)) for step in range(1, 8)]
    assert probe.calls == [[1, 2, 3], [4, 5, 6], [7]]


def test_a_group_that_fails_is_measured_one_by_one(folder):
    probe = Probe(5)
    results = dict(InProcess(probe, folder).measure(folder.steps))
    assert probe.calls == [[1, 2, 3], [4, 5, 6], [4], [5], [6], [7]]
    assert isinstance(results.pop(5), RuntimeError)
    assert results == {step: a_point(step) for step in (1, 2, 3, 4, 6, 7)}


def test_a_snapshot_that_cannot_be_read_costs_its_own_result(folder):
    folder.source(2).write_bytes(b"damaged")
    results = dict(InProcess(Probe(), folder).measure(iter([1, 2, 3])))
    assert isinstance(results[2], PhasewatchError)
    assert (results[1], results[3]) == (a_point(1), a_point(3))


def test_results_come_one_by_one_and_an_interruption_passes(folder):
    probe = Probe()
    probe.together = 1
    results = InProcess(probe, folder).measure([1, 2])
    assert next(results) == (1, a_point(1))
    assert probe.calls == [[1]]

    def interrupted(snapshots):
        raise KeyboardInterrupt

    probe.measure = interrupted
    with pytest.raises(KeyboardInterrupt):
        next(results)
