"""Checkpoint series that lie on a model hub: branches by their names, or folders of one revision. Commits are pinned.

This is the only file that asks for `huggingface_hub`, and it is asked only where the user typed `hf://`.
"""

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from phasewatch.monitor.errors import PhasewatchError, in_words, requires
from phasewatch.monitor.files import inside, write_atomically
from phasewatch.monitor.formatting import printable
from phasewatch.monitor.snapshots.scan import Choice, wanted
from phasewatch.monitor.snapshots.steps import step_in_name
from phasewatch.monitor.snapshots.stores import Revisions, Tree, header_files, link_or_copy

_ADDRESS = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/]+))?(?P<folder>(?:/[^/]+)*)/?")


@dataclass(frozen=True)
class HubBranches(Revisions):
    """Branches and tags of a repository on a hub, each at the commit that it had when the series was opened.

    Attributes:
        repo: such as "EleutherAI/pythia-410m".
        keep: keep what is fetched in the hub's cache.
    """

    repo: str
    keep: bool = False

    def __str__(self) -> str:
        return f"hf://{self.repo}"

    def files(self, name: str) -> Mapping[str, int]:
        """The files of a branch."""
        return {f"{name}/{path}": size for path, size in _tree(self.repo, self.commit(name)).items()}

    def fetch(self, name: str, file: str, to: Path) -> None:
        """Download a file of a branch, or take it from the cache."""
        _fetch(self.repo, self.commit(name), file.removeprefix(f"{name}/"), to, name if self.keep else None)

    def shapes(self, name: str) -> Mapping[str, tuple[int, ...]] | None:
        """The shapes in a branch's safetensors files, from their first bytes."""
        files = header_files(self.files(name), name)
        return _shapes(self.repo, self.commit(name), [file.removeprefix(f"{name}/") for file in files])


@dataclass(frozen=True)
class HubFolder(Tree):
    """Folders and files in one revision of a repository on a hub, each a checkpoint.

    Attributes:
        repo: such as "org/model".
        commit: of the revision.
        folder: in the repository, with a slash behind it; empty for all of it.
        keep: the revision's name if what is fetched is kept in the hub's cache.
    """

    repo: str
    commit: str
    folder: str
    keep: str | None = None

    def __str__(self) -> str:
        return f"hf://{self.repo}/{self.folder}".rstrip("/")

    def listing(self) -> Mapping[str, int]:
        """The files below the folder."""
        files = _tree(self.repo, self.commit).items()
        return {path.removeprefix(self.folder): size for path, size in files if path.startswith(self.folder)}

    def fetch(self, name: str, file: str, to: Path) -> None:
        """Download a file, or take it from the cache."""
        _fetch(self.repo, self.commit, f"{self.folder}{file}", to, self.keep)

    def shapes(self, name: str) -> Mapping[str, tuple[int, ...]] | None:
        """The shapes in a checkpoint's safetensors files, from their first bytes."""
        files = header_files(self.files(name), name)
        return _shapes(self.repo, self.commit, [f"{self.folder}{file}" for file in files])


def open_hub(address: str, call: str, choice: Choice, *, keep: bool) -> HubBranches | HubFolder | Path:
    """Where the checkpoints of a repository lie.

    Args:
        address: what stands after `hf://`: ORG/NAME, ORG/NAME@REVISION, either with a folder behind.
        call: what the user typed.
        choice: of the user.
        keep: keep what is fetched in the hub's cache.

    Returns:
        The branches if any that is wanted carries a step, else the folders of the main one. Where the hub's
        environment says offline, the folder of its cache.

    Raises:
        PhasewatchError: if the address is none, the hub can't be asked, or it has no such repository.
    """
    parts = _ADDRESS.fullmatch(address)
    if not parts:
        raise PhasewatchError(f"{call} must be hf://ORG/NAME, with @REVISION or a folder behind it if need be.")
    with requires(call):
        from huggingface_hub import constants
    repo, folder = parts["repo"], parts["folder"].strip("/")
    if constants.HF_HUB_OFFLINE:
        cache = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
        if not cache.is_dir():
            raise PhasewatchError(f"{call}: HF_HUB_OFFLINE is set, and {cache} isn't there; unset it to download.")
        return cache
    with _asking(call):
        if parts["revision"] is None and not folder:
            refs = _api().list_repo_refs(repo)
            commits = {ref.name: ref.target_commit for ref in (*refs.tags, *refs.branches)}
            if any(choice.step or step_in_name(name) is not None for name in commits if wanted(name, choice)):
                return HubBranches(tuple(sorted(commits.items())), repo, keep)
        revision = parts["revision"] or "main"
        commit = str(_api().repo_info(repo, revision=revision).sha)
        return HubFolder(repo, commit, f"{folder}/" if folder else "", revision if keep else None)


@contextmanager
def _asking(call: str) -> Iterator[None]:
    try:
        yield
    except PhasewatchError:
        raise
    except Exception as error:
        raise PhasewatchError(
            f"{call}: the hub gave no answer that can be used ({printable(in_words(error))}). Check the name and the "
            "network; what is in the cache is opened by its folder, .../hub/models--ORG--NAME."
        ) from error


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=_endpoint())


@lru_cache(maxsize=8)
def _tree(repo: str, commit: str) -> dict[str, int]:
    listed = _api().list_repo_tree(repo, revision=commit, recursive=True)
    return {entry.path: int(entry.size) for entry in listed if hasattr(entry, "size")}


def _shapes(repo: str, commit: str, files: list[str]) -> dict[str, tuple[int, ...]] | None:
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        header = _api().parse_safetensors_file_metadata(repo, file, revision=commit)
        if any(tensor.dtype.startswith("C") for tensor in header.tensors.values()):
            return None  # a complex tensor has one dimension more where it is sampled
        found |= {name: tuple(tensor.shape) for name, tensor in header.tensors.items()}
    return found or None


def _fetch(repo: str, commit: str, file: str, to: Path, keep: str | None) -> None:
    """Download a file into the cache of the hub if it is to be kept there, and only to its place if not."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    if keep is not None or isinstance(try_to_load_from_cache(repo, file, revision=commit), str):
        link_or_copy(Path(hf_hub_download(repo, file, revision=commit, endpoint=_endpoint())), to)
        if keep is not None:
            refs = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "refs"
            refs.mkdir(exist_ok=True)
            inside(refs, keep).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(inside(refs, keep), commit)
        return
    with tempfile.TemporaryDirectory(prefix=".phasewatch-", dir=to.parent, ignore_cleanup_errors=True) as folder:
        os.replace(hf_hub_download(repo, file, revision=commit, endpoint=_endpoint(), local_dir=folder), to)
