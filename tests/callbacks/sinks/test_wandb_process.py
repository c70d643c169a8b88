"""A run of the sink's own in a process of its own, where the program hasn't imported W&B."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import alive, environment, gone, reads_proc
from wandb_records import records, rows

from phasewatch.callbacks.sinks import wandb_process, wandb_run
from phasewatch.monitor.trajectories.trajectory import Point, Trajectory

pytest.importorskip("wandb")

HEAD = """
import sys
import wandb_items as t
from phasewatch.callbacks.sinks.wandb import WandbSink
from phasewatch.monitor.runs.record import Recorder
from phasewatch.monitor.trajectories.trajectory import Trajectory
"""

WRITES = """
import warnings
sink = WandbSink(own_run=True, name="mine")
before = [t.a_point(1, accuracy=0.5)]
sink.attach(lambda: Trajectory([*before, t.a_point(2)]))
sink.describe({"seed": 3})
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    sink.write(t.a_point(2))
print(len(caught), str(caught[0].message))
sink.write(t.a_transition(1, 2))
process = sink._apart._process
sink.close()
print("wandb" in sys.modules, process.returncode is None, process.stdin.closed, process.stdout.closed)
"""

LATE = """
import atexit
recorder = Recorder([WandbSink(own_run=True, close_seconds=60)])
atexit.register(lambda: (recorder.record(t.a_point(2)), recorder.close()))  # as a run that nobody closes
recorder.record(t.a_point(1))
"""

REFUSED = """
sink = WandbSink(own_run=True, name="mine", mode="online")
try:
    sink.write(t.a_point(1))
except Exception as error:
    print(type(error).__name__, str(error)[:300])
sink._apart._process.kill()
try:
    sink.write(t.a_point(2))
except Exception as error:
    print(type(error).__name__, error)
"""

HANGS = """
import os, socket, threading, time
listener = socket.create_server(("127.0.0.1", 0))
held = []
threading.Thread(target=lambda: [held.append(listener.accept()) for _ in range(1000)], daemon=True).start()
os.environ["WANDB_BASE_URL"] = "http://127.0.0.1:%d" % listener.getsockname()[1]
sink = WandbSink(own_run=True, project="p", mode="online", close_seconds=1.0)
recorder = Recorder([sink])
for step in range(3):
    recorder.record(t.a_point(step))
while not held:
    time.sleep(0.05)
print(sink._apart._process.pid, flush=True)
if "waits" in sys.argv:
    time.sleep(100)
recorder.close()
"""


def start(script: str, folder: Path, *arguments: str, **changes: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", HEAD + script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment(WANDB_SILENT="true", NETRC=str(folder / "netrc"), **changes),
    )


def children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and alive(entry.name):
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            if int(fields[1]) == parent:
                found.append(int(entry.name))
    return found


def test_what_is_written_arrives_and_warnings_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    out, err = start(WRITES, tmp_path).communicate(timeout=120)
    first, last = out.strip().splitlines()
    assert first.startswith("1 WandbSink() found no W&B API key, so its run is offline"), err
    assert last == "False False True True"
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    written = records(folder)
    assert [row["phase/step"] for row in rows(written) if "phase/llc" in row] == [2]
    (table,) = (row for row in rows(written) if "phase/transitions._type" in row)
    assert table["phase/step"] == 2
    assert any("seed" in str(record["config"]) for record in written if record["type"] == "config")
    (begun,) = (record["run"] for record in written if record["type"] == "run")
    assert begun["display_name"] == "mine"


def test_what_a_run_writes_as_the_process_ends_arrives_too(tmp_path: Path) -> None:
    _, err = start(LATE, tmp_path, WANDB_MODE="offline").communicate(timeout=120)
    assert not err, err
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert [row["phase/step"] for row in rows(records(folder)) if "phase/llc" in row] == [1, 2]


def test_what_fails_there_comes_out_here(tmp_path: Path) -> None:
    out, err = start(REFUSED, tmp_path, WANDB_API_KEY="too short").communicate(timeout=120)
    refused, ended = out.strip().splitlines()
    assert refused.startswith("PhasewatchError "), err
    assert "API key" in refused
    assert ended == "PhasewatchError The process that sends to W&B has ended."


def test_pictures_are_drawn_of_the_points_that_were_there_too() -> None:
    given: list[Callable[[], Trajectory]] = []
    sink = SimpleNamespace(attach=given.append, write=lambda item: None)
    points = Trajectory.from_values([1, 2], loss=[2.0, 1.0], llc=[3.0, 4.0])
    known: dict[int, Point] = {}
    for asked in ({"points": [points[0].as_json()]}, {"point": points[1].as_json()}, {"point": points[1].as_json()}):
        assert wandb_process._do(asked, sink, known) is sink
    assert [point.as_json() for point in given[0]()] == [point.as_json() for point in points]


@reads_proc
@pytest.mark.parametrize("how", ["ends", "is killed"])
def test_it_and_wandbs_service_end_with_the_training(tmp_path: Path, how: str) -> None:
    waits = [] if how == "ends" else ["waits"]
    run = start(HANGS, tmp_path, *waits, WANDB_API_KEY="0" * 40)
    assert run.stdout
    pid = int(run.stdout.readline())
    limit = time.monotonic() + 60
    while how != "ends" and not children(pid):
        assert time.monotonic() < limit
        time.sleep(0.05)
    theirs = [pid, *children(pid)]
    if how == "is killed":
        run.kill()
    _, err = run.communicate(timeout=60)
    if how == "ends":
        assert "The sink WandbSink has not finished 1 seconds after the end and is left behind" in err
        assert "`phasewatch replay RUN --wandb` sends them" in err
        assert run.returncode == 0
    assert gone(theirs, 10)


@pytest.mark.parametrize(("seconds", "code"), [(0.2, 7), (100, -9)], ids=["writes what it holds", "hangs"])
def test_a_service_is_only_killed_where_it_does_not_end(monkeypatch, seconds, code):
    """W&B has a finished run on disk only after `finish`, in its service."""
    script = f"import sys, time; time.sleep({seconds}); sys.exit(7)"
    process = subprocess.Popen([sys.executable, "-c", script])
    connection = SimpleNamespace(_proc=SimpleNamespace(_process=process))
    connection.teardown = lambda _: connection._proc.join()
    monkeypatch.setitem(
        sys.modules, "wandb.sdk.wandb_setup", SimpleNamespace(_singleton=SimpleNamespace(_connection=connection))
    )
    monkeypatch.setattr(wandb_run, "SERVICE_SECONDS", 20.0 if seconds < 1 else 0.2)
    wandb_run.end_service()
    assert process.wait(10) == code
