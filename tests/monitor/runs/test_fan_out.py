"""Workers that share a run by its files: threads here, each with a file of its own, as processes of other machines."""

import json
import os
import threading
import time

import pytest
from made_points import a_point
from tiny_run import Told, a_snapshot, lines, make_probe, wait_for

import phasewatch as pw
from phasewatch.monitor.runs import board, fan_out, members
from phasewatch.monitor.runs import work as working
from phasewatch.monitor.runs.board import Board
from phasewatch.monitor.runs.executor import Order
from phasewatch.monitor.runs.fan_out import FanOut
from phasewatch.monitor.runs.members import Member
from phasewatch.monitor.runs.status import status
from phasewatch.monitor.runs.work import work

STEPS = [10, 20, 30, 40, 50, 60]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """All waits at a hundredth of what they are."""
    for module, name, seconds in (
        (members, "BEAT_SECONDS", 0.05),
        (members, "STALE_SECONDS", 1.0),
        (fan_out, "POLL_SECONDS", 0.01),
        (fan_out, "TEND_SECONDS", 0.02),
        (working, "IDLE_SECONDS", 0.01),
    ):
        monkeypatch.setattr(module, name, seconds)


@pytest.fixture
def series(tmp_path):
    folder = pw.SnapshotFolder(tmp_path / "snapshots")
    for step in STEPS:
        folder.save(a_snapshot(step, seed=step))
    return folder


@pytest.fixture
def undisturbed(series):
    return {point.step: point.as_json() for point in pw.replay(series, make_probe())}


class Threads:
    """Starts workers as threads, and can lose them at once."""

    where = "nowhere"

    def __init__(self, run, series, *, probe=make_probe):
        self.run, self.series, self.probe = run, series, probe
        self.threads, self.started, self.errors = [], [], []

    def start(self, count):
        self.started.append(count)
        for _ in range(count):
            self.threads.append(threading.Thread(target=self._work))
            self.threads[-1].start()

    def _work(self):
        try:
            work(self.run, lambda: (self.probe(), self.series))
        except Exception as error:
            self.errors.append(str(error))

    def count(self):
        return sum(thread.is_alive() for thread in self.threads)

    def stop(self):
        for thread in self.threads:
            thread.join(10)


def shared(run, series, launcher=None, *, probe=None, workers=2, sinks=(), on_error=None):
    probe = probe or make_probe()
    launcher = launcher or Threads(run, series)

    def on(probe, snapshots):
        return FanOut(Order(probe, snapshots, run, "threads", workers, {}), launcher)

    return pw.replay(series, probe, run=run, on=on, sinks=sinks, on_error=on_error or pytest.fail)


def as_json(points):
    return {point.step: point.as_json() for point in points}


def results_in(run):
    """Every point that any worker has written, step by step."""
    found = []
    for file in (run / "work/members").iterdir():
        found += [r["point"]["step"] for r in map(json.loads, file.read_text().splitlines()) if "point" in r]
    return sorted(found)


class Lost(Member):
    """A worker that takes tasks and is killed: its file stays as it is, and the system frees its lock."""

    def die(self, *, frees_lock=True):
        self._closing.set()
        self._beats.join()
        if frees_lock:
            self._file.close()


def lost_worker(run, *tasks, says=True, frees_lock=True, results=()):
    """One that has claimed tasks, and gone."""
    there = Board(run)
    there.refresh()
    lost = Lost(there.members, {"settings": there.settings})
    for task in tasks:
        assert there.claim(str(task))
    if says:
        lost.write({"claimed": list(tasks)})
    for task, point in results:
        lost.write({"task": task, "point": point})
    lost.die(frees_lock=frees_lock)
    return lost


def killed_replay(run, series, *, post=STEPS, probe=None):
    """A replay that has shared its steps out, and was killed."""
    (probe or make_probe)()
    executor = FanOut(Order((probe or make_probe)(), series, run, "threads", 2, {}), Threads(run, series))
    there = executor._take_over()
    executor._share_out(there, post)
    executor._member.__class__ = Lost
    executor._member.die()
    return there


def test_two_workers_measure_each_step_once_as_one_process_does(series, tmp_path, undisturbed):
    run, sink = tmp_path / "run", Told()
    assert as_json(shared(run, series, sinks=[sink])) == undisturbed
    assert results_in(run) == STEPS
    assert sorted(json.loads(line)["step"] for line in lines(run).splitlines()) == STEPS
    assert len(sink.points) == len(STEPS)
    used = [file for file in (run / "work/members").iterdir() if '"point"' in file.read_text()]
    assert len(used) == 2
    assert as_json(shared(run, series, Threads(run, series))) == undisturbed  # nothing is measured again
    assert results_in(run) == STEPS


