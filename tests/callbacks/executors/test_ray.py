"""Workers on a real Ray of one machine, each test by the command line, since a process has one session of Ray."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import ray_head as heads
from filelock import FileLock
from processes import alive, environment
from ray_head import ray_head
from tiny_run import a_snapshot, make_probe, wait_for

import phasewatch as pw
from phasewatch.callbacks.executors.ray import Ray
from phasewatch.monitor.runs.executor import Order

pytestmark = pytest.mark.ray

PROBE = """
import time
from tiny_run import make_probe

def naps(model, batch):
    time.sleep(0.3)
    return 1.0

probe = make_probe(metrics={"naps": naps})
"""


@pytest.fixture
def head(tmp_path):
    """Ray gives the servers of its clients fixed ports, so there is one head at a time on a machine."""
    if reason := heads.missing():
        pytest.skip(reason)
    with FileLock(Path(tempfile.gettempdir()) / "phasewatch-tests-ray.lock"):
        yield lambda **changes: ray_head(tmp_path / "head", **changes)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    snapshots = pw.SnapshotFolder(tmp_path / "checkpoints")
    for step in range(10, 130, 10):
        snapshots.save(a_snapshot(step, seed=step))
    return tmp_path


def replay(folder, run, env, *options):
    command = ["replay", "checkpoints", "--probe", "probe.py:probe", "--run", run, *options]
    return subprocess.Popen(
        [sys.executable, "-m", "phasewatch.cli", *command],
        env=env,
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def points(run):
    file = run / "points.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return sorted(lines, key=lambda line: json.loads(line)["step"])


def workers_in(run, replay):
    pids = [int(file.stem.split("-")[-2]) for file in (Path(run) / "work/members").glob("*.jsonl")]
    return [pid for pid in pids if pid != replay.pid and alive(pid)]


def test_killed_actors_and_a_killed_replay_lose_nothing(folder, head):
    run = folder / "run"
    with head() as (env, address):
        with replay(folder, "run", env, "--on", address, "--workers", "2", "--ray", "num_cpus=1") as first:
            wait_for(lambda: points(run) or first.poll() is not None, 120)
            assert first.poll() is None, first.stderr.read()
            os.kill(workers_in(run, first)[0], signal.SIGKILL)
            wait_for(lambda: len(points(run)) > 3, 60)
            first.kill()
        with replay(folder, "run", env, "--on", address, "--workers", "2") as second:
            _, err = second.communicate(timeout=120)
            assert second.returncode == 0, err
    series = pw.SnapshotFolder(folder / "checkpoints")
    alone = pw.replay(series, make_probe(metrics={"naps": lambda model, batch: 1.0}))
    assert list(map(json.loads, points(run))) == [point.as_json() for point in alone]


@pytest.mark.parametrize("failures", [1, 2])
def test_a_session_that_is_aborted_at_its_start_is_tried_twice(folder, monkeypatch, failures):
    ray = pytest.importorskip("ray")
    asked = []

    def init(address, **options):
        asked.append(address)
        if len(asked) <= failures:
            raise ConnectionAbortedError("Initialization failure from server")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "put", len)
    snapshots = pw.SnapshotFolder(folder / "checkpoints")
    workers = Ray(Order(make_probe(), snapshots, folder / "run", "ray://head:1", 1, {}))
    if failures == 1:
        workers.start(0)
    else:
        with pytest.raises(pw.PhasewatchError, match="Initialization failure from server"):
            workers.start(0)
    assert asked == ["ray://head:1"] * 2


@pytest.mark.slow
def test_a_cluster_that_isnt_there_is_a_sentence(folder):
    pytest.importorskip("ray")
    with replay(folder, "run", environment(), "--on", "ray://127.0.0.1:1") as process:
        _, err = process.communicate(timeout=200)
    assert process.returncode == 2
    assert "phasewatch: replay(on='ray://127.0.0.1:1') can't reach the cluster" in err
    assert "Traceback (most recent call last):\n" not in err


@pytest.mark.slow
def test_a_head_that_asks_for_a_token_names_the_token(folder, head):
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "secret" * 8}
    with head(**token) as (env, address):
        with replay(folder, "run", {**env, "RAY_AUTH_MODE": "disabled"}, "--on", address) as process:
            _, err = process.communicate(timeout=200)
        assert process.returncode == 2
        assert "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" in err
        with replay(folder, "run", env, "--on", address) as process:
            _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        assert "secret" not in err
