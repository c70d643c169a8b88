"""What ends the command line's process, or a live training, and what it leaves."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from processes import environment, gone, of_session, reads_proc
from tiny_run import a_snapshot, lines

from phasewatch.monitor.snapshots.folder import SnapshotFolder
from phasewatch.monitor.trajectories.trajectory import Trajectory

MAIN = "from phasewatch.cli import main; main()"
PROBE = "from tiny_run import make_probe\nprobe = make_probe()\n"

LIVE = """
    import sys, time
    from tiny_run import *
    model = make_model()
    loader = torch.utils.data.DataLoader(range(10**6), num_workers=1)
    with PhaseMonitor(model, make_probe(), run=sys.argv[1], at=every(1), measure=sys.argv[2]) as monitor:
        for step, _ in enumerate(loader, 1):
            monitor(step)
            if len(monitor.trajectory) > 2:
                print("READY", flush=True)
            time.sleep(0.05)
"""


def started(arguments, *, ignored=()):
    def prepare():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=prepare,
        start_new_session=True,
    )


@pytest.fixture
def series(tmp_path):
    (tmp_path / "a_probe.py").write_text(PROBE)
    folder = SnapshotFolder(tmp_path / "series")
    for step in range(1, 400):
        folder.save(a_snapshot(step))
    return tmp_path


def replaying(folder, **options):
    probe = f"{folder / 'a_probe.py'}:probe"
    return started(["-c", MAIN, "replay", folder / "series", "--probe", probe, "--run", folder / "run"], **options)


def wait_for_points(folder, process):
    while not lines(folder / "run"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize(
    "name", ["SIGTERM", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGHUP", "SIGINT"))]
)
def test_a_replay_ends_with_a_sentence_and_goes_on_from_there(series, name):
    process = replaying(series)
    wait_for_points(series, process)
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"phasewatch: ended by {name}. What is measured is kept; the same command goes on from there" in err
    assert "Traceback" not in err
    before = lines(series / "run")
    again = replaying(series)
    while len(lines(series / "run")) <= len(before):
        assert again.poll() is None, again.communicate()
        time.sleep(0.01)
    again.kill()
    again.communicate()
    assert lines(series / "run").startswith(before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_a_signal_that_is_ignored_stays_ignored(series, name):
    process = replaying(series, ignored={getattr(signal, name)})
    wait_for_points(series, process)
    process.send_signal(getattr(signal, name))
    process.communicate(timeout=200)
    assert process.returncode == 0
    assert len(lines(series / "run").splitlines()) == 399


@reads_proc
@pytest.mark.parametrize(
    ("measure", "name"),
    [
        ("background", "SIGINT"),
        *(
            pytest.param(m, n, marks=pytest.mark.slow)
            for m in ("inline", "background")
            for n in ("SIGINT", "SIGTERM", "SIGHUP")
        ),
    ],
)
def test_a_training_ends_whole_and_leaves_no_process(tmp_path, measure, name):
    process = started(["-c", textwrap.dedent(LIVE), tmp_path / "run", measure])
    assert process.stdout.readline() == "READY\n"
    children = subprocess.run(["ps", "-o", "pid=", "-s", str(process.pid)], capture_output=True, text=True, check=True)
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=60)
    assert process.returncode == -getattr(signal, name)
    assert ("phasewatch: stopped; what" in err) is (name == "SIGINT")
    assert gone([int(pid) for pid in children.stdout.split()], 10)
    content = (tmp_path / "run" / "points.jsonl").read_bytes()
    assert content == lines(tmp_path / "run") != b""


SAYS_SO = "phasewatch: ended by SIGTERM. What is measured is kept"

BLOCKS = {
    "an import is not interrupted": (
        """
        sys.path.insert(0, sys.argv[1])
        import interrupted_module
        time.sleep(60)
        """,
        "whole\n",
    ),
    "what is swallowed comes again": (
        """
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except KeyboardInterrupt:
            print("swallowed", flush=True)
        time.sleep(60)
        """,
        "swallowed\n",
    ),
    "tidying up is not interrupted": (
        """
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            time.sleep(0.5)
            print("tidy", flush=True)
        """,
        "tidy\n",
    ),
}

ENDED = """
import os, signal, sys, time
from phasewatch.monitor.runs.signals import ended_by_signals
try:
    with ended_by_signals():
{block}
except KeyboardInterrupt:
    print("ended", flush=True)
