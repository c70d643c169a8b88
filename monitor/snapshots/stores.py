"""Checkpoints that lie elsewhere, in an archive or behind a network: their files are fetched when they are read."""

import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from phasewatch.monitor.errors import PhasewatchError, in_words, missing_package
from phasewatch.monitor.files import MOST_JSON_BYTES, arriving, inside
from phasewatch.monitor.formatting import printable
from phasewatch.monitor.snapshots.formats.base import stem_of
from phasewatch.monitor.snapshots.steps import step_in_name
from phasewatch.monitor.strict_json import parse_json

SMALL_BYTES = 2**20
"""While a series is opened, larger files are fetched only if their names carry no step."""

_MOST_UNPACKED = 100
"""An archive that unpacks to more than this many times its size, and 64 MiB, is refused: no weights pack so well."""

_ARCHIVES = {".zip": "zip", ".tar": "tar", ".tar.gz": "tar", ".tgz": "tar", ".tar.bz2": "tar", ".tar.xz": "tar"}


class Store(Protocol):
    """Where checkpoints lie, each under a name. An instance can be sent to another process."""

    def names(self) -> list[str]:
        """What may be a checkpoint: files, folders or revisions."""
        ...

    def files(self, name: str) -> Mapping[str, int]:
        """The files of one, by their path with the name in front, and their bytes."""
        ...

    def fetch(self, name: str, file: str, to: Path) -> None:
        """Write a file's bytes over an empty file here."""
        ...

    def shapes(self, name: str) -> Mapping[str, tuple[int, ...]] | None:
        """The shapes of one's tensors if they can be told from a few bytes, without fetching it."""
        ...


@contextmanager
def borrowed(store: Store, names: Collection[str], *, opening: bool = False) -> Iterator[Path]:
    """A folder that looks as if it held the files of some checkpoints; each is fetched when it is first opened.

    Args:
        store: where they lie.
        names: of the checkpoints.
        opening: fetch no large file whose checkpoint has a step in its name.

    Yields:
        The folder, which is removed with all that was fetched.
    """
    with tempfile.TemporaryDirectory(prefix="phasewatch-", ignore_cleanup_errors=True) as folder:
        root = Path(folder).resolve()
        waiting: dict[str, tuple[str, str, int]] = {}
        for name in names:
            for file, size in store.files(name).items():
                path = inside(root, file)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
                waiting[str(path)] = (name, file, size)

        def arrive(path: str) -> None:
            if path not in waiting:
                return
            name, file, size = waiting[path]
            if opening and size > SMALL_BYTES and step_in_name(stem_of(Path(name))) is not None:
                raise PhasewatchError(f"{printable(file)} isn't fetched yet.")
            _checked_fetch(store, name, file, Path(path))
            del waiting[path]

        with arriving(arrive):
            yield root


def _checked_fetch(store: Store, name: str, file: str, to: Path) -> None:
    try:
        store.fetch(name, file, to)
    except (PhasewatchError, MemoryError):
        raise
    except Exception as error:
        raise PhasewatchError(
            f"{printable(file)} of {store} can't be fetched ({in_words(error)}); try again, or copy it here."
        ) from error


@dataclass(frozen=True)
class Revisions:
    """A store whose checkpoints are the revisions of a repository; a subclass lists and fetches their files.

    Attributes:
        commits: of each branch and tag by its name.
    """

    commits: tuple[tuple[str, str], ...]

    def names(self) -> list[str]:
        """Of the branches and tags."""
        return [name for name, _ in self.commits]

    def commit(self, name: str) -> str:
        """The commit that a branch had when the series was opened."""
        return dict(self.commits)[name]


class Tree:
    """A store that lists all of its files at once; each file or folder at its top is a checkpoint.

    A subclass has `listing`, and reads the bytes.
    """

    def listing(self) -> Mapping[str, int]:
        """Every file by its path, and its bytes."""
        raise NotImplementedError

    def names(self) -> list[str]:
        """What lies at the top."""
        return sorted({file.partition("/")[0] for file in self.listing() if not file.startswith(".")})

    def files(self, name: str) -> dict[str, int]:
        """The file of that name, or those in the folder."""
        return {file: size for file, size in self.listing().items() if file == name or file.startswith(f"{name}/")}


