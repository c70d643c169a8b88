"""What ends the command line's process, or a live training, and what it leaves."""

import signal
import subprocess
import sys
import textwrap

import pytest
from processes import environment, gone, reads_proc
from tiny_run import a_snapshot, lines

from phasewatch.monitor.snapshots.folder import SnapshotFolder

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
    main = "from phasewatch.cli import main; main()"
    probe = f"{folder / 'a_probe.py'}:probe"
    return started(["-c", main, "replay", folder / "series", "--probe", probe, "--run", folder / "run"], **options)


def wait_for_points(folder, process):
    while not lines(folder / "run"):
        assert process.poll() is None, process.communicate()


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
