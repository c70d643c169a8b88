import errno
import os
import socket
import stat
import subprocess
import sys
import threading

import pytest

from phasewatch.monitor import files
from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.files import (
    inside,
    open_append,
    open_regular,
    read_bytes,
    read_json,
    read_text,
    replacing,
    write_atomically,
)

pytestmark = pytest.mark.timeout(20)  # what waits for a pipe's other end fails, and doesn't hang the suite

posix = pytest.mark.skipif(os.name == "nt", reason="pipes, devices and links that anybody may make")


@pytest.fixture
def run(tmp_path):
    """A folder to stay in, beside a secret and a folder of secrets."""
    folder = tmp_path / "run"
    (folder / "snapshots").mkdir(parents=True)
    (folder / "points.jsonl").write_bytes(b"points")
    (folder / "snapshots" / "a").write_bytes(b"weights")
    (tmp_path / "outside").mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "outside" / "a").write_bytes(b"secret")
    return folder


# Reading


def test_a_regular_file_is_read_whole(run):
    assert read_bytes(run / "points.jsonl") == read_bytes(str(run / "points.jsonl"), within=run) == b"points"
    with open_regular(run / "snapshots" / "a", within=run) as file:
        assert (file.read(3), file.seek(0), file.read()) == (b"wei", 0, b"weights")
        assert os.get_blocking(file.fileno())