@dataclass(frozen=True)
class FilesystemStore(Tree):
    """A folder of any filesystem that fsspec knows: an archive, s3, gs, memory.

    Attributes:
        protocol: fsspec's name of it.
        at: the folder, or the archive's own path.
        root: the folder inside, empty for all of it.
    """

    protocol: str
    at: str
    root: str = ""

    def __str__(self) -> str:
        return self.at

    def listing(self) -> Mapping[str, int]:
        """Every regular file below the folder, and its bytes."""
        return {path: size for path, (_, size) in _listing(self).items()}

    def fetch(self, name: str, file: str, to: Path) -> None:
        """Copy a file here, and not more bytes than were listed."""
        own, size = _listing(self)[file]
        with _filesystem(self).open(own, "rb") as source, to.open("wb") as target:
            while size > 0 and (piece := source.read(min(size, 2**22))):
                size -= len(piece)
                target.write(piece)

    def shapes(self, name: str) -> Mapping[str, tuple[int, ...]] | None:
        """From the headers of its safetensors files."""
        if self.protocol in _ARCHIVES.values():  # fetched from this machine's own disk
            return None
        found: dict[str, tuple[int, ...]] = {}
        for file in header_files(self.files(name), name):
            filesystem, (own, _) = _filesystem(self), _listing(self)[file]
            length = int.from_bytes(filesystem.cat_file(own, 0, 8), "little")
            text = filesystem.cat_file(own, 8, 8 + min(length, MOST_JSON_BYTES)).decode()
            header = parse_json(text, f"The header of {file}")
            header.pop("__metadata__", None)
            if any(one["dtype"].startswith("C") for one in header.values()):
                return None  # a complex tensor has one dimension more where it is sampled
            found |= {name: tuple(one["shape"]) for name, one in header.items()}
        return found or None


def header_files(files: Collection[str], name: str) -> list[str]:
    """The safetensors files that a checkpoint is read from.

    Args:
        files: of the checkpoint.
        name: its own.
    """
    if name in files:
        return [name] if name.endswith(".safetensors") else []
    there = {file.removeprefix(f"{name}/"): file for file in files}
    whole = [there[file] for file in ("model.safetensors", "adapter_model.safetensors") if file in there]
    return whole[:1] or [there[file] for file in sorted(there) if file.startswith("model-") and "-of-" in file]


def archive_protocol(path: Path) -> str | None:
    """The protocol that opens an archive, by its name; None if it is none.

    Args:
        path: a file.
    """
    name = path.name.lower()
    return next((protocol for suffix, protocol in _ARCHIVES.items() if name.endswith(suffix)), None)


def open_store(protocol: str, at: str, call: str) -> FilesystemStore:
    """A store of fsspec, at the folder that holds the checkpoints if all lies in one.

    Args:
        protocol: fsspec's name of the filesystem.
        at: the folder, or the archive's own path.
        call: what the user typed.

    Raises:
        PhasewatchError: if it can't be opened or listed, or an archive unpacks to far more than it holds.
    """
    store = FilesystemStore(protocol, at)
    with _said(call, at):
        while len(names := store.names()) == 1 and not store.listing().get(names[0]) and _is_holder(store, names[0]):
            store = FilesystemStore(protocol, at, f"{store.root}{names[0]}/")
        if protocol in _ARCHIVES.values():
            packed, unpacked = Path(at).stat().st_size, sum(store.listing().values())
            if unpacked > _MOST_UNPACKED * packed + 64 * 2**20:
                raise PhasewatchError(f"{call}: the archive claims to hold far more than it can; unpack it yourself.")
    return store


def _is_holder(store: FilesystemStore, name: str) -> bool:
    return step_in_name(name) is None and all(file.count("/") > 1 or "/" in file for file in store.files(name))


@contextmanager
def _said(call: str, at: str) -> Iterator[None]:
    try:
        yield
    except (PhasewatchError, MemoryError):
        raise
    except ImportError as error:
        missing = error.__cause__ or error
        said = missing_package(missing, call) if isinstance(missing, ModuleNotFoundError) else missing
        if not isinstance(said, PhasewatchError):
            said = PhasewatchError(f"{call} needs a package that isn't installed ({in_words(error)}); install it.")
        raise said from error
    except Exception as error:
        raise PhasewatchError(f"{call}: {printable(at)} can't be read ({in_words(error)}); check it.") from error


@lru_cache(maxsize=8)
def _filesystem(store: FilesystemStore) -> Any:
    import fsspec

    if store.protocol in _ARCHIVES.values():
        return fsspec.filesystem(store.protocol, fo=store.at)
    return fsspec.core.url_to_fs(store.at)[0]


@lru_cache(maxsize=8)
def _listing(store: FilesystemStore) -> Mapping[str, tuple[str, int]]:
    """The regular files below the folder, no links: what the filesystem calls each, and its bytes."""
    filesystem = _filesystem(store)
    top = "" if store.protocol in _ARCHIVES.values() else filesystem._strip_protocol(store.at)
    begin = f"{top.strip('/')}/{store.root}".lstrip("/")
    found: dict[str, tuple[str, int]] = {}
    for own, info in sorted(filesystem.find(top, detail=True).items()):
        path = own.removeprefix("./").lstrip("/")
        if info.get("type") == "file" and not info.get("linkname") and path.startswith(begin):
            found[path.removeprefix(begin)] = (own, int(info.get("size") or 0))
    return found


def link_or_copy(source: Path, to: Path) -> None:
    """Put a file of this machine in the place of an empty one, without copying it if that can be.

    Args:
        source: the file.
        to: the empty one.
    """
    real = source.resolve()
    to.unlink()
    try:
        to.hardlink_to(real)
    except OSError:
        shutil.copyfile(real, to)
