import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from made_points import a_point, rising_points
from processes import environment
from safetensors import SafetensorError
from tiny_run import a_snapshot, lines, make_probe, no_room, one_warning, train

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.runs import folder as run_folder
from phasewatch.monitor.runs.folder import SCHEMA, RunFolder
from phasewatch.monitor.runs.replay import replay
from phasewatch.monitor.snapshots import folder as snapshot_folder
from phasewatch.monitor.snapshots.folder import SnapshotFolder
from phasewatch.monitor.snapshots.snapshot import Snapshot, same_weights
from phasewatch.monitor.trajectories.trajectory import Trajectory
from phasewatch.monitor.trajectories.transitions import find_transitions

SETTINGS = {"sampler": {"step_size": 3e-4, "draws": 200}, "seed": 0, "metrics": ["accuracy"], "data": "abc"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs" / "icl"


@pytest.fixture
def folder(path):
    folder = RunFolder(path, SETTINGS)
    yield folder
    folder.close()


def filled(path, *steps):
    folder = RunFolder(path, SETTINGS)
    for step in steps:
        folder.append(a_point(step))
    folder.close()
    return path / "points.jsonl"


def test_a_new_folder_says_what_its_points_are_measured_with(folder, path):
    header = json.loads((path / "run.json").read_text())
    assert header["schema"] == SCHEMA
    assert header["settings"] == SETTINGS
    assert header["versions"]["torch"] == version("torch")
    assert header["averaging"] is None
    assert (folder.points, folder.steps, folder.snapshots.steps) == ([], set(), ())


def test_a_point_is_on_disk_when_append_returns(folder, path):
    for number, step in enumerate((3, 1, 2), start=1):
        assert folder.append(a_point(step, llc=1 / 3))
        assert [json.loads(line) for line in lines(path).splitlines()][-1] == a_point(step, llc=1 / 3).as_json()
        assert len(lines(path).splitlines()) == number
    assert folder.steps == {1, 2, 3}


def test_reopening_finds_the_points_and_changes_no_byte(path):
    points = filled(path, 1, 2, 3)
    before = {file: file.read_bytes() for file in path.iterdir()}
    folder = RunFolder(path, SETTINGS)
    assert folder.points == [a_point(1), a_point(2), a_point(3)]
    folder.append(a_point(4))
    folder.close()
    assert points.read_bytes().startswith(before.pop(points))
    assert all(file.read_bytes() == content for file, content in before.items())
    assert list(Trajectory.read(points).steps) == [1, 2, 3, 4]


def test_other_settings_are_refused_by_name(path):
    filled(path, 1)
    changed = {**SETTINGS, "sampler": {"step_size": 1e-3, "draws": 200}, "seed": 1}
    message = (
        "was measured with other settings: sampler.step_size was 0.0003 and is 0.001; seed was 0 and is 1. "
        "Such points can't be compared: choose another run="
    )
    with pytest.raises(PhasewatchError, match=message):
        RunFolder(path, changed)
    RunFolder(path, SETTINGS).close()  # the lock was let go


def test_settings_are_compared_as_json_sees_them(path):
    RunFolder(path, {**SETTINGS, "shape": (1, 2)}).close()
    RunFolder(path, {**SETTINGS, "shape": [1, 2]}).close()


def test_a_second_monitor_in_this_process_is_refused(folder, path):
    with pytest.raises(PhasewatchError, match=r"Another monitor or replay is writing to run=.*Close it, or choose"):
        RunFolder(path, SETTINGS)
    folder.close()
    RunFolder(path, SETTINGS).close()


def test_a_second_monitor_in_another_process_is_refused_until_it_is_killed(path):
    path.mkdir(parents=True)
    hold = (
        "import sys; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); "
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, path / ".lock"]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(PhasewatchError, match="Another monitor or replay is writing"):
            RunFolder(path, SETTINGS)
        holder.kill()
        holder.wait()
        RunFolder(path, SETTINGS).close()


def test_a_newer_schema_is_refused(path):
    filled(path, 1)
    header = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**header, "schema": SCHEMA + 1}))
    with pytest.raises(
        PhasewatchError, match=f"has schema {SCHEMA + 1}, and this phasewatch reads and writes {SCHEMA}. Choose"
    ):
        RunFolder(path, SETTINGS)