def test_relative_paths_are_of_the_current_folder(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    assert read_bytes("run/points.jsonl", within="run") == b"points"
    monkeypatch.chdir(run)
    assert read_bytes("points.jsonl", within=".") == b"points"
    with pytest.raises(PhasewatchError, match=r"^\.\./secret leads out of \.; put the file itself there"):
        read_bytes("../secret", within=".")


@posix
def test_a_pipe_without_a_writer_is_refused_at_once(run):
    os.mkfifo(run / "pipe")
    (run / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(PhasewatchError, match=rf"run/{name} is a named pipe, and only a regular file can be read"):
            open_regular(run / name, within=run)


@posix
def test_a_pipe_that_takes_the_place_of_a_file_after_the_look_is_refused_too(run, monkeypatch):
    os.mkfifo(run / "pipe")
    before = os.lstat(run / "points.jsonl")
    monkeypatch.setattr(files.os, "lstat", lambda path: before)
    with pytest.raises(PhasewatchError, match="is a named pipe"):
        open_regular(run / "pipe")
    with pytest.raises(OSError, match="pipe") as caught:
        open_append(run / "pipe")
    assert caught.value.errno == errno.ENXIO


@posix
def test_devices_sockets_and_folders_are_refused(run, tmp_path, monkeypatch):
    (run / "zero").symlink_to("/dev/zero")
    for path, within in [("/dev/zero", None), (run / "zero", None)]:
        with pytest.raises(PhasewatchError, match="zero is a device, and only a regular file can be read"):
            read_bytes(path, within=within)
    with pytest.raises(PhasewatchError, match=r"run/zero leads out of .*run; put"):
        read_bytes(run / "zero", within=run)
    with pytest.raises(PhasewatchError, match="snapshots is a folder"):
        read_bytes(run / "snapshots", within=run)
    with pytest.raises(PhasewatchError, match="run is a folder"):
        read_bytes(run, within=run)
    monkeypatch.chdir(tmp_path)  # a socket's path has at most some 100 characters
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("run/socket")
        with pytest.raises(PhasewatchError, match="run/socket is a socket"):
            read_bytes("run/socket", within="run")


@posix
def test_links_that_stay_inside_are_followed_and_those_out_are_not(run):
    (run / "latest").symlink_to("snapshots/a")
    (run / "also").symlink_to(run / "snapshots")
    (run.parent / "alias").symlink_to("run")
    (run / "out").symlink_to("../secret")
    (run / "folder-out").symlink_to(run.parent / "outside")
    assert read_bytes(run / "latest", within=run) == read_bytes(run / "also" / "a", within=run) == b"weights"
    assert read_bytes(run.parent / "alias" / "also" / "a", within=run.parent / "alias") == b"weights"
    for name in ("out", "folder-out/a", "../secret", "snapshots/../../secret"):
        with pytest.raises(PhasewatchError, match=r"leads out of .*/run; put the file itself there, not a link to it"):
            open_regular(run / name, within=run)
    assert read_bytes(run / "out") == b"secret"  # which the user named


def test_a_folder_of_the_same_beginning_is_outside(run):
    sibling = run.with_name("run-2")
    sibling.mkdir()
    (sibling / "a").write_bytes(b"secret")
    with pytest.raises(PhasewatchError, match=r"leads out of .*/run;"):
        read_bytes(sibling / "a", within=run)


@posix
@pytest.mark.parametrize("swapped", ["snapshots/a", "snapshots"])
def test_a_link_made_between_check_and_opening_is_refused(run, swapped, monkeypatch):
    look = os.lstat

    def swap(path):
        status = look(path)
        monkeypatch.setattr(files.os, "lstat", look)
        os.rename(run / swapped, run / "away")
        (run / swapped).symlink_to(run.parent / "outside" / "a" if swapped.endswith("a") else run.parent / "outside")
        return status

    monkeypatch.setattr(files.os.path, "realpath", lambda path, strict=False: str(path))
    monkeypatch.setattr(files.os, "lstat", swap)
    with pytest.raises(PhasewatchError, match=r"snapshots/a can't be read \((Too many levels|Not a directory)"):
        read_bytes(run / "snapshots" / "a", within=run)


@posix
def test_a_circle_of_links_is_a_sentence(run):
    (run / "a").symlink_to("b")
    (run / "b").symlink_to("a")
    with pytest.raises(PhasewatchError, match=r"run/a can't be read \(Too many levels of symbolic links\)"):
        read_bytes(run / "a", within=run)


def test_no_more_is_read_than_was_asked_for(run):
    assert read_bytes(run / "points.jsonl", most_bytes=6) == b"points"
    with pytest.raises(PhasewatchError, match=r"points\.jsonl has more than 5 bytes, the most that is read; give"):
        open_regular(run / "points.jsonl", most_bytes=5)


@posix
def test_a_sparse_file_is_refused_by_its_size_and_a_growing_one_by_what_comes(run, monkeypatch):
    with open(run / "sparse", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(PhasewatchError, match="sparse has more than 536 870 912 bytes"):
        read_bytes(run / "sparse")
    monkeypatch.setattr(files, "open_regular", lambda *_, **__: open("/dev/zero", "rb"))
    with pytest.raises(PhasewatchError, match="grows has more than 3 000 000 bytes"):
        read_bytes("grows", most_bytes=3_000_000)


def test_what_is_not_there_or_not_allowed_is_a_sentence(run):
    with pytest.raises(PhasewatchError, match=r"run/none is not there; check the path\.$"):
        read_bytes(run / "none", within=run)
    with pytest.raises(PhasewatchError, match=r"a/b can't be read \(Not a directory\)"):
        read_bytes(run / "snapshots" / "a" / "b")
    with pytest.raises(PhasewatchError, match=r"can't be read \(File name too long\)"):
        read_bytes(run / ("a" * 5000))
    for name in ("nul\0byte", "half\ud800"):
        with pytest.raises(PhasewatchError, match=r"(nul\\x00byte|half\\ud800) can't be the name of a file"):
            read_bytes(name)


@posix
def test_permissions_are_a_sentence(run, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.os, "open", refuse)  # the superuser of a container may read everything
    with pytest.raises(PhasewatchError, match=r"points.jsonl can't be read \(Permission denied\); check its permiss"):
        read_bytes(run / "points.jsonl")


@posix
def test_names_are_shown_without_their_escape_sequences(run):
    path = run / "a\x1b[31m\nphasewatch: all fine"
    path.write_bytes(b"\xff")
    with pytest.raises(PhasewatchError, match=r"a\\x1b\[31m\\nphasewatch: all fine is not text in UTF-8") as caught:
        read_text(path, within=run)
    assert str(caught.value).isprintable()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no names that are no text")
def test_names_that_are_no_text_are_read(run):
    path = run / os.fsdecode(b"\xff.csv")
    path.write_bytes(b"step")
    assert read_text(path) == "step"


def test_nothing_stays_open(run):
    held = len(os.listdir("/dev/fd")) if os.path.isdir("/dev/fd") else 0
    for _ in range(5):
        read_bytes(run / "snapshots" / "a", within=run)
        for call in (lambda: read_bytes(run / "snapshots" / "a", within=run, most_bytes=1), lambda: open_append(run)):
            with pytest.raises(PhasewatchError):
                call()
    assert (len(os.listdir("/dev/fd")) if os.path.isdir("/dev/fd") else 0) == held


def test_text_and_json(run):
    (run / "bom.json").write_bytes(b'\xef\xbb\xbf{"name": "\xc3\xa9"}\r\n')
    assert read_text(run / "bom.json", within=run) == '{"name": "é"}\r\n'
    assert read_json(run / "bom.json", within=run) == {"name": "é"}
    (run / "deep.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(PhasewatchError, match=r"run/deep.json nests deeper than 64 levels; mend or delete it\.$"):
        read_json(run / "deep.json", within=run)
    (run / "large.json").write_text(f"[{' ' * files.MOST_JSON_BYTES}]")
    with pytest.raises(PhasewatchError, match=r"large.json has more than 8 388 608 bytes"):
        read_json(run / "large.json", within=run)


def test_without_opening_below_a_folder_links_out_are_refused_all_the_same(run, monkeypatch):
    monkeypatch.setattr(files, "_CAN_DESCEND", False)
    (run / "out").symlink_to("../secret")
    assert read_bytes(run / "snapshots" / "a", within=run) == b"weights"
    with pytest.raises(PhasewatchError, match="leads out of"):
        read_bytes(run / "out", within=run)


# Names


@pytest.mark.parametrize("name", ["a", "points.jsonl", "snapshots/a", "./new", "new/er/file", "step:100.pt", "ü..pt"])
def test_names_inside_are_paths(run, name):
    assert inside(run, name) == run / name


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            ".",
            "..",
            "../secret",
            "snapshots/../../secret",
            "a/..",
            "/etc/passwd",
            "//host/share/file",
            "nul\0byte",
        ),
        *("..\\secret", "a\\..\\..\\b", "\\windows", "C:\\secret", "c:secret", "C:/secret", "\\\\host\\share\\file"),
        *("half\ud800", None, 3, ["a"], {"a": "b"}, True, b"a"),
    ],
)
def test_names_that_may_leave_a_folder_are_refused(run, name):
    with pytest.raises(PhasewatchError, match=r"^'.*' names no file in .*/run; use a relative name without '\.\.'"):
        inside(run, name)


@posix
def test_names_that_leave_a_folder_by_a_link_are_refused(run):
    (run / "out").symlink_to("../secret")
    (run / "folder-out").symlink_to("../outside")
    (run / "nowhere").symlink_to("/nonexistent/file")
    (run / "latest").symlink_to("snapshots")
    for name in ("out", "folder-out/a", "folder-out/new", "nowhere"):
        with pytest.raises(PhasewatchError, match=rf"^'{name}' leads out of .*/run; put the file itself there"):
            inside(run, name)
    assert read_bytes(inside(run, "latest/a")) == b"weights"


# Writing


def test_what_is_written_is_there_and_nothing_beside_it(run):
    write_atomically(run / "new", "é\ud800\r\n")
    write_atomically(str(run / "points.jsonl"), b"\0\xff")
    assert (run / "new").read_bytes() == b"\xc3\xa9\\ud800\r\n"
    assert (run / "points.jsonl").read_bytes() == b"\0\xff"
    assert sorted(os.listdir(run)) == ["new", "points.jsonl", "snapshots"]


@posix
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_are_those_of_a_plain_open(run, mask):
    before = os.umask(mask)
    try:
        write_atomically(run / "atomic", "")
        open_append(run / "appended").close()
        open(run / "plain", "w").close()
    finally:
        os.umask(before)
    plain = stat.S_IMODE(os.stat(run / "plain").st_mode)
    assert plain == 0o666 & ~mask
    assert stat.S_IMODE(os.stat(run / "atomic").st_mode) == stat.S_IMODE(os.stat(run / "appended").st_mode) == plain


@posix
def test_a_file_in_no_folder_is_named_in_the_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/a\.png'$"), replacing(tmp_path / "nowhere" / "a.png"):
        pass


def test_a_link_in_the_place_of_a_file_is_replaced(run):
    victim = run.parent / "secret"
    for name, target in [("report.html", victim), ("dangling", run.parent / "none"), ("zero", "/dev/zero")]:
        (run / name).symlink_to(target)
        write_atomically(run / name, "page")
        assert not (run / name).is_symlink()
        assert (run / name).read_text() == "page"
    assert victim.read_bytes() == b"secret"
    assert not (run.parent / "none").exists()


@posix
def test_links_under_temporary_names_are_never_followed(run, monkeypatch):
    victim = run.parent / "secret"
    (run / "report.html.unfinished").symlink_to(victim)
    write_atomically(run / "report.html", "page")
    assert (run / "report.html").read_text() == "page"
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "guessed")
    (run / ".guessed.unfinished").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_atomically(run / "report.html", "another")
    assert victim.read_bytes() == b"secret"
    assert (run / "report.html").read_text() == "page"
    assert (run / ".guessed.unfinished").is_symlink()  # not ours to remove


