"""A disk that refuses: whatever it says, and at whichever of the writes, training is the same and nothing is lost."""

import errno
import os
import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tiny_run import Told, lines, make_data, make_model, train
from torch.nn import functional as F

from phasewatch.callbacks.trainers import session
from phasewatch.callbacks.trainers.schedule import every
from phasewatch.monitor.errors import PhasewatchError, PhasewatchWarning
from phasewatch.monitor.snapshots.folder import SnapshotFolder

REASONS = ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO", "ESTALE"]
CHANGES = {"os.rename", "os.remove", "os.truncate", "os.mkdir"}


class Disk:
    """Refuses changes below a folder: those from `first` on, and from `last` on none; counts from 1."""

    folder, error, first, last, count = "", 0, 1, 0, 0

    def refuses(self, folder, reason, first, last):
        self.folder, self.error, self.first, self.last, self.count = str(folder), getattr(errno, reason), first, last, 0


disk = Disk()


def _hook(event, arguments):
    if not disk.folder:
        return
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if (writes or event in CHANGES) and str(arguments[0]).startswith(disk.folder):
        disk.count += 1
        if disk.first <= disk.count < disk.last:
            raise OSError(disk.error, os.strerror(disk.error))


sys.addaudithook(_hook)


@pytest.fixture(autouse=True)
def _mended(monkeypatch):
    monkeypatch.setattr(session, "write_report", lambda run: None)  # half a second, and nothing hangs on it
    yield
    disk.folder = ""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "write_report", lambda run: None)
        train(folder)
    return folder


@pytest.fixture(scope="module")
def alone():
    """The weights of a training without a monitor."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(12):
        x, y = make_data()
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    return list(model.parameters())


def trained(folder, alone, **options):
    """What was said of a training that has to be the one without a monitor."""
    model = make_model()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", PhasewatchWarning)
        train(folder, model=model, **options)
    assert all(map(torch.equal, alone, model.parameters()))
    return [str(warning.message) for warning in said]


@pytest.mark.parametrize(
    "reason", [REASONS[0], *(pytest.param(reason, marks=pytest.mark.slow) for reason in REASONS[1:])]
)
def test_a_disk_that_is_mended_before_the_end_has_everything(tmp_path, undisturbed, alone, reason):
    folder, told = tmp_path / "run", Told()

    def at(step):
        if step == 3:
            disk.refuses(folder, reason, 1, 10**9)
        if step == 9:
            disk.folder = ""
        return step % 2 == 0

    said = trained(folder, alone, at=at, sinks=[told])
    assert len(said) == 1
    assert f"can't be written to ({os.strerror(getattr(errno, reason))})" in said[0]
    assert lines(folder) == lines(undisturbed)
    assert [point.step for point in told.points] == [2, 4, 6, 8, 10, 12]
    assert SnapshotFolder(folder / "snapshots").steps == SnapshotFolder(undisturbed / "snapshots").steps


@pytest.mark.parametrize("reason", ["EDQUOT", pytest.param("EACCES", marks=pytest.mark.slow)])
def test_a_disk_that_is_mended_after_the_end_has_everything_once_the_run_is_resumed(
    tmp_path, undisturbed, alone, reason
):
    folder, told = tmp_path / "run", Told()

    def at(step):
        if step == 5:
            disk.refuses(folder, reason, 1, 10**9)
        return step % 2 == 0

    said = trained(folder, alone, at=at, sinks=[told])
    assert sum("can't be written to" in text for text in said) == 1
    assert [point.step for point in told.points] == [2, 4, 6, 8, 10, 12]
    assert lines(undisturbed).startswith(lines(folder)) != b""
    disk.folder = ""
    assert trained(folder, alone) == []
    assert lines(folder) == lines(undisturbed)


@pytest.mark.parametrize("apart", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_one_refusal_at_each_of_the_changes_costs_one_warning_and_no_point(tmp_path, undisturbed, alone, apart):
    disk.refuses(tmp_path / "counted", "EIO", 0, 0)
    assert trained(tmp_path / "counted", alone) == []
    last, refused = disk.count, {}
    for number in range(1, last + 1, apart):
        folder = tmp_path / f"run-{number}"
        disk.refuses(folder, "EDQUOT", number, number + 1)
        try:
            said = trained(folder, alone)
        except PhasewatchError as error:
            refused[number] = str(error)
            continue
        assert len(said) <= 1, (number, said)
        disk.folder = ""
        assert lines(folder) == lines(undisturbed), number
        assert SnapshotFolder(folder / "snapshots").steps == (2, 4, 6, 8, 10, 12), number
        assert {path.name for path in folder.iterdir()} >= {"run.json", "points.jsonl", "transitions.json", "snapshots"}
        assert trained(folder, alone, at=every(2)) == [], number
    # Before the first step, where the run's folder can't be made.
    assert refused
    assert max(refused) < 12 < last
    assert all("can't be" in text for text in refused.values())


def fill(path):
    """Write to a file until its disk takes no more."""
    with path.open("wb", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))
                    os.fsync(file.fileno())


@pytest.mark.skipif("SMALL_DISK" not in os.environ, reason="SMALL_DISK names a folder of which a few MB are free")
@pytest.mark.parametrize("measure", ["inline", "background"])
@pytest.mark.parametrize("last", [9, 99], ids=["mended before the end", "mended after the end"])
def test_a_disk_that_is_full_costs_one_warning_and_no_point(undisturbed, alone, measure, last):
    """A tmpfs of a few MB refuses with ENOSPC, a subvolume of btrfs with `btrfs qgroup limit` with EDQUOT."""
    with tempfile.TemporaryDirectory(dir=os.environ["SMALL_DISK"]) as parent:
        folder, filler = Path(parent, "run"), Path(parent, "filler")

        def at(step):
            if step == 5:
                fill(filler)
            if step == last:
                filler.unlink()
            return step % 2 == 0

        said = trained(folder, alone, at=at, measure=measure)
        assert sum("can't be written to" in text for text in said) == 1, said
        assert lines(undisturbed).startswith(lines(folder)) != b""
        if last > 12:
            filler.unlink()
            assert trained(folder, alone) == []
        assert lines(folder) == lines(undisturbed)