def test_what_a_killed_worker_had_begun_is_measured_by_another(series, tmp_path, undisturbed):
    run = tmp_path / "run"

    class LosesTwo(Threads):
        def start(self, count):
            if not self.started:
                lost_worker(self.run, 1, 2)
            super().start(count)

    assert as_json(shared(run, series, LosesTwo(run, series))) == undisturbed
    assert results_in(run) == STEPS


@pytest.mark.parametrize("says", [True, False])
def test_a_claim_of_another_machine_goes_stale_by_ones_own_clock(series, tmp_path, undisturbed, says, monkeypatch):
    run = tmp_path / "run"

    class LosesOne(Threads):
        def start(self, count):
            if not self.started:
                with monkeypatch.context() as patch:
                    patch.setattr(members, "machine", lambda: "another")
                    lost = lost_worker(self.run, 3, says=says)
                hour_ahead = time.time() + 3600
                os.utime(lost.path, (hour_ahead, hour_ahead))  # of a machine whose clock is an hour ahead
            super().start(count)

    began = time.monotonic()
    assert as_json(shared(run, series, LosesOne(run, series))) == undisturbed
    assert time.monotonic() - began > members.STALE_SECONDS
    assert results_in(run) == STEPS


def test_a_worker_whose_clock_is_an_hour_behind_is_at_work_as_long_as_it_says_so(series, tmp_path, undisturbed):
    run = tmp_path / "run"

    def slow(model, batch):
        for file in (run / "work/members").iterdir():
            hour_ago = time.time() - 3600
            os.utime(file, (hour_ago, hour_ago))
        time.sleep(2.5 * members.STALE_SECONDS if batch[0].shape[0] == 64 and not slept else 0)
        slept.append(True)
        return 0.5

    slept = []
    probe = lambda: make_probe(metrics={"slow": slow})  # noqa: E731
    launcher = Threads(run, series, probe=probe)
    points = list(shared(run, series, launcher, probe=probe()))
    assert [p["loss"] for p in as_json(sorted(points, key=lambda p: p.step)).values()] == [
        undisturbed[step]["loss"] for step in STEPS
    ]
    assert results_in(run) == STEPS


def test_a_killed_replay_goes_on_with_what_its_workers_did_meanwhile(series, tmp_path, undisturbed):
    run = tmp_path / "run"
    list(shared(run, series.__class__(empty(tmp_path, series))))
    killed_replay(run, series)
    offset = len(Board_tasks(run)) - len(STEPS)
    lost_worker(run, offset + 1, offset + 2, results=[(offset + 1, undisturbed[20])])
    assert as_json(shared(run, series)) == undisturbed
    assert results_in(run) == STEPS


def empty(tmp_path, series):
    """A folder with the first snapshot alone, so that its run is begun and over."""
    folder = pw.SnapshotFolder(tmp_path / "first")
    folder.save(series.load(10))
    return folder.path


def Board_tasks(run):
    there = Board(run)
    there.refresh()
    return there.tasks


def test_workers_finish_what_is_shared_out_when_their_replay_is_killed(series, tmp_path, undisturbed):
    run = tmp_path / "run"
    make_run(run)
    killed_replay(run, series)
    launcher = Threads(run, series)
    launcher.start(2)
    launcher.stop()
    assert launcher.errors == []
    assert results_in(run) == STEPS
    assert as_json(shared(run, series)) == undisturbed
    assert results_in(run) == STEPS


def make_run(run):
    """A run's folder without points."""
    from phasewatch.monitor.runs.folder import RunFolder

    RunFolder(run, make_probe().settings).close()


def test_a_second_replay_is_refused_as_long_as_the_first_lives(series, tmp_path, monkeypatch):
    run = tmp_path / "run"
    make_run(run)
    order = Order(make_probe(), series, run, "threads", 2, {})
    first = FanOut(order, Threads(run, series))
    first._take_over()
    monkeypatch.setattr(members, "machine", lambda: "another")  # where the lock of the run may not reach
    second = FanOut(order, Threads(run, series))
    with pytest.raises(pw.PhasewatchError, match=r"Another replay \(.*\) shares out the work on run=.*Wait for it"):
        next(second.measure([10]))
    second.close()
    first.close()
    third = FanOut(order, Threads(run, series))
    assert len(list(third.measure([10, 20]))) == 2
    third.close()


def test_of_two_replays_that_start_at_once_one_shares_the_work_out(series, tmp_path):
    run = tmp_path / "run"
    make_run(run)
    outcomes = []

    def start():
        executor = FanOut(Order(make_probe(), series, run, "threads", 2, {}), Threads(run, series))
        try:
            outcomes.append(len(list(executor.measure(STEPS))))
        except pw.PhasewatchError as error:
            outcomes.append(str(error))
        finally:
            time.sleep(0.3)
            executor.close()

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results_in(run) == STEPS
    assert [outcome for outcome in outcomes if isinstance(outcome, int)] == [len(STEPS)] * sum(
        isinstance(outcome, int) for outcome in outcomes
    )
    assert len(STEPS) in outcomes


