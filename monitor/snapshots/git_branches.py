"""The branches and tags of a local git repository as checkpoints; nothing is checked out, run or fetched."""

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.files import inside
from phasewatch.monitor.formatting import printable
from phasewatch.monitor.snapshots.scan import Choice, wanted
from phasewatch.monitor.snapshots.steps import step_in_name
from phasewatch.monitor.snapshots.stores import Revisions, link_or_copy

_POINTER = re.compile(rb"version https://git-lfs[^\n]*\noid sha256:([0-9a-f]{64})\nsize \d+\n")

_ALONE = {
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_ALLOW_PROTOCOL": "none",  # a partial clone would fetch what it lacks, by a command that it may name itself
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_OPTIONAL_LOCKS": "0",
    "LC_ALL": "C",
}


@dataclass(frozen=True)
class GitBranches(Revisions):
    """Branches and tags of a repository on this machine.

    Attributes:
        repository: its folder, with `.git` inside or bare.
    """

    repository: Path

    def __str__(self) -> str:
        return str(self.repository)

    def files(self, name: str) -> Mapping[str, int]:
        """The regular files of a branch."""
        return {f"{name}/{path}": size for path, (_, size) in _tree(self.repository, self.commit(name)).items()}

    def fetch(self, name: str, file: str, to: Path) -> None:
        """Write a file of a branch; where it is a pointer of git LFS, what it points to.

        Raises:
            PhasewatchError: if that isn't here.
        """
        blob, _ = _tree(self.repository, self.commit(name))[file.removeprefix(f"{name}/")]
        with to.open("wb") as target:
            _git(self.repository, "cat-file", "blob", blob, stdout=target)
        if to.stat().st_size > 1000 or not (pointer := _POINTER.match(to.read_bytes())):
            return
        digest = pointer[1].decode()
        own = self.repository / ".git" if (self.repository / ".git").is_dir() else self.repository
        content = inside(own, f"lfs/objects/{digest[:2]}/{digest[2:4]}/{digest}")
        if not content.is_file():
            raise PhasewatchError(
                f"{printable(file)} of {self.repository} is a pointer of git LFS, and what it points to isn't here; "
                "run: git lfs fetch --all"
            )
        link_or_copy(content, to)

    def shapes(self, name: str) -> None:
        """Nothing: the files are on this machine."""


def is_repository(folder: Path) -> bool:
    """Whether a folder is a git repository, with a working tree or bare.

    Args:
        folder: any.
    """
    bare = (folder / "HEAD").is_file() and (folder / "objects").is_dir() and (folder / "refs").is_dir()
    return bare or (folder / ".git").is_dir()


def branches_of(folder: Path, choice: Choice) -> GitBranches | None:
    """The branches and tags of a repository, if any of those that are wanted carries a step.

    Args:
        folder: of the repository.
        choice: of the user.

    Raises:
        PhasewatchError: if git isn't there, or can't read it.
    """
    lines = _git(folder, "for-each-ref", "--format=%(refname)%00%(objectname)%00%(*objectname)").splitlines()
    commits: dict[str, str] = {}
    for line in lines:
        ref, commit, tagged = line.split("\0")
        kind, _, name = ref.removeprefix("refs/").partition("/")
        if kind == "remotes":
            name = name.partition("/")[2]
        if kind in {"heads", "remotes", "tags"} and name and name != "HEAD":
            commits.setdefault(name, tagged or commit)
    if not any(choice.step or step_in_name(name) is not None for name in commits if wanted(name, choice)):
        return None
    return GitBranches(tuple(sorted(commits.items())), folder)


@lru_cache(maxsize=8)
def _tree(repository: Path, commit: str) -> dict[str, tuple[str, int]]:
    """The regular files of a commit: the blob and its bytes by path."""
    found: dict[str, tuple[str, int]] = {}
    for line in _git(repository, "ls-tree", "-r", "-l", "-z", commit).split("\0"):
        described, _, path = line.partition("\t")
        mode, kind, blob, size = described.split() if path else ("", "", "", "")
        if kind == "blob" and mode.startswith("100"):
            found[path] = (blob, int(size) if size.isdigit() else 0)  # what is missing says so when it is read
    return found


def _git(repository: Path, *arguments: str, stdout: IO[bytes] | int = subprocess.PIPE) -> str:
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(repository), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            env=own | _ALONE,
            check=True,
        )
    except FileNotFoundError as error:
        raise PhasewatchError(f"{repository} is a git repository, and git isn't installed; install it.") from error
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines() or ["no reason"]
        raise PhasewatchError(f"git can't read {repository} ({said[0]}); mend the repository.") from error
    return (done.stdout or b"").decode(errors="surrogateescape")