def test_temporary_names_differ(run):
    with replacing(run / "a") as first, replacing(run / "a") as second:
        assert first != second
        assert first.parent == second.parent == run
        first.write_bytes(b"1")
        second.write_bytes(b"2")
    assert (run / "a").read_bytes() == b"1"  # the outer block ends last


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(run, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(run / "points.jsonl", "new")
    with pytest.raises(KeyboardInterrupt), replacing(run / "points.jsonl"):
        raise KeyboardInterrupt
    monkeypatch.undo()
    with pytest.raises(OSError, match="directory"):
        write_atomically(run / "snapshots", "a folder is in the way")
    with pytest.raises(FileNotFoundError):
        write_atomically(run / "none" / "a", "")
    monkeypatch.chdir(run)
    with pytest.raises(OSError, match=r"'\.'"):
        write_atomically(".", "")
    with pytest.raises(PhasewatchError, match=r"nul\\x00byte can't be the name of a file"):
        write_atomically("nul\0byte", "")
    assert (run / "points.jsonl").read_bytes() == b"points"
    assert sorted(os.listdir(run)) == ["points.jsonl", "snapshots"]


def test_readers_see_the_old_or_the_new_file(run):
    texts = ["a" * 100_000, "b" * 200_000]
    write_atomically(run / "file", texts[0])
    seen, done = set(), threading.Event()

    def read():
        while not done.is_set():
            seen.add(read_text(run / "file"))

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(50):
        write_atomically(run / "file", texts[i % 2])
    done.set()
    reader.join()
    assert seen <= set(texts)


def test_lines_are_appended(run):
    for line in (b"1\n", b"2\n"):
        with open_append(run / "points.jsonl") as file:
            file.write(line)
    with open_append(run / "points.jsonl") as file:
        assert file.tell() == len(b"points1\n2\n")
        file.truncate(8)
        file.write(b"3\n")
    assert (run / "points.jsonl").read_bytes() == b"points1\n3\n"


@posix
def test_nothing_is_appended_to_anything_but_a_file(run):
    victim = run.parent / "secret"
    (run / "out").symlink_to(victim)
    (run / "dangling").symlink_to(run.parent / "none")
    os.mkfifo(run / "pipe")
    for path, kind in [
        (run / "out", "a symbolic link"),
        (run / "dangling", "a symbolic link"),
        (run / "pipe", "a named pipe"),
        (run / "snapshots", "a folder"),
        ("/dev/null", "a device"),
    ]:
        with pytest.raises(PhasewatchError, match=f"is {kind}, and only a regular file can be written"):
            open_append(path)
    assert victim.read_bytes() == b"secret"
    assert not (run.parent / "none").exists()


@posix
def test_a_link_made_after_the_look_is_not_appended_to(run, monkeypatch):
    look, before = os.lstat, os.lstat(run / "points.jsonl")
    looks = iter([lambda path: before])
    monkeypatch.setattr(files.os, "lstat", lambda path: next(looks, look)(path))
    (run / "out").symlink_to("../secret")
    with pytest.raises(PhasewatchError, match="out is a symbolic link"):
        open_append(run / "out")
    assert (run.parent / "secret").read_bytes() == b"secret"


@posix
def test_a_device_that_takes_the_place_of_a_file_after_the_look_is_not_written(run, monkeypatch):
    before = os.lstat(run / "points.jsonl")
    monkeypatch.setattr(files.os, "lstat", lambda path: before)
    with pytest.raises(PhasewatchError, match="null is a device, and only a regular file can be written"):
        open_append("/dev/null")


def test_the_disk_s_own_errors_stay_for_those_who_wait(run):
    with pytest.raises(FileNotFoundError):
        open_append(run / "deleted" / "points.jsonl")


@posix
def test_a_process_that_meets_a_pipe_ends(run):
    os.mkfifo(run / "pipe")
    code = "import sys; from phasewatch.monitor.files import read_bytes; read_bytes(sys.argv[1])"
    ended = subprocess.run(
        [sys.executable, "-c", code, str(run / "pipe")], capture_output=True, text=True, timeout=15, check=False
    )
    assert "is a named pipe" in ended.stderr


def test_a_file_that_has_another_name_elsewhere_is_not_appended_to(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("no line end")
    os.link(tmp_path / "precious", tmp_path / "run" / "points.jsonl")
    with pytest.raises(PhasewatchError, match=r"points.jsonl is also a file elsewhere \(a hard link\)"):
        open_append(tmp_path / "run" / "points.jsonl")
    assert (tmp_path / "precious").read_text() == "no line end"