def test_a_replay_that_was_stopped_and_superseded_shares_out_nothing_more(series, tmp_path):
    run = tmp_path / "run"
    make_run(run)
    order = Order(make_probe(), series, run, "threads", 2, {})
    first = FanOut(order, Threads(run, series))
    there = first._take_over()
    assert there.claim(f"driver-{there.sessions}")  # as one that found it silent for a minute
    with pytest.raises(pw.PhasewatchError, match="Another replay has taken over run="):
        next(first.measure([10]))
    first.close()
    assert '"end"' not in (run / "work/tasks.jsonl").read_text()


def test_a_snapshot_that_workers_die_of_is_left_out_and_tried_again_by_the_next_replay(series, tmp_path, undisturbed):
    run, said = tmp_path / "run", []

    class Killing(Threads):
        def count(self):
            there = Board(self.run)
            there.refresh()
            poison = [task for task, step in enumerate(there.tasks) if step == 30]
            if poison and there.claim(str(poison[-1])):
                lost = Lost(there.members, {"settings": there.settings})
                lost.write({"claimed": [poison[-1]]})
                lost.die()
            return super().count()

    class First(Killing):
        def start(self, count):
            self.count()
            super().start(count)

    points = list(shared(run, series, First(run, series), on_error=said.append))
    assert sorted(point.step for point in points) == [10, 20, 40, 50, 60]
    assert said == ["Step 30 is left out: 3 workers ended, one after another, while they measured it"]
    assert as_json(shared(run, series)) == undisturbed


def test_a_snapshot_that_cant_be_read_costs_its_own_point(series, tmp_path):
    series.source(20).write_bytes(b"cut off")
    said = []
    points = list(shared(tmp_path / "run", series, on_error=said.append))
    assert sorted(point.step for point in points) == [10, 30, 40, 50, 60]
    assert len(said) == 1
    assert said[0].startswith("Step 20 is left out")


def test_workers_that_all_fail_say_why(series, tmp_path):
    def broken():
        raise pw.PhasewatchError("no such data here")

    run, said = tmp_path / "run", []
    launcher = Threads(run, series, probe=broken)
    with pytest.raises(pw.PhasewatchError, match="None of the 6 checkpoints"):
        list(shared(run, series, launcher, on_error=said.append))
    assert said[0] == "Step 10 is left out: no worker stays: no such data here"
    assert len(launcher.started) == fan_out.MOST_STARTS


def test_a_worker_with_another_probe_is_turned_away(series, tmp_path):
    run = tmp_path / "run"
    make_run(run)
    killed_replay(run, series)
    with pytest.raises(pw.PhasewatchError, match="The probe has other settings than the replay"):
        work(run, lambda: (make_probe(seed=1), series))
    assert results_in(run) == []


def test_results_of_other_settings_are_not_taken_over(series, tmp_path, undisturbed):
    run = tmp_path / "run"
    list(shared(run, series))
    for file in ("run.json", "points.jsonl"):
        (run / file).unlink()
    other = lambda: make_probe(seed=1)  # noqa: E731
    points = as_json(shared(run, series, Threads(run, series, probe=other), probe=other()))
    assert points == {point.step: point.as_json() for point in pw.replay(series, other())}
    assert points != undisturbed


def test_there_is_nothing_to_work_on_without_a_replay(tmp_path):
    with pytest.raises(pw.PhasewatchError, match=r"No replay shares out any work in .*--on external"):
        work(tmp_path, lambda: pytest.fail("not asked for"))


def test_a_folder_that_shows_files_late_costs_time_alone(series, tmp_path, undisturbed, monkeypatch):
    run = tmp_path / "run"
    listdir, shown = os.listdir, {}

    def late(path):
        now = time.monotonic()
        names = listdir(path)
        first = {name: shown.setdefault((str(path), name), now) for name in names}
        return [name for name in names if now - first[name] > 0.3 or "work" not in str(path)]

    monkeypatch.setattr(os, "listdir", late)
    assert as_json(shared(run, series, workers=3)) == undisturbed
    assert results_in(run) == STEPS


def test_lines_that_are_not_there_yet_or_make_no_sense_are_waited_for(tmp_path):
    file = tmp_path / "a.jsonl"
    tail = members.Tail(file, tmp_path)
    file.write_bytes(b'{"beat": 1}\n\0\0\0\0\n{"be')
    assert tail.read() == [{"beat": 1}]
    assert tail.read() == []
    file.write_bytes(b'{"beat": 1}\n[2]\n{"beat": 3}\n')
    assert tail.read() == [[2], {"beat": 3}]


