"""Series in archives, on filesystems of fsspec and in git repositories are read as the folders that they hold."""

import hashlib
import os
import pickle
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import checkpoint_layouts as made
import fsspec
import pytest
import torch
from checkpoint_layouts import save, weights

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.snapshots.series import FetchedSeries, open_series

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Where files are fetched to; nothing may be left there."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.glob("phasewatch-*")) == []


@pytest.fixture
def checkpoints(tmp_path):
    """A folder of several layouts."""
    folder = tmp_path / "checkpoints"
    for step, make in {1: made.safetensors_file, 2: made.sharded, 3: made.torchtitan, 4: made.trainer_fsdp}.items():
        make(folder, step)
    save(folder / "final.pt", {"model": weights(5), "global_step": 5})
    (folder / "README.md").write_text("step 7")
    return folder


def assert_series(series):
    assert isinstance(series, FetchedSeries)
    assert series.steps == (1, 2, 3, 4, 5)
    for step in series.steps:
        found = pickle.loads(pickle.dumps(series)).load(step).tensors
        assert found.keys() == weights(step).keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in weights(step).items())


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
@pytest.mark.parametrize("inside", [True, False])
def test_an_archive_of_checkpoints(tmp_path, checkpoints, suffix, inside):
    kind = {".zip": "zip", ".tar": "tar", ".tar.gz": "gztar"}[suffix]
    above = {"root_dir": tmp_path, "base_dir": "checkpoints"} if inside else {"root_dir": checkpoints}
    archive = Path(shutil.make_archive(str(tmp_path / "packed"), kind, **above))
    shutil.rmtree(checkpoints)
    assert_series(open_series(archive))
    assert open_series(archive, revisions="step*").steps == (1, 3)


def test_a_folder_of_any_filesystem(checkpoints):
    memory = fsspec.filesystem("memory")
    memory.put(f"{checkpoints}/", "/bucket/run/checkpoints/", recursive=True)
    try:
        series = open_series("memory://bucket/run/checkpoints")
        assert_series(series)
        assert series.shapes(1) == {name: tuple(tensor.shape) for name, tensor in weights(1).items()}
        with pytest.raises(PhasewatchError, match="memory://bucket/none"):
            open_series("memory://bucket/none")
    finally:
        memory.rm("/bucket", recursive=True)


@pytest.mark.skipif(find_spec("s3fs") is not None, reason="s3fs is installed")
def test_a_filesystem_that_is_not_installed():
    words = r"open_series\('s3://bucket/run'\) needs the package s3fs, .*pip install 'phasewatch\[s3\]'"
    with pytest.raises(PhasewatchError, match=words):
        open_series("s3://bucket/run")
    with pytest.raises(PhasewatchError, match=r"open_series\('nothing://bucket'\): .* can't be read \(ValueError"):
        open_series("nothing://bucket")


@pytest.mark.parametrize(("protocol", "package"), [("sftp", "paramiko"), ("git", "pygit2"), ("abfs", "adlfs")])
def test_a_filesystem_whose_package_is_not_ours(protocol, package):
    if find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(PhasewatchError, match=f"needs a package that isn't installed .*{package}.*; install it"):
        open_series(f"{protocol}://host/folder")


def test_other_shapes_are_seen_before_anything_is_fetched(tmp_path, monkeypatch):
    memory = fsspec.filesystem("memory")
    save(tmp_path / "a" / "step1.safetensors", {"w": torch.ones(2)})
    save(tmp_path / "a" / "step2.safetensors", {"w": torch.ones(3)})
    memory.put(f"{tmp_path}/a/", "/shapes/", recursive=True)
    try:
        series = open_series("memory://shapes")
        fetched = []
        monkeypatch.setattr(type(series.store), "fetch", lambda self, name, *_: fetched.append(name))
        with pytest.raises(PhasewatchError, match=r"step2\.safetensors of .* isn't fetched: w has the shape \(3,\) "):
            series.load(2)
        assert fetched == []
    finally:
        memory.rm("/shapes", recursive=True)


