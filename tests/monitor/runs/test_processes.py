import gc
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from contextlib import suppress

import pytest
import torch
from law_models import Perceptron, classify, labelled
from processes import alive, environment, gone, reads_proc
from tiny_run import wait_for

import phasewatch as pw
from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.runs import processes, shares
from phasewatch.monitor.runs.processes import MOST_DEATHS, Processes, Worker, WorkerDied, packed

SAMPLER = pw.SGLD(step_size=1e-5, nbeta=20.0, chains=2, draws=4, burn_in=1, batch_size=8)


@pytest.fixture
def series(tmp_path):
    torch.manual_seed(0)
    folder = pw.SnapshotFolder(tmp_path / "snapshots")
    for step in (1, 2, 3, 4):
        snapshot = pw.Snapshot.of(Perceptron(), step)
        snapshot.tensors["norm.bias"].fill_(step)
        folder.save(snapshot)
    return folder


def probe_of():
    return pw.Probe(Perceptron, classify, labelled(), sampler=SAMPLER)


def ends_at_two(model, batch):
    """A loss that ends its process at the snapshot of step 2, and prints where others write their answers."""
    print("a loss may print")
    if not isinstance(mark := model.norm.bias, torch.nn.Parameter) or mark[0] != 2:
        return classify(model, batch)
    os._exit(41)


def raises_at_three(model, batch):
    return 1 / (model.norm.bias[0].item() - 3)


def test_a_worker_answers_and_outlives_what_it_cant_measure(series):
    probe = probe_of()
    worker = Worker(packed(probe, series))
    try:
        assert worker.measure(3) == probe(series.load(3))
        with pytest.raises(PhasewatchError, match=r"step-00000009\.safetensors is no longer there"):
            worker.measure(9)
        series.save(pw.Snapshot(5, {"x": torch.ones(1)}))
        with pytest.raises(PhasewatchError, match="The snapshot of step 5 lacks"):
            worker.measure(5)
        nan = {name: tensor * math.nan for name, tensor in series.load(1).tensors.items() if tensor.is_floating_point()}
        series.save(pw.Snapshot(6, dict(series.load(1).tensors) | nan))
        assert worker.measure(6).llc.health is pw.Health.DIVERGED
        assert worker.measure(1) == probe(series.load(1))
    finally:
        worker.stop()


def test_a_worker_killed_or_stopped_midway_says_so(series):
    worker = Worker(packed(probe_of(), series))
    threading.Timer(0.5, worker.kill).start()
    with pytest.raises(WorkerDied, match="ended with status -9"):
        worker.measure(1)
    worker.stop()
    worker.stop()
    with pytest.raises(WorkerDied, match="ended with status -9"):
        worker.measure(1)


def test_a_probe_that_cant_be_rebuilt_says_so_for_each_step(series, monkeypatch):
    module = types.ModuleType("only_here")
    monkeypatch.setitem(sys.modules, "only_here", module)
    exec("def loss(model, batch):\n    return model(batch[0]).square().mean()", module.__dict__)
    worker = Worker(packed(pw.Probe(Perceptron, module.loss, labelled()), series))
    try:
        for _ in range(2):
            with pytest.raises(PhasewatchError, match=r"can't be rebuilt in another process: Module.*only_here"):
                worker.measure(1)
    finally:
        worker.stop()