def test_hostile_files_of_members_are_ignored(series, tmp_path, undisturbed):
    run = tmp_path / "run"
    make_run(run)
    killed_replay(run, series)
    there = Board(run)
    there.refresh()
    hello = json.dumps({"hello": {"settings": there.settings, "machine": 3, "locked": "yes"}})
    evil = [
        "[" * 100,
        hello,
        '{"task": 1, "point": {"step": 999}}',
        '{"task": -1, "point": 3}',
        '{"task": 1, "point": []}',
        json.dumps({"task": 1, "point": a_point(77).as_json()}),
        '{"task": true, "error": 3}',
        '{"claimed": "all"}',
    ]
    (there.members / "evil.jsonl").write_text("\n".join([hello, *evil[2:], ""]))
    (there.members / "deep.jsonl").write_text("\n".join([hello, *evil, ""]))
    os.mkfifo(there.members / "pipe.jsonl")
    (tmp_path / "outside.jsonl").write_text(hello + "\n")
    (there.members / "link.jsonl").symlink_to(tmp_path / "outside.jsonl")
    assert as_json(shared(run, series)) == undisturbed


def test_a_work_folder_that_leads_elsewhere_is_refused(series, tmp_path):
    run = tmp_path / "run"
    make_run(run)
    (tmp_path / "elsewhere").mkdir()
    (run / "work").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(pw.PhasewatchError, match="leads out of"):
        list(shared(run, series))
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_full_disk_is_waited_for_by_a_worker(tmp_path, monkeypatch):
    member = Member(tmp_path, {})
    write, full = os.write, [True]

    def cut_short(descriptor, content):
        if full[0]:
            if len(content) > 10:
                return write(descriptor, content[:10])
            raise OSError(28, "No space left on device")
        return write(descriptor, content)

    monkeypatch.setattr(members.os, "write", cut_short)
    assert not member.write({"task": 1})
    full[0] = False
    wait_for(lambda: '"beat"' in member.path.read_text())
    member.leave()
    records = list(map(json.loads, member.path.read_text().splitlines()))
    assert {"task": 1} in records
    assert records[-1] == {"left": True}


def test_a_hung_worker_gives_no_sign_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(members, "HANG_SECONDS", 0.2)
    monkeypatch.setattr(members.time, "process_time", lambda: 1.0)
    member = Member(tmp_path, {})
    peer = members.Peer(member.path, tmp_path)
    member.busy = True
    wait_for(lambda: not peer.read() and peer.silent_seconds > 0.5)
    member.busy = False
    wait_for(peer.read)
    member.leave()


def test_status_counts_all_workers(series, tmp_path, undisturbed):
    run = tmp_path / "run"
    make_run(run)
    with pytest.raises(pw.PhasewatchError, match=r"there is no run\.json"):
        status(tmp_path)
    assert "0 checkpoints measured. No replay shares" in status(run)
    killed_replay(run, series)
    lost_worker(run, 1, 2, results=[(1, undisturbed[10])])
    said = status(run, watch_seconds=0.3)
    assert "1 checkpoints measured, 5 to go" in said
    assert "no worker gives a sign of life" in said
    assert "start the same command again" in said
    alive = Member(Board(run).members, {})
    alive.write({"task": 3, "seconds": 120.0, "point": undisturbed[30]})
    said = status(run, watch_seconds=0.3)
    assert "2 checkpoints measured, 4 to go, about 8 minutes left" in said
    assert f"{alive.name}: 1 measured" in said
    alive.leave()
    list(shared(run, series))
    assert "6 checkpoints measured, 0 to go" in status(run, watch_seconds=0.1)


def test_a_place_that_is_none_is_named(series, tmp_path):
    for on, match in (
        ("pbs", r"replay\(on='pbs'\) must be one of 'local', 'external', 'slurm', 'ray'"),
        ("slurm://host", "must be one of"),
        ("external", r"replay\(on='external'\) needs run="),
    ):
        with pytest.raises(pw.PhasewatchError, match=match):
            pw.replay(series, make_probe(), on=on)
    with pytest.raises(pw.PhasewatchError, match=r"replay\(on='local'\) takes no options; partition came"):
        pw.replay(series, make_probe(), on="local", options={"partition": "gpu"})
    with pytest.raises(pw.PhasewatchError, match=r"replay\(options=..., on=...\) says twice"):
        pw.replay(series, make_probe(), on=lambda *_: None, options={"partition": "gpu"})


def test_a_group_is_shared_among_the_members(series, tmp_path):
    run = tmp_path / "run"
    make_run(run)
    there = killed_replay(run, series)
    workers = [Member(there.members, {}) for _ in range(3)]
    chooser = board.Chooser(there)
    assert len(chooser.take(32)) == 2
    assert len(chooser.take(1)) == 1
    for worker in workers:
        worker.leave()
