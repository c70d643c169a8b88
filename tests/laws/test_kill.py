"""After `kill -9` at any moment, resuming finds every point that was reported and measures what is missing."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from made_points import a_point, rising_points
from processes import environment, of_session, reads_proc
from tiny_run import a_snapshot, lines, make_probe, train

from phasewatch.monitor.runs.folder import RunFolder
from phasewatch.monitor.trajectories.trajectory import Trajectory
from phasewatch.monitor.trajectories.transitions import find_transitions

STEPS = 24
KILLS = 50
LEFT_SECONDS = 10.0
"""Within which all processes of a killed one have to end."""
NEVER = 10**9


class ForkServer:
    def __init__(self, folder):
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
            text=True,
        )

    def __call__(
        self,
        folder,
        *,
        delay=None,
        operation=None,
        steps=STEPS,
        work="run",
        measure="inline",
        average=None,
        workers=1,
        loaders=False,
    ):
        order = {
            "work": work,
            "folder": str(folder),
            "series": str(self.folder / "undisturbed"),
            "told": f"{folder}.told",
            "delay": delay,
            "operation": operation,
            "steps": steps,
            "measure": measure,
            "average": average,
            "workers": workers,
            "loaders": loaders,
        }
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert answer["killed"] or answer["status"] == 0
        return answer

    def stop(self):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = ForkServer(tmp_path_factory.mktemp("kill"))
    answer = server(server.folder / "undisturbed")
    assert not answer["killed"]
    yield server
    server.stop()


def check_and_note(folder, before):
    """Nothing that stood in the file has changed, and it holds everything that a sink was told; what it holds now."""
    now = lines(folder)
    assert now.startswith(before)
    steps = [json.loads(line)["step"] for line in now.splitlines()]
    assert len(steps) == len(set(steps))
    told = Path(f"{folder}.told")
    if told.exists():
        assert {int(step) for step in told.read_text().split()} <= set(steps)
    return now


@pytest.mark.parametrize("work", ["run", "replay"])
def test_fifty_kills_lose_nothing_and_repeat_nothing(server, work):
    undisturbed = lines(server.folder / "undisturbed")
    assert len(undisturbed.splitlines()) == STEPS // 2
    timed = [server.folder / f"timed-{work}-{i}" for i in range(3)]
    whole = min(server(folder, work=work)["seconds"] for folder in timed)
    assert lines(timed[0]) == undisturbed
    random_delay = random.Random(17)
    shares = [0.2, 1.2]  # of a whole run: many moments of the measuring, and some of the end
    kills, rounds, midway = 0, 0, set()
    while kills < KILLS:
        rounds += 1
        folder = server.folder / f"{work}-{rounds}"
        seen = b""
        while server(folder, work=work, delay=random_delay.uniform(0, random_delay.choice(shares) * whole))["killed"]:
            kills += 1
            seen = check_and_note(folder, seen)
            midway.add(len(seen.splitlines()))
            if kills >= KILLS:
                assert not server(folder, work=work)["killed"]
                break
        check_and_note(folder, seen)
        assert lines(folder) == undisturbed
        assert (folder / "points.jsonl").read_bytes() == undisturbed
        assert not list(folder.rglob("*.unfinished"))
    assert len(midway) > 5, f"the kills all fell in the same places: {sorted(midway)}"


@pytest.mark.parametrize(("work", "average"), [("run", None), ("run", 0.2), ("replay", None)])
def test_a_kill_before_every_single_change_of_a_file(server, work, average):
    steps = 4 if work == "run" else STEPS
    undisturbed = lines(server.folder / "undisturbed").splitlines()[: steps // 2]
    if average:
        plain, folder = undisturbed, server.folder / "averages"
        assert not server(folder, steps=steps, average=average)["killed"]
        undisturbed = lines(folder).splitlines()
        assert undisturbed != plain
    last = 1000 if work == "run" else 15  # a replay's points are all alike after the first few
    for operation in range(1, last):
        folder = server.folder / f"{work}-{average}-operation-{operation}"
        if not server(folder, work=work, operation=operation, steps=steps, average=average)["killed"]:
            break
        seen = check_and_note(folder, b"")
        if operation % 3 == 0:  # and once more while it resumes
            server(folder, work=work, operation=operation // 2 + 1, steps=steps, average=average)
            seen = check_and_note(folder, seen)
        assert not server(folder, work=work, operation=NEVER, steps=steps, average=average)["killed"]
        check_and_note(folder, seen)
        assert lines(folder).splitlines() == undisturbed
    assert operation > 10


@pytest.mark.slow
@pytest.mark.parametrize("work", ["report", "calibrate"])
def test_a_hundred_kills_leave_a_whole_page_or_none_and_the_run_as_it_was(server, work):
    folder = server.folder / f"killed-{work}"
    shutil.copytree(server.folder / "undisturbed", folder)
    (folder / "report.html").unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    whole = min(server(folder, work=work)["seconds"] for _ in range(3))
    page = folder / "report.html"
    random_delay, pages, kills = random.Random(3), set(), 0
    while kills < 2 * KILLS:
        page.unlink(missing_ok=True)
        kills += server(folder, work=work, delay=random_delay.uniform(0, 1.1 * whole))["killed"]
        pages.add(page.read_bytes() if page.exists() else b"")
        assert {path: path.read_bytes() for path in before} == before
    assert all(page.startswith(b"<!DOCTYPE html>") and page.endswith(b"</html>") for page in pages - {b""})


@reads_proc
@pytest.mark.slow
@pytest.mark.parametrize(
    "order",
    [
        {"work": "run"},
        {"work": "run", "measure": "background"},
        {"work": "replay", "workers": 2},
        {"work": "calibrate"},
    ],
    ids=lambda order: "-".join(map(str, order.values())),
)
def test_kills_among_data_loaders_and_measuring_processes_leave_no_process(server, order):
    """KILLS=100 tries as many moments of each."""
    undisturbed, kills, rounds, killed = lines(server.folder / "undisturbed"), 0, 0, []
    name = "-".join(map(str, order.values()))
    shutil.copytree(server.folder / "undisturbed", server.folder / f"first-{name}")
    whole = server(server.folder / f"first-{name}", loaders=True, **order)["seconds"]
    if order["work"] != "calibrate":
        whole = server(server.folder / f"whole-{name}", loaders=True, **order)["seconds"]
    random_delay = random.Random(5)
    while kills < int(os.environ.get("KILLS", "5")):
        rounds += 1
        folder, seen, answer = server.folder / f"many-{name}-{rounds}", b"", {"killed": True}
        if order["work"] == "calibrate":
            shutil.copytree(server.folder / "undisturbed", folder)
        while answer["killed"] and kills < int(os.environ.get("KILLS", "5")):
            answer = server(folder, delay=random_delay.uniform(0, 1.05 * whole), loaders=True, **order)
            seen = check_and_note(folder, seen)
            if answer["killed"]:
                kills += 1
                killed.append((time.monotonic(), answer["session"]))
            too_long = [of for at, of in killed if time.monotonic() - at > LEFT_SECONDS and of_session(of)]
            assert not too_long, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in of_session(too_long[0])]
        assert not server(folder, loaders=True, **order)["killed"]
        check_and_note(folder, seen)
        assert sorted(lines(folder).splitlines()) == sorted(undisturbed.splitlines())
    end = time.monotonic() + LEFT_SECONDS
    while any(of_session(session) for _, session in killed) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(of_session(session) for _, session in killed)


def test_a_last_line_torn_at_any_byte_is_measured_again(tmp_path):
    probe = make_probe()
    train(tmp_path / "run", steps=6, probe=probe)
    points = tmp_path / "run" / "points.jsonl"
    whole = points.read_bytes()
    last_point = Trajectory.read(points)[-1]
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(last, len(whole)):
        points.write_bytes(whole[:cut])
        folder = RunFolder(tmp_path / "run", probe.settings)
        assert folder.steps == {2, 4}
        assert points.read_bytes() == whole[:last]
        folder.append(last_point)
        folder.close()
        assert points.read_bytes() == whole


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_a_run_killed_in_its_first_line_starts_over_there(tmp_path, cut):
    probe = make_probe()
    train(tmp_path / "run", steps=4, probe=probe)
    points = tmp_path / "run" / "points.jsonl"
    whole = points.read_bytes()
    points.write_bytes(whole[:cut])
    monitor = train(tmp_path / "run", steps=4, probe=probe)
    assert points.read_bytes() == whole
    assert list(monitor.trajectory.steps) == [2, 4]


def test_a_kill_between_the_temporary_file_and_its_new_name(tmp_path, monkeypatch):
    """Whatever stands under a final name stays whole, and what was half written is cleared on resuming."""

    def killed(*_):
        raise SystemExit

    folder = RunFolder(tmp_path / "run", {"seed": 0})
    folder.append(a_point(1))
    folder.write_transitions([])
    folder.save(a_snapshot(1))
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file() and path.name != ".lock"}
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process tidies nothing up
        with pytest.raises(SystemExit):
            folder.write_transitions(find_transitions(rising_points()))
        with pytest.raises(SystemExit):
            folder.save(a_snapshot(2))
    (folder.path / "snapshots" / ".tmpA1b2C3").write_bytes(b"half")
    assert len(list(folder.path.rglob("*.unfinished"))) == 2
    folder.close()

    resumed = RunFolder(tmp_path / "run", {"seed": 0})
    after = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before
    assert resumed.snapshots.steps == (1,)
    resumed.close()


def test_reading_a_run_that_was_just_killed_needs_no_repair(tmp_path):
    folder = RunFolder(tmp_path / "run", {"seed": 0})
    for step in (1, 2):
        folder.append(a_point(step))
    folder.close()
    with open(tmp_path / "run" / "points.jsonl", "ab") as file:
        file.write(b'{"step": 3, "lo')
    assert list(Trajectory.read(tmp_path / "run" / "points.jsonl").steps) == [1, 2]
