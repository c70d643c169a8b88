"""Workers on a real Ray of one machine, each test by the command line, since a process has one session of Ray."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ray_head as heads
from processes import alive
from ray_head import ray_head
from tiny_run import a_snapshot, wait_for

import phasewatch as pw

pytestmark = pytest.mark.ray

PROBE = """
import time
from tiny_run import make_probe

def naps(model, batch):
    time.sleep(0.3)
    return 1.0

probe = make_probe(metrics={"naps": naps})
"""


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    if reason := heads.missing():
        pytest.skip(reason)
    with ray_head(tmp_path_factory.mktemp("ray") / "head") as found:
        yield found


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
    return sorted(file.read_text().splitlines()) if file.exists() else []


def workers_in(run, replay):
    pids = [int(file.stem.split("-")[-2]) for file in (Path(run) / "work/members").glob("*.jsonl")]
    return [pid for pid in pids if pid != replay.pid and alive(pid)]


def test_killed_actors_and_a_killed_replay_lose_nothing(folder, head):
    env, address = head
    alone = replay(folder, "alone", env)
    assert alone.wait(120) == 0, alone.stderr.read()
    run = folder / "run"
    with replay(folder, "run", env, "--on", address, "--workers", "2", "--ray", "num_cpus=1") as first:
        wait_for(lambda: points(run), 90)
        os.kill(workers_in(run, first)[0], signal.SIGKILL)
        wait_for(lambda: len(points(run)) > 3, 60)
        first.kill()
    with replay(folder, "run", env, "--on", address, "--workers", "2") as second:
        _, err = second.communicate(timeout=120)
        assert second.returncode == 0, err
    assert points(run) == points(folder / "alone")
    steps = [json.loads(line)["step"] for line in points(run)]
    assert sorted(steps) == list(range(10, 130, 10))


def test_a_cluster_that_isnt_there_is_a_sentence(folder, head):
    env, _ = head
    env = {**env, "RAY_CLIENT_CONNECT_TIMEOUT": "1"}
    with replay(folder, "run", env, "--on", "ray://127.0.0.1:1") as process:
        _, err = process.communicate(timeout=200)
    assert process.returncode == 2
    assert "phasewatch: replay(on='ray://127.0.0.1:1') can't reach the cluster" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_head_that_asks_for_a_token_names_the_token(folder, head, tmp_path):
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "secret" * 8}
    with ray_head(tmp_path / "guarded", **token) as (env, address):
        without = {**env, "RAY_AUTH_MODE": "disabled"}
        without.pop("RAY_AUTH_TOKEN")
        with replay(folder, "run", without, "--on", address) as process:
            _, err = process.communicate(timeout=200)
        assert process.returncode == 2
        assert "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" in err
        assert "Traceback" not in err
        with replay(folder, "run", env, "--on", address) as process:
            _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        assert "secret" not in err