"""


@pytest.mark.parametrize("name", BLOCKS)
def test_an_interrupt_comes_once_and_where_it_can_be_taken(tmp_path, name):
    block, said = BLOCKS[name]
    (tmp_path / "interrupted_module.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(0.2)\nprint('whole', flush=True)\n"
    )
    block = textwrap.indent(textwrap.dedent(block), " " * 8)
    process = started(["-c", ENDED.format(block=block), tmp_path])
    out, err = process.communicate(timeout=60)
    assert (out, process.returncode) == (f"{said}ended\n", 0)
    assert SAYS_SO in err
    assert "Traceback" not in err


HANGS = """
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            time.sleep(60)
"""
IMPORTS = """
        sys.path.insert(0, sys.argv[1])
        import hanging_module
"""


@pytest.mark.parametrize("block", [HANGS, IMPORTS], ids=["hangs", "imports"])
def test_a_process_that_cannot_tidy_up_ends_as_it_is(tmp_path, block):
    (tmp_path / "hanging_module.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(60)\n"
    )
    process = started(["-c", ENDED.format(block=block), tmp_path])
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert SAYS_SO in err


COMMANDS = {
    "replay": ["replay", "series", "--probe", "a_probe.py:probe", "--run", "run", "--workers", "2"],
    "calibrate": ["calibrate", "series", "--probe", "a_probe.py:probe", "--budget", "1000000"],
    "report": ["report", "long"],
    "transitions": ["transitions", "long/points.csv", "--plot", "long/picture.pdf"],
}


@pytest.fixture(scope="module")
def at_hand(tmp_path_factory):
    """A folder with what the commands work on, long enough that they are caught at it."""
    at, count = tmp_path_factory.mktemp("signals"), 60_000
    (at / "a_probe.py").write_text(PROBE)
    folder = SnapshotFolder(at / "series")
    for step in range(1, 400):
        folder.save(a_snapshot(step))
    (at / "long").mkdir()
    curve = np.linspace(0, 50, count) + np.random.default_rng(0).normal(size=count)
    trajectory = Trajectory.from_values(range(1, count + 1), loss=3 - curve / 100, llc=curve)
    trajectory.write(at / "long" / "points.jsonl")
    trajectory.write(at / "long" / "points.csv")
    return at


def catches(process, number):
    """Whether a process has a handler of its own for a signal."""
    caught = Path(f"/proc/{process.pid}/status").read_text().partition("SigCgt:")[2].split()[0]
    return bool(int(caught, 16) >> (number - 1) & 1)


@reads_proc
@pytest.mark.slow
@pytest.mark.parametrize("to", ["process", "group"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_ends_with_a_sentence_at_any_moment(at_hand, monkeypatch, command, name, to):
    """SIGNALS=10 tries as many moments of each."""
    monkeypatch.chdir(at_hand)
    number, moment = getattr(signal, name), random.Random(f"{command} {name} {to}")
    there = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file() and path.parts[0] != "run"}
    for _ in range(int(os.environ.get("SIGNALS", "1"))):
        before = lines("run") if command == "replay" and Path("run").exists() else b""
        process = started(["-c", MAIN, *COMMANDS[command]])
        while not catches(process, signal.SIGHUP):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        time.sleep(moment.uniform(0, 2))
        os.killpg(process.pid, number) if to == "group" else process.send_signal(number)
        began = time.monotonic()
        _, err = process.communicate(timeout=60)
        print(f"{command}: ended {time.monotonic() - began:.1f} s after {name} to the {to}")
        assert process.returncode == 130, err
        assert f"phasewatch: ended by {name}. What is measured is kept; the same command goes on from there" in err
        assert "Traceback" not in err
        assert gone(of_session(process.pid), 10)
        if Path("run/points.jsonl").exists():
            assert Path("run/points.jsonl").read_bytes() == lines("run")
            assert lines("run").startswith(before)
        now = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file() and path.parts[0] != "run"}
        assert now == there
