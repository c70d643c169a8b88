"""Workers on SLURM: with stand-ins for its commands, and on a real one of one node."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm_node
from processes import alive, environment, gone
from slurm_node import slurm
from tiny_run import a_snapshot, make_probe, wait_for

import phasewatch as pw
from phasewatch.callbacks.executors import slurm as slurm_module
from phasewatch.callbacks.executors.slurm import Slurm
from phasewatch.monitor.runs.executor import Order

pytest.importorskip("submitit")


@pytest.fixture
def series(tmp_path):
    folder = pw.SnapshotFolder(tmp_path / "snapshots")
    for step in range(10, 130, 10):
        folder.save(a_snapshot(step, seed=step))
    return folder


# Stand-ins for the commands


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """A folder of commands; sbatch keeps what it is given, and squeue says what `queue` holds."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def command(name, script):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    command("srun", "")
    command("sbatch", f'cat "$1" >> {folder}/submitted; echo Submitted batch job 7')
    command("squeue", f'echo "$@" > {folder}/asked; cat {folder}/queue')
    command("scancel", f'echo "$@" > {folder}/cancelled')
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return folder


def order(tmp_path, series, **options):
    return Order(make_probe(), series, tmp_path / "run", "slurm", 4, options)


def test_the_elements_of_an_array_are_workers_and_options_reach_sbatch(tmp_path, series, commands):
    launcher = Slurm(order(tmp_path, series, partition="gpu", gpus_per_node=1, reservation="ours", time=90))
    launcher.start(4)
    script = (commands / "submitted").read_text()
    for line in (
        "--array=0-3%4",
        "--partition=gpu",
        "--gpus-per-node=1",
        "--reservation=ours",
        "--time=90",
        f"--job-name={launcher._name}",
    ):
        assert f"#SBATCH {line}\n" in script
    folder = launcher._folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert folder.parent == tmp_path / "home/.cache/phasewatch"
    assert not (tmp_path / "run").exists()
    assert max(file.stat().st_size for file in folder.glob("*_submitted.pkl")) < 1000  # the probe is sent once


def test_without_a_time_the_partition_decides_and_not_the_five_minutes_of_submitit(tmp_path, series, commands):
    Slurm(order(tmp_path, series)).start(2)
    assert "--time" not in (commands / "submitted").read_text()


def test_more_workers_than_an_array_takes_are_several_arrays(tmp_path, series, commands, monkeypatch):
    monkeypatch.setattr(slurm_module, "MOST_ELEMENTS", 3)
    Slurm(order(tmp_path, series)).start(7)
    script = (commands / "submitted").read_text()
    assert script.count("#SBATCH --array=0-2%3\n") == 2
    assert script.count("#!/bin/bash") == 3


def test_workers_are_counted_by_the_queue_and_not_by_accounting(tmp_path, series, commands):
    launcher = Slurm(order(tmp_path, series))
    (commands / "queue").write_text("PD\n R\nCG\nCF\n")
    assert launcher.count() == 3
    asked = (commands / "asked").read_text()
    assert "--array" in asked
    assert f"--name={launcher._name}" in asked
    (commands / "queue").unlink()
    assert launcher.count() is None  # as while the controller restarts
    launcher.stop()
    assert f"--name={launcher._name}" in (commands / "cancelled").read_text()


def test_what_slurm_refuses_is_a_sentence(tmp_path, series, commands):
    (commands / "sbatch").write_text("#!/bin/sh\necho sbatch: error: invalid partition specified: gup >&2; exit 1\n")
    with pytest.raises(pw.PhasewatchError, match=r"SLURM takes no workers: .*invalid partition specified: gup"):
        Slurm(order(tmp_path, series, partition="gup")).start(1)