@pytest.mark.parametrize("kept", [True, False])
def test_a_folder_of_the_first_schema_is_refused_with_what_to_do(path, kept):
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps({"schema": 1, "probe": SETTINGS, "torch": "2.0"}))
    if kept:
        SnapshotFolder(path / "snapshots").save(a_snapshot(1))
    advice = r" Its snapshots can be measured again: phasewatch replay .*snapshots --probe FILE.py:NAME --run NEW\."
    with pytest.raises(PhasewatchError, match=rf"has schema 1, .* Choose another run=\.{advice if kept else '$'}"):
        RunFolder(path, SETTINGS)
    assert not (path / "points.jsonl").exists()


def test_the_header_says_what_weights_are_averaged_over(path):
    folder = RunFolder(path, SETTINGS)
    folder.keep_averaging(0.2, "PhaseMonitor(average=0.2)")
    assert json.loads((path / "run.json").read_text())["averaging"] == 0.2
    folder.append(a_point(1))
    folder.close()
    folder = RunFolder(path, SETTINGS)
    folder.keep_averaging(0.2, "PhaseMonitor(average=0.2)")
    (path / "points.jsonl").unlink()  # the header is written again with the points
    folder.append(a_point(2))
    with pytest.raises(PhasewatchError, match=r"replay\(\.\.\.\): run='.*icl' holds .* taken with average=0\.2\. They"):
        folder.keep_averaging(None, "replay(...)")
    RunFolder(path, SETTINGS).close()  # the lock was let go
    assert json.loads((path / "run.json").read_text())["averaging"] == 0.2