def test_an_archive_that_leads_elsewhere_or_claims_too_much(tmp_path):
    with zipfile.ZipFile(tmp_path / "up.zip", "w") as archive:
        archive.writestr("step1/../../../outside.pt", b"x")
        archive.writestr("step1/model.pt", b"x")
    with pytest.raises(PhasewatchError, match="names no file in"):
        open_series(tmp_path / "up.zip")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("step1.pt", bytes(80 * 2**20))
    with pytest.raises(PhasewatchError, match="claims to hold far more than it can"):
        open_series(tmp_path / "bomb.zip")
    link = tarfile.TarInfo("step1.pt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tmp_path / "link.tar", "w") as archive:
        archive.addfile(link)
    with pytest.raises(PhasewatchError, match=r"found nothing; give the folder"):
        open_series(tmp_path / "link.tar")
    (tmp_path / "cut.zip").write_bytes(b"PK\x03\x04")
    with pytest.raises(PhasewatchError, match=r"cut\.zip can't be read \(BadZipFile"):
        open_series(tmp_path / "cut.zip")


def git(folder: Path, *arguments: str) -> str:
    own = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}
    return subprocess.run(
        ["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True, env=os.environ | own
    ).stdout


@pytest.fixture
def repository(tmp_path):
    """A repository as on a model hub: a branch for each step, the last one's weights on main, a pointer of LFS."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    for step in (1, 2, 3):
        git(folder, "checkout", "-q", "--orphan", f"step{step}")
        save(folder / "model.safetensors", weights(step))
        if step == 3:
            content = (folder / "model.safetensors").read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            kept = folder / ".git" / "lfs" / "objects" / digest[:2] / digest[2:4] / digest
            kept.parent.mkdir(parents=True)
            kept.write_bytes(content)
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(content)}\n"
            (folder / "model.safetensors").write_text(pointer)
        git(folder, "add", "model.safetensors")
        git(folder, "commit", "-q", "-m", "one")
    git(folder, "checkout", "-q", "-b", "main")
    return folder


def test_the_branches_of_a_repository(tmp_path, repository):
    git(tmp_path, "clone", "-q", "--bare", str(repository), str(tmp_path / "bare.git"))
    for folder in (repository, tmp_path / "bare.git"):
        series = open_series(folder)
        assert series.steps == (1, 2, 3)
        assert series.left_out == ("main",)
        assert all(torch.equal(series.load(2).tensors[name], tensor) for name, tensor in weights(2).items())
    assert torch.equal(open_series(repository).load(3).tensors["head.bias"], weights(3)["head.bias"])
    with pytest.raises(PhasewatchError, match=r"is a pointer of git LFS, and what it points to isn't here; run: git"):
        series.load(3)
    assert open_series(repository, revisions="*[12]").steps == (1, 2)
    assert open_series(repository, step=lambda path: 7 if path.name == "main" else None).steps == (7,)


def test_a_branch_that_moves_on_is_read_as_it_was(repository):
    series = open_series(repository)
    git(repository, "checkout", "-q", "step1")
    save(repository / "model.safetensors", weights(9))
    git(repository, "commit", "-q", "-am", "moved")
    assert torch.equal(series.load(1).tensors["head.bias"], weights(1)["head.bias"])


def test_nothing_that_a_repository_names_is_run(tmp_path, repository):
    trace = tmp_path / "trace"
    script = tmp_path / "run.sh"
    script.write_text(f"#!/bin/sh\ntouch {trace}\n")
    script.chmod(0o755)
    for name in ("core.fsmonitor", "core.pager", "core.sshCommand", "diff.external", "remote.origin.uploadpack"):
        git(repository, "config", name, str(script))
    git(repository, "config", "remote.origin.url", str(repository))
    git(repository, "config", "remote.origin.promisor", "true")
    git(repository, "config", "extensions.partialClone", "origin")
    blob = git(repository, "rev-parse", "step1:model.safetensors").strip()
    (repository / ".git" / "objects" / blob[:2] / blob[2:]).unlink()
    with pytest.raises(PhasewatchError, match="git can't read"):
        open_series(repository).load(1)
    assert torch.equal(open_series(repository).load(2).tensors["head.bias"], weights(2)["head.bias"])
    assert not trace.exists()