def test_without_slurm_it_says_so(tmp_path, series, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(pw.PhasewatchError, match=r"replay\(on='slurm'\) finds no srun here"):
        pw.replay(series, make_probe(), run=tmp_path / "run", on="slurm", workers=2)


def test_what_workers_unpickle_lies_where_nobody_else_can_write(tmp_path, series, commands):
    (tmp_path / "run").mkdir()
    with pytest.raises(pw.PhasewatchError, match="lies in the run's folder, where nothing is trusted"):
        Slurm(order(tmp_path, series, folder=str(tmp_path / "run" / "jobs")))
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o777)
    shared.chmod(0o770)
    with pytest.raises(pw.PhasewatchError, match=r"can be used by others.*chmod 700"):
        Slurm(order(tmp_path, series, folder=str(shared)))
    shared.chmod(0o700)
    assert Slurm(order(tmp_path, series, folder=str(shared))).where == f"in {shared}"


# A real one


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    if reason := slurm_node.missing():
        pytest.skip(reason)
    with slurm(tmp_path_factory.mktemp("slurm") / "node") as env:
        yield env


@pytest.fixture
def cluster(node, monkeypatch):
    for name, value in {**node, **{key: environment()[key] for key in ("PYTHONPATH", "OMP_NUM_THREADS")}}.items():
        monkeypatch.setenv(name, value)
    yield node
    slurm_node.run(node, "scancel", "--user", os.environ.get("USER", "root"))
    wait_for(lambda: not slurm_node.run(node, "squeue", "--noheader"), 20)


def naps(model, batch):
    time.sleep(0.3)
    return 1.0


def as_json(points):
    return {point.step: point.as_json() for point in points}


def workers_in(run):
    """The workers' processes, by their files."""
    pids = [int(file.stem.split("-")[-2]) for file in (Path(run) / "work/members").glob("*.jsonl")]
    return [pid for pid in pids if pid != os.getpid() and alive(pid)]


def results_in(run):
    texts = [file.read_text() for file in (Path(run) / "work/members").glob("*.jsonl")]
    return sum(text.count('"point": {') for text in texts)


@pytest.mark.slurm
def test_a_killed_worker_is_replaced_and_the_points_are_those_of_one_process(tmp_path, series, cluster):
    probe = make_probe(metrics={"naps": naps})
    points = pw.replay(series, probe, run=tmp_path / "run", on="slurm", workers=2, options={"cpus_per_task": 1})
    found = [next(points)]
    os.kill(workers_in(tmp_path / "run")[0], signal.SIGKILL)
    found += points
    assert as_json(found) == as_json(pw.replay(series, probe))
    assert results_in(tmp_path / "run") == len(series)
    wait_for(lambda: not slurm_node.run(cluster, "squeue", "--noheader"), 20)


@pytest.mark.slow
@pytest.mark.slurm
def test_workers_go_on_without_their_replay_and_are_requeued_and_cancelled(tmp_path, series, cluster):
    script = tmp_path / "driver.py"
    script.write_text(
        "import sys, time, phasewatch as pw\n"
        "from tiny_run import make_probe\n"
        "def naps(model, batch):\n"
        "    time.sleep(0.3)\n"
        "    return 1.0\n"
        "if __name__ == '__main__':\n"
        "    series = pw.SnapshotFolder(sys.argv[1])\n"
        "    probe = make_probe(metrics={'naps': naps})\n"
        "    for point in pw.replay(series, probe, run=sys.argv[2], on='slurm', workers=1):\n"
        "        print(point.step, flush=True)\n"
    )
    run = tmp_path / "run"
    command = [sys.executable, str(script), str(series.path), str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=dict(os.environ)) as driver:
        driver.stdout.readline()
        driver.kill()
    (worker,) = workers_in(run)
    os.kill(worker, signal.SIGUSR2)  # as SLURM does before the time limit
    assert gone([worker], 5)
    before = results_in(run)
    wait_for(lambda: workers_in(run) and results_in(run) > before, 60)  # it starts anew, and goes on
    probe = make_probe(metrics={"naps": naps})
    points = pw.replay(series, probe, run=run, on="slurm", workers=1)
    assert next(points)
    (worker,) = workers_in(run)
    began = time.monotonic()
    points.close()  # cancels what is at work, though submitit ignores SIGTERM
    assert gone([worker], 10)
    assert time.monotonic() - began < 10
    assert as_json(pw.replay(series, probe, run=run)) == as_json(pw.replay(series, probe))