def test_a_disk_that_refuses_the_averaging_is_named_and_the_lock_let_go(folder, path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_atomically", full_disk)
        with pytest.raises(PhasewatchError, match=r"can't be read or written .No space left on device"):
            folder.keep_averaging(0.2, "PhaseMonitor(average=0.2)")
    RunFolder(path, SETTINGS).close()


@pytest.mark.parametrize(
    "content",
    [b"", b'{"schema": 2', b"[]", b"null", b"7", b'{"schema": 2}', b"\xff\xfe", b'{"schema": 2, "settings": 3}'],
)
def test_a_damaged_header_is_refused(path, content):
    filled(path, 1)
    (path / "run.json").write_bytes(content)
    with pytest.raises(PhasewatchError, match=r"run.json is not .*hoose another run="):
        RunFolder(path, SETTINGS)


def test_points_of_unknown_settings_are_refused(path):
    filled(path, 1)
    (path / "run.json").unlink()
    with pytest.raises(PhasewatchError, match=r"holds points without a run.json that says what they were measured"):
        RunFolder(path, SETTINGS)


@pytest.mark.parametrize("line", [b"", b"{", b"[]", b"null", b'{"step": 2}', b"\xff", b"\0" * 20])
def test_a_damaged_line_is_named(path, line):
    points = filled(path, 1, 2, 3)
    content = points.read_bytes().splitlines()
    points.write_bytes(b"\n".join([content[0], line, content[2], b""]))
    before = points.read_bytes()
    with pytest.raises(PhasewatchError, match=r"Line 2 of .*points.jsonl is not .*; (correct|mend) (it )?or delete it"):
        RunFolder(path, SETTINGS)
    assert points.read_bytes() == before
    points.write_bytes(b"\n".join([content[0], content[2], b""]))
    folder = RunFolder(path, SETTINGS)
    assert folder.steps == {1, 3}
    folder.close()


@pytest.mark.parametrize("metrics", ["[]", "3"])
def test_a_line_of_odd_types_is_named(path, metrics):
    points = filled(path, 1)
    points.write_bytes(points.read_bytes().replace(b'{"accuracy": 0.5}', metrics.encode()))
    with pytest.raises(PhasewatchError, match=r"Line 1 of .*points.jsonl is not a point"):
        RunFolder(path, SETTINGS)


def test_points_that_contradict_each_other_are_refused_and_equal_ones_are_one(path):
    points = filled(path, 1, 2)
    content = points.read_bytes()
    points.write_bytes(content * 2)
    folder = RunFolder(path, SETTINGS)
    assert folder.points == [a_point(1), a_point(2)]
    folder.close()
    points.write_bytes(content + content.replace(b'"loss": 2.0', b'"loss": 3.0'))
    with pytest.raises(PhasewatchError, match=r"contradict each other\..*two different points at step 1"):
        RunFolder(path, SETTINGS)


@pytest.mark.parametrize("place", ["file", "under a file", "/proc/phasewatch"])
def test_a_place_that_can_hold_no_folder_is_refused(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    path = {"file": tmp_path / "file", "under a file": tmp_path / "file" / "run"}.get(place, Path(place))
    advice = "Choose a folder" if place.startswith("/proc") else "It is a file; give a folder"
    with pytest.raises(PhasewatchError, match=rf"run='.*' can't be written to \(.*\). {advice}"):
        RunFolder(path, SETTINGS)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_disk_that_is_full_from_the_start_is_refused_and_the_lock_let_go(path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_atomically", full_disk)
        with pytest.raises(PhasewatchError, match=r"can't be read or written .No space left on device"):
            RunFolder(path, SETTINGS)
    RunFolder(path, SETTINGS).close()


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_on_a_full_disk_points_wait_in_memory_and_are_written_when_they_can(folder, path):
    folder.append(a_point(1))
    with no_room(), one_warning(r"can't be written to \(No space left on device\).*waits in memory"):
        assert [folder.append(a_point(step)) for step in (2, 3, 4)] == [False] * 3
    assert folder.steps == {1, 2, 3, 4}
    assert folder.append(a_point(5))
    assert list(Trajectory.read(path / "points.jsonl")) == [a_point(step) for step in (1, 2, 3, 4, 5)]


def test_a_disk_that_has_room_again_at_the_end_gets_what_waited(path):
    folder = RunFolder(path, SETTINGS)
    with no_room(), one_warning("No space left"):
        folder.append(a_point(1))
    folder.close()
    assert list(Trajectory.read(path / "points.jsonl")) == [a_point(1)]


def test_what_could_never_be_written_is_counted_at_the_end(path):
    folder = RunFolder(path, SETTINGS)
    with no_room(), one_warning("No space left"):
        folder.append(a_point(1))
        folder.append(a_point(2))
    with no_room(), one_warning(r"2 points of .*points.jsonl were never written to disk; a replay"):
        folder.close()


LIMITED = """
import json, resource, sys, warnings
from phasewatch.monitor.errors import PhasewatchWarning
from phasewatch.monitor.runs.folder import RunFolder
from made_points import a_point
from tiny_run import a_snapshot, lines, one_warning
folder = RunFolder(sys.argv[1], {})
room = len(json.dumps(a_point(10).as_json())) * 2 + 50
resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    on_disk = [folder.append(a_point(step)) for step in range(10, 15)]
    torn = (folder.path / "points.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (60, resource.RLIM_INFINITY))
    saved = [folder.save(a_snapshot(1))]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
saved.append(folder.save(a_snapshot(1)))
on_disk.append(folder.append(a_point(15)))
folder.close()
print(json.dumps([on_disk, saved, torn == room, len(told), str(told[0].message)]))
"""


def test_a_disk_that_fills_up_within_a_line_leaves_no_half_line_behind(path):
    out = subprocess.run([sys.executable, "-c", LIMITED, path], env=environment(), check=True, stdout=subprocess.PIPE)
    on_disk, saved, torn, warned, message = json.loads(out.stdout)
    assert torn, "the limit was meant to be hit in the middle of a line"
    assert on_disk == [True, True, False, False, False, True]
    assert saved == [False, True]
    assert (warned, "File too large" in message) == (1, True)
    assert list(Trajectory.read(path / "points.jsonl").steps) == [10, 11, 12, 13, 14, 15]
    assert [file.name for file in (path / "snapshots").iterdir()] == ["step-00000001.safetensors"]


@pytest.mark.parametrize("deed", ["delete", "cut", "delete all"])
def test_points_that_somebody_deleted_meanwhile_are_written_again(folder, path, deed):
    for step in (1, 2):
        folder.append(a_point(step))
    if deed == "cut":
        os.truncate(path / "points.jsonl", 10)
    else:
        for file in path.iterdir() if deed == "delete all" else [path / "points.jsonl"]:
            file.unlink()
    folder.append(a_point(3))
    folder.close()
    again = RunFolder(path, SETTINGS)
    assert again.points == [a_point(1), a_point(2), a_point(3)]
    again.close()


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left on device (os error 28)")],
)
def test_a_snapshot_that_the_disk_refuses_costs_one_warning(folder, monkeypatch, error):
    def refuses(*_, **__):
        raise error

    with monkeypatch.context() as patch, one_warning("No space left on device"):
        patch.setattr(snapshot_folder, "save_file", refuses)
        assert not folder.save(a_snapshot(1))
        assert not folder.save(a_snapshot(2))
    assert folder.save(a_snapshot(1))
    assert folder.snapshots.steps == (1,)


def test_a_snapshot_that_the_format_lacks_a_type_for_raises_nothing(folder):
    odd = Snapshot(1, {"w": torch.zeros(2, dtype=torch.complex128)})
    with one_warning("complex128"):
        assert not folder.save(odd)


def test_transitions_that_the_disk_refuses_raise_nothing(folder, path, monkeypatch):
    folder.write_transitions([])
    assert (path / "transitions.json").read_text() == "[]\n"
    with monkeypatch.context() as patch, one_warning("No space left on device"):
        patch.setattr(run_folder, "write_atomically", full_disk)
        folder.write_transitions(find_transitions(rising_points()))
    assert (path / "transitions.json").read_text() == "[]\n"


def test_transitions_are_written_again_only_when_they_change_or_are_gone(folder, path, monkeypatch):
    written = []
    real = run_folder.write_atomically
    monkeypatch.setattr(run_folder, "write_atomically", lambda at, text: (written.append(at.name), real(at, text)))
    found = find_transitions(rising_points())
    for transitions in ([], [], found, found):
        folder.write_transitions(transitions)
    assert written == ["transitions.json"] * 2
    (path / "transitions.json").unlink()
    folder.write_transitions(found)
    assert written == ["transitions.json"] * 3
    folder.close()
    resumed = RunFolder(path, SETTINGS)
    resumed.write_transitions(found)
    resumed.close()
    assert written == ["transitions.json"] * 3


def test_a_full_disk_interrupts_nothing_where_warnings_are_errors(folder, path, capsys):
    with no_room(), warnings.catch_warnings():
        warnings.simplefilter("error")
        folder.append(a_point(1))
    assert "phasewatch: " in capsys.readouterr().err


def test_same_weights_compares_bit_for_bit():
    nan = float("nan")

    def of(**tensors):
        return Snapshot(1, {name: torch.as_tensor(tensor) for name, tensor in tensors.items()})

    assert same_weights(of(w=[1.0, nan]), of(w=[1.0, nan]))
    assert not same_weights(of(w=[1.0, nan]), of(w=[2.0, nan]))
    assert not same_weights(of(w=[1.0]), of(v=[1.0]))
    assert not same_weights(of(w=[1.0]), of(w=[1.0, 2.0]))
    assert not same_weights(of(w=[1, 2]), of(w=[1.0, 2.0]))
    assert same_weights(of(n=3, b=True, w=[[1.0], [2.0]]), of(n=3, b=True, w=[[1.0], [2.0]]))
    assert not same_weights(of(n=3), of(n=4))
    half = torch.tensor([1.5, 2.0]).to(torch.float8_e4m3fn)
    assert same_weights(of(w=half), of(w=half.clone()))


@pytest.mark.parametrize("name", ["run.json", "points.jsonl", ".lock", "snapshots"])
def test_a_link_in_the_folder_that_leads_out_is_refused(path, name):
    filled(path, 1)
    outside = path.parent / "outside"
    if name == "snapshots":
        outside.mkdir()
    else:
        outside.write_bytes((path / name).read_bytes())
        (path / name).unlink()
    before = os.stat(outside)
    (path / name).symlink_to(outside)
    with pytest.raises(PhasewatchError, match=r"leads out of|is a symbolic link, and only a regular file"):
        RunFolder(path, SETTINGS)
    assert os.stat(outside) == before
    assert not outside.is_dir() or not list(outside.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="named pipes")
@pytest.mark.parametrize("name", ["run.json", "points.jsonl", ".lock"])
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(path, name):
    filled(path, 1)
    (path / name).unlink(missing_ok=True)
    os.mkfifo(path / name)
    with pytest.raises(PhasewatchError, match=r"is a named pipe, and only a regular file can be"):
        RunFolder(path, SETTINGS)


@pytest.mark.parametrize("step", ["9223372036854775808", "-1", "1.5", "true", "1e400", "null"])
def test_a_step_that_is_none_is_refused_where_it_is_read(path, step):
    points = filled(path, 1)
    points.write_bytes(points.read_bytes().replace(b'"step": 1', b'"step": ' + step.encode()))
    with pytest.raises(PhasewatchError, match=r"Line 1 of .*points.jsonl is not a point"):
        RunFolder(path, SETTINGS)


def test_a_deleted_folder_comes_back_and_can_be_resumed(folder, path):
    folder.append(a_point(1))
    shutil.rmtree(path)
    with one_warning(r"was deleted or moved while this run writes to it.*earlier snapshots are not"):
        folder.append(a_point(2))
    with pytest.raises(PhasewatchError, match="Another monitor or replay"):
        RunFolder(path, SETTINGS)
    folder.close()
    assert RunFolder(path, SETTINGS).points == [a_point(1), a_point(2)]


def test_a_deleted_header_comes_back(folder, path):
    before = (path / "run.json").read_bytes()
    (path / "run.json").unlink()
    folder.append(a_point(1))
    assert (path / "run.json").read_bytes() == before


def test_a_folder_that_another_writer_has_taken_meanwhile_is_left_to_it(folder, path):
    path.rename(path.parent / "moved")
    other = RunFolder(path, SETTINGS)
    other.append(a_point(7))
    with one_warning(r"can't be written to \(another monitor or replay has begun there"):
        folder.append(a_point(1))
    other.close()
    assert RunFolder(path, SETTINGS).points == [a_point(7)]


def test_a_lock_that_another_thread_took_again_is_let_go(tmp_path):
    folder = RunFolder(tmp_path / "run", {})
    shutil.rmtree(folder.path)
    with one_warning("was deleted or moved"):
        thread = threading.Thread(target=folder.append, args=[a_point(1)])
        thread.start()
        thread.join()
    folder.close()
    RunFolder(tmp_path / "run", {}).close()


def test_a_folder_that_is_deleted_after_the_last_point_comes_back_at_the_end(tmp_path):
    folder = RunFolder(tmp_path / "run", {})
    folder.append(a_point(1))
    shutil.rmtree(folder.path)
    with one_warning("was deleted or moved"):
        folder.close()
    again = RunFolder(tmp_path / "run", {})
    assert again.steps == {1}
    again.close()


def test_a_snapshot_that_is_a_link_to_itself_costs_its_own_point(tmp_path):
    train(tmp_path / "run", steps=6, probe=make_probe())
    (tmp_path / "run" / "points.jsonl").unlink()
    snapshot = SnapshotFolder(tmp_path / "run" / "snapshots").source(2)
    snapshot.unlink()
    snapshot.symlink_to(snapshot.name)
    with one_warning("Step 2 is left out: .* can't be read"):
        points = list(replay(tmp_path / "run", make_probe(), run=tmp_path / "again"))
    assert [point.step for point in points] == [4, 6]
