"""What a training leaves that ends without `close()`, or is killed while another process measures."""

import json
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path

import pytest
from processes import environment
from tiny_run import a_snapshot, make_model, make_probe, one_warning, wait_for

from phasewatch.callbacks.trainers import measuring, session
from phasewatch.callbacks.trainers.loop import PhaseMonitor
from phasewatch.callbacks.trainers.measuring import Background
from phasewatch.callbacks.trainers.schedule import every
from phasewatch.monitor.runs import processes
from phasewatch.monitor.runs.processes import WorkerDied
from phasewatch.monitor.snapshots.folder import SnapshotFolder
from phasewatch.monitor.trajectories.trajectory import Trajectory


class StuckWorker:
    """A measuring process that never answers."""

    def __init__(self, package, *, nice=0, environment=None, place=0):
        self.place = place
        self._ended = threading.Event()

    def measure_all(self, steps, then=()):
        self._ended.wait()
        raise WorkerDied("the measuring process ended with status -9")

    def kill(self):
        self._ended.set()

    stop = kill


@pytest.fixture
def stuck(monkeypatch):
    monkeypatch.setattr(processes, "Worker", StuckWorker)


@pytest.mark.usefixtures("stuck")
def test_every_snapshot_is_on_disk_within_a_second_while_the_first_is_measured(tmp_path):
    monitor = PhaseMonitor(make_model(), make_probe(), run=tmp_path / "run", at=every(1), measure="background")
    snapshots = SnapshotFolder(tmp_path / "run" / "snapshots")
    for step in range(1, 41):
        assert monitor(step)
    wait_for(lambda: snapshots.steps == tuple(range(1, 41)), seconds=1)
    assert len(monitor.trajectory) == 0
    with one_warning("40 snapshots of .* were not measured: steps 1, 2, .*, 40. replay"):
        monitor.close(measure_rest=False)


def test_snapshots_that_wait_for_the_disk_are_two_at_most():
    class Slow:
        seconds_to_next = None

        def __init__(self):
            self.saved = []
            self.gate = threading.Semaphore(0)

        def take(self, snapshot):
            self.gate.acquire()
            self.saved.append(snapshot.step)

        def measure_next(self):
            return False

    slow = Slow()
    background = Background(slow)
    taken = []

    def training():
        for step in range(1, 6):
            background.take(a_snapshot(step))
            taken.append(step)

    thread = threading.Thread(target=training, daemon=True)
    thread.start()
    wait_for(lambda: len(taken) == 2)
    for done in range(4):
        time.sleep(0.05)
        assert len(taken) - len(slow.saved) <= 2, done
        slow.gate.release()
    slow.gate.release(2)
    thread.join(5)
    background.finish()
    assert slow.saved == [1, 2, 3, 4, 5]


TRAININGS = """
    import json, os, signal, sys, time
    from tiny_run import make_model, make_probe
    from phasewatch.callbacks.trainers.loop import PhaseMonitor
    from phasewatch.callbacks.trainers.schedule import every

    def train(run, measure, end, nap):
        probe = make_probe(metrics={"nap": lambda model, batch: time.sleep(nap) or 0.0})
        monitor = PhaseMonitor(make_model(), probe, run=run, at=every(1), measure=measure)
        for step in range(1, 9):
            monitor(step)
        if end == "raise":
            raise RuntimeError("out of memory")
        if end == "fork" and not (child := os.fork()):
            sys.exit()
        if end == "fork":
            os.waitpid(child, 0)
            assert not os.path.exists(f"{run}/report.html")
            monitor.close()
        if end == "kill":
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)

    for training in json.loads(sys.argv[1]):
        began = time.monotonic()
        if not (child := os.fork()):
            os.dup2(os.open(f"{training[0]}.err", os.O_WRONLY | os.O_CREAT), 2)
            train(*training)
            break
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps([status, time.monotonic() - began]), flush=True)
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Trainings that end in some way, each a process: its folder, its exit status, its seconds, and what it said."""
    folder = tmp_path_factory.mktemp("ended")
    ways = [("inline", "raise", 0), ("background", "forget", 600), ("background", "kill", 600), ("inline", "fork", 0)]
    trainings = [(str(folder / end), measure, end, nap) for measure, end, nap in ways]
    command = [sys.executable, "-c", textwrap.dedent(TRAININGS), json.dumps(trainings)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = zip(trainings, map(json.loads, done.stdout.splitlines()), strict=True)
    return {end: (Path(run), *how, Path(f"{run}.err").read_text()) for (run, _, end, _), how in found}


def test_an_inline_run_that_an_exception_ends_has_its_report(ended):
    run, status, _, said = ended["raise"]
    assert status == 1
    assert "RuntimeError: out of memory" in said
    assert "not measured" not in said
    assert (run / "report.html").exists()
    assert Trajectory.read(run / "points.jsonl").steps.tolist() == list(range(1, 9))


def test_a_background_run_that_is_never_closed_names_what_is_left(ended):
    run, status, seconds, said = ended["forget"]
    assert status == 0
    assert seconds < 60
    assert SnapshotFolder(run / "snapshots").steps == tuple(range(1, 9))
    assert (
        f"8 snapshots of {run} were not measured: steps 1, 2, 3, 4, 5, 6, 7, 8. "
        f"replay('{run}', probe, run='{run}') measures them."
    ) in said


def test_a_killed_background_run_has_every_snapshot(ended):
    run, status, *_ = ended["kill"]
    assert status == -signal.SIGKILL
    assert SnapshotFolder(run / "snapshots").steps == tuple(range(1, 9))


def test_a_process_that_training_forks_finishes_nothing(ended):
    run, status, _, said = ended["fork"]
    assert status == 0, said
    assert (run / "report.html").exists()


@pytest.mark.usefixtures("stuck")
def test_a_disk_that_hangs_does_not_hold_the_end_of_the_process_up(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "EXIT_SECONDS", 0.2)
    gate = threading.Event()
    monitor = PhaseMonitor(make_model(), make_probe(), run=tmp_path / "run", at=every(1), measure="background")
    monitor(1)
    wait_for(lambda: monitor._session.folder.snapshots.steps == (1,))
    monkeypatch.setattr(SnapshotFolder, "save", lambda self, snapshot: gate.wait())
    monitor(2)
    monitor(3)
    began = time.monotonic()
    with one_warning("snapshots of .* were not measured"):
        monitor._session._finish_at_exit()
    assert time.monotonic() - began < 5
    gate.set()


@pytest.mark.usefixtures("stuck")
def test_a_disk_that_hangs_costs_snapshots_and_neither_training_nor_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "DISK_SECONDS", 0.2)
    monkeypatch.setattr(session, "DISK_SECONDS", 0.2)
    gate = threading.Event()
    monkeypatch.setattr(SnapshotFolder, "save", lambda self, snapshot: gate.wait())
    monitor = PhaseMonitor(make_model(), make_probe(), run=tmp_path / "run", at=every(1), measure="background")
    began = time.monotonic()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in range(1, 6):
            monitor(step)
        monitor.close()
    assert time.monotonic() - began < 20
    messages = [str(warning.message) for warning in told]
    assert any("more than 0.2 seconds for one file; a snapshot is left out" in message for message in messages)
    assert "what waits for it is left to a resumed run or a replay" in messages[-1]
    gate.set()