def test_what_cant_be_pickled_is_refused_before_anything_starts(series, tmp_path):
    lock = threading.Lock()

    def loss(model, batch):
        with lock:
            return classify(model, batch)

    probe = probe_of()
    closed = pw.Probe(Perceptron, loss, labelled(), sampler=SAMPLER)
    with pytest.raises(PhasewatchError, match=r"can't be sent to another process \(TypeError: .*lock.*must be"):
        packed(closed, series)
    with pytest.raises(PhasewatchError, match="can't be sent to another process"):
        pw.replay(series, closed, workers=2, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    module = pw.Probe(Perceptron(), classify, labelled(), sampler=SAMPLER)
    with pytest.raises(PhasewatchError, match=r"Probe\(model=Perceptron\(\.\.\.\)\) holds a module"):
        pw.replay(series, module, workers=2)
    with pytest.raises(PhasewatchError, match="holds a module"):
        pw.PhaseMonitor(Perceptron(), module, run=tmp_path / "m", at=pw.every(1), measure="background")
    assert packed(probe, series)


@pytest.mark.slow
def test_a_replay_goes_on_when_a_worker_dies(series):
    probe = pw.Probe(Perceptron, ends_at_two, labelled(), sampler=SAMPLER, metrics={"inverse": raises_at_three})
    said = []
    points = pw.Trajectory(pw.replay(series, probe, workers=2, on_error=said.append))
    assert points.steps.tolist() == [1, 3, 4]
    assert said == ["Step 2 is left out: WorkerDied: the measuring process ended with status 41"]
    assert [point.metrics["inverse"] for point in points] == pytest.approx([-0.5, math.nan, 1.0], nan_ok=True)


def test_a_background_monitor_goes_on_when_its_worker_dies(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "MOST_DEATHS", 1)
    probe = pw.Probe(Perceptron, ends_at_two, labelled(), sampler=SAMPLER)
    model = Perceptron()

    def train():
        with pw.PhaseMonitor(model, probe, run=tmp_path / "run", at=pw.every(1), measure="background") as monitor:
            for step in (1, 2, 3):
                with torch.no_grad():
                    model.norm.bias.fill_(step)
                monitor(step)
        return monitor

    with pytest.warns(pw.PhasewatchWarning, match=r"Step 2 could not be measured.*ended with status 41") as said:
        monitor = train()
    assert [point.step for point in monitor.trajectory] == [1, 3]
    assert len(said) == 1


def test_workers_that_cant_start_are_errors_and_not_a_hang(series, monkeypatch):
    def cannot(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(processes, "Worker", cannot)
    said = []
    with pytest.raises(PhasewatchError, match="None of the 4 checkpoints could be measured"):
        list(pw.replay(series, probe_of(), workers=2, on_error=said.append))
    assert len(said) == 4
    assert "Cannot allocate memory" in said[0]


def test_the_executor_keeps_its_process_and_replaces_one_that_died(series, started, monkeypatch):
    most = 2
    monkeypatch.setattr(processes, "MOST_DEATHS", most)
    probe = pw.Probe(Perceptron, ends_at_two, labelled(), sampler=SAMPLER)
    executor = Processes(packed(probe, series))
    try:
        assert list(executor.measure([])) == []
        assert started == []
        found = dict(executor.measure([1, 3]))
        assert found == {step: probe(series.load(step)) for step in (1, 3)}
        assert len(started) == 1
        ((step, died),) = executor.measure([2])
        assert (step, type(died)) == (2, WorkerDied)
        assert len(started) == most
        assert dict(executor.measure([4])) == {4: probe(series.load(4))}
        assert len(started) == most + 1
    finally:
        executor.close()
    assert gone(started, 2)
    assert list(executor.measure([1])) == []


def dies_once(model, batch):
    """A loss whose process is killed once in all, when it measures the snapshot of step 2."""
    mark = model.norm.bias
    if isinstance(mark, torch.nn.Parameter) and mark[0] == 2 and sys.argv[0] == "-c":
        with suppress(FileExistsError):
            os.close(os.open(os.environ["DIED"], os.O_CREAT | os.O_EXCL))
            os.kill(os.getpid(), signal.SIGKILL)
    return classify(model, batch)


def test_a_snapshot_whose_process_is_killed_is_measured_by_another(series, tmp_path, monkeypatch):
    monkeypatch.setenv("DIED", str(tmp_path / "died"))
    probe = pw.Probe(Perceptron, dies_once, labelled(), sampler=SAMPLER)
    points = {point.step: point for point in pw.replay(series, probe, workers=2)}
    assert (tmp_path / "died").exists()
    assert points == {point.step: point for point in pw.replay(series, probe)}


def its_gpu(model, batch):
    return float(os.environ["CUDA_VISIBLE_DEVICES"].removeprefix("MIG-"))


def its_threads(model, batch):
    return float(os.environ["OMP_NUM_THREADS"])


def its_cache(model, batch):
    time.sleep(0.5)  # so that the other worker takes a snapshot too
    return float(os.environ["TORCHINDUCTOR_CACHE_DIR"] == os.environ["EXPECTED_CACHE"])


def test_each_worker_has_its_gpu_its_share_of_the_cores_and_the_common_cache(series, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, MIG-7")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # on fewer cores they would only wait for each other
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("EXPECTED_CACHE", str(tmp_path))
    monkeypatch.setattr(shares, "usable_cores", lambda: 6)
    metrics = {"gpu": its_gpu, "threads": its_threads, "cache": its_cache}
    threads = torch.get_num_threads() + 1  # another number than torch starts with, and than a worker's share
    probe = pw.Probe(
        Perceptron, classify, labelled(), sampler=SAMPLER, metrics=metrics, threads=threads + (threads == 3)
    )
    points = list(pw.replay(series, probe, workers=2))
    assert {point.metrics["gpu"] for point in points} == {5.0, 7.0}
    assert {point.metrics["threads"] for point in points} == {3.0}
    assert {point.metrics["cache"] for point in points} == {1.0}
    alone = pw.replay(series, pw.Probe(Perceptron, classify, labelled(), sampler=SAMPLER, threads=probe.threads))
    assert {p.step: p.llc for p in points} == {p.step: p.llc for p in alone}


def test_threads_stay_as_they_are_where_they_decide_how_sums_are_rounded(monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    monkeypatch.setattr(shares, "usable_cores", lambda: 8)
    probe = pw.Probe(Perceptron, classify, labelled(), sampler=SAMPLER, threads=torch.get_num_threads())
    assert {env["OMP_NUM_THREADS"] for env in shares.environments(probe, 3)} == {"9" if probe.threads != 2 else "2"}
    capsys.readouterr()
    shares.environments(pw.Probe(Perceptron, classify, labelled(), sampler=SAMPLER, threads=8), 2)
    assert "2 workers of 8 threads each share 8 cores. Probe(threads=4) is faster" in capsys.readouterr().err


def test_gpus_are_counted_where_there_is_no_mask_and_an_explicit_one_is_kept(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    probe = pw.Probe(Perceptron, classify, labelled(), sampler=SAMPLER)
    assert [env.get("CUDA_VISIBLE_DEVICES") for env in shares.environments(probe, 4)] == ["0", "1", "2", "0"]
    subject = types.SimpleNamespace(model=types.SimpleNamespace(device=torch.device("cuda:1")))
    on_the_second = types.SimpleNamespace(subject=subject, threads=1)
    assert [env.get("CUDA_VISIBLE_DEVICES") for env in shares.environments(on_the_second, 2)] == [None, None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [env["CUDA_VISIBLE_DEVICES"] for env in shares.environments(probe, 2)] == ["", ""]


def test_groups_are_dealt_out_fairly_and_what_a_process_dies_of_is_found_one_by_one():
    queued = processes._Queue(range(10), 2)
    group = queued.filled(queued.take(1), 3)
    assert group == [0, 1, 2]
    assert queued.take_ahead(3) == [3]
    assert queued.left_after(WorkerDied("killed"), group[1:]) == []
    assert list(queued.waiting) == [1, 2, 4, 5, 6, 7, 8, 9]
    for death in range(MOST_DEATHS):
        assert queued.filled(queued.take(1), 3) == [1]
        assert queued.left_after(WorkerDied("killed"), [1]) == ([1] if death == MOST_DEATHS - 1 else [])
    assert queued.filled(queued.take(1), 3) == [2]
    assert queued.left_after(processes.WorkerHung("hung"), [2]) == [2]
    assert queued.filled(queued.take(1), 3) == [4, 5, 6]
    assert queued.take(9) == [7, 8]
    assert queued.take(9) == [9]


def test_closing_the_executor_ends_a_measurement_that_is_under_way(series, started):
    executor = Processes(packed(probe_of(), series))
    threading.Timer(0.3, executor.close).start()
    began = time.monotonic()
    assert list(executor.measure([1, 2, 3, 4])) == []
    assert time.monotonic() - began < 5
    assert gone(started, 2)


def test_a_worker_runs_no_code_of_the_folder_that_one_stands_in(series, tmp_path, monkeypatch):
    package = packed(probe_of(), series)
    for name in ("json", "signal", "queue", "phasewatch"):
        (tmp_path / f"{name}.py").write_text("open('executed', 'w').close()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in {"", str(tmp_path)}])
    worker = Worker(package)
    try:
        assert worker.measure(1).step == 1
    finally:
        worker.stop()
    assert not (tmp_path / "executed").exists()


@reads_proc
@pytest.mark.slow
def test_a_worker_ends_with_its_parent_also_where_a_process_that_was_forked_holds_the_pipe(series, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, sys, time, phasewatch as pw\n"
        "from law_models import Perceptron, classify, labelled\n"
        "from phasewatch.monitor.runs.processes import Worker, packed\n"
        "sampler = pw.SGLD(chains=2, draws=4, burn_in=0, batch_size=8)\n"
        "probe = pw.Probe(Perceptron, classify, labelled(), sampler=sampler)\n"
        "worker = Worker(packed(probe, pw.SnapshotFolder(sys.argv[1])))\n"
        "worker.measure(1)\n"
        "helper = os.fork()\n"
        "if helper:\n"
        "    print(worker._process.pid, helper, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(script), str(series.path)],
        stdout=subprocess.PIPE,
        env=environment(),
    )
    with parent:
        worker, helper = map(int, parent.stdout.readline().split())
        try:
            assert alive(worker)
            parent.kill()
            assert gone([worker], 5)
            assert alive(helper)
        finally:
            os.kill(helper, signal.SIGKILL)


@pytest.fixture
def started(monkeypatch):
    pids = []
    popen = subprocess.Popen

    def noting(*arguments, **more):
        process = popen(*arguments, **more)
        pids.append(process.pid)
        return process

    monkeypatch.setattr(subprocess, "Popen", noting)
    return pids


@pytest.mark.slow
def test_an_abandoned_replay_ends_its_workers(series, started):
    points = pw.replay(series, probe_of(), workers=2)
    next(points)
    points.close()
    assert len(started) == 2
    assert gone(started, 2)
    del points
    gc.collect()


@reads_proc
@pytest.mark.parametrize("busy", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_worker_ends_by_itself_when_its_parent_is_killed(series, tmp_path, busy):
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys, time, phasewatch as pw\n"
        "from pathlib import Path\n"
        "from law_models import Perceptron, classify, labelled\n"
        "from phasewatch.monitor.runs.processes import Worker, packed\n"
        "series, busy = pw.SnapshotFolder(Path(sys.argv[1])), sys.argv[2] == 'True'\n"
        "sleep = lambda model, batch: (print('sleeping', file=sys.stderr, flush=True), time.sleep(600))\n"
        "probe = pw.Probe(Perceptron, classify, labelled(), metrics={'slow': sleep} if busy else {},\n"
        "    sampler=pw.SGLD(chains=2, draws=4, burn_in=0, batch_size=8))\n"
        "worker = Worker(packed(probe, series))\n"
        "print(worker._process.pid, flush=True)\n"
        "worker.measure(1)\n"
        "print('measured', flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, str(script), str(series.path), str(busy)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    with parent:
        pid = int(parent.stdout.readline())
        answer = (parent.stderr if busy else parent.stdout).readline()
        assert answer.strip() == (b"sleeping" if busy else b"measured")
        assert alive(pid)
        parent.send_signal(signal.SIGKILL)
        assert gone([pid], 5)


@reads_proc
@pytest.mark.slow
def test_a_worker_that_is_stopped_is_ended_with_a_sentence(series, started, monkeypatch):
    executor = Processes(packed(probe_of(), series))
    assert [step for step, point in executor.measure([1]) if isinstance(point, pw.Point)] == [1]
    os.kill(started[0], signal.SIGSTOP)
    began = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(processes, "HANG_SECONDS", 2.0)
        [(step, result)] = executor.measure([2])
    assert step == 2
    assert isinstance(result, WorkerDied)
    assert re.search(r"has done nothing for 2 seconds and was ended: it was stopped", str(result))
    assert time.monotonic() - began < 10
    assert gone(started, 5)
    [(step, result)] = executor.measure([3])
    assert isinstance(result, pw.Point)
    executor.close()
    assert gone(started, 5)


@reads_proc
def test_a_stopped_worker_is_let_go_of_at_once_when_the_executor_is_closed(series, started):
    executor = Processes(packed(probe_of(), series))
    list(executor.measure([1]))
    os.kill(started[0], signal.SIGSTOP)
    began = time.monotonic()
    executor.close()
    assert time.monotonic() - began < 3
    assert gone(started, 1)


def forks(model, batch):
    """A loss that leaves a process behind, which holds every pipe."""
    if sys.argv[0] == "-c" and not FORKED:  # in a worker alone
        FORKED.append(os.fork())
        if FORKED[0] == 0:
            time.sleep(60)
            os._exit(0)
    return classify(model, batch)


FORKED: list[int] = []


@reads_proc
@pytest.mark.slow
def test_what_a_loss_forks_ends_with_its_worker(series, started):
    executor = Processes(packed(pw.Probe(Perceptron, forks, labelled(), sampler=SAMPLER), series))
    list(executor.measure([1]))
    members = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if group_of(pid) == started[0]]
    assert len(members) > 1
    began = time.monotonic()
    executor.close()
    assert time.monotonic() - began < 5
    assert gone(members, 5)


def group_of(pid):
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


IMPORTING = """
import json, os, subprocess, sys, time
from phasewatch.monitor.runs.processes import _START
start = [sys.executable, "-P", "-c", _START, json.dumps([sys.argv[1], *sys.path]), str(os.getpid()), "0"]
print(subprocess.Popen(start, stdout=subprocess.DEVNULL, process_group=0).pid, flush=True)
time.sleep(60)
"""


@reads_proc
def test_a_worker_that_is_still_importing_ends_with_its_parent(tmp_path):
    (tmp_path / "cloudpickle.py").write_text(f"open({str(tmp_path / 'begun')!r}, 'w'); import time; time.sleep(60)")
    command = [sys.executable, "-c", IMPORTING, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as parent:
        worker = int(parent.stdout.readline())
        wait_for((tmp_path / "begun").exists, 60)
        parent.kill()
    assert gone([worker], 10)
