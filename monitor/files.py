"""One door for files that others may have made, and files that are whole under their name at every moment."""

import errno
import io
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import reduce
from operator import or_
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.formatting import integer, printable
from phasewatch.monitor.strict_json import MOST_DEPTH, parse_json

MOST_BYTES = 512 * 2**20
"""Tables and lines of points of more bytes are refused; four times what 200,000 points take."""

MOST_JSON_BYTES = 8 * 2**20
"""A JSON document of more bytes is refused. Parsed, the worst take 27 times their size, so 225 MB; the index of a
checkpoint with 20,000 tensors has 2 MB."""


def _flags(*names: str) -> int:
    """The flags of `os.open` that this system has."""
    return reduce(or_, (getattr(os, name, 0) for name in names))


_OPEN = _flags("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY")
_NO_LINK = _flags("O_NOFOLLOW")
_FOLDER = _flags("O_RDONLY", "O_NOFOLLOW", "O_DIRECTORY", "O_CLOEXEC")
_CAN_DESCEND = os.open in os.supports_dir_fd and bool(_NO_LINK)

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a symbolic link",
}


_ARRIVE: ContextVar[Callable[[str], None] | None] = ContextVar("arrive", default=None)


@contextmanager
def arriving(arrive: Callable[[str], None]) -> Iterator[None]:
    """Where files lie elsewhere: inside, each file is announced before it is opened, so that it can be fetched.

    Args:
        arrive: is told the path of a file, without links.
    """
    token = _ARRIVE.set(arrive)
    try:
        yield
    finally:
        _ARRIVE.reset(token)


def open_regular(path: str | Path, *, within: str | Path | None = None, most_bytes: int | None = None) -> BinaryIO:
    """Open a regular file to read, and nothing else: no pipe that never ends, no device, no folder.

    Args:
        path: the file. Symbolic links are followed, in its folders too.
        within: the folder that no link may lead out of; None where the user named the file itself.
        most_bytes: the largest size; None for no bound.

    Returns:
        The open file, to be closed by the caller.

    Raises:
        PhasewatchError: if it isn't there, is none, is too large, can't be opened, or lies outside.

    >>> open_regular(".")
    Traceback (most recent call last):
    phasewatch.monitor.errors.PhasewatchError: . is a folder, and only a regular file can be read; give another path.
    """
    name = printable(path)
    try:
        real = os.path.realpath(_possible(path), strict=True)
        root = None if within is None else os.path.realpath(_possible(within), strict=True)
        if root is not None and not _lies_in(real, root):
            raise _outside(name, within)
        if arrive := _ARRIVE.get():
            arrive(real)
        _check_kind(os.lstat(real), name, "read")  # before as well, since opening alone can make a device act
        file = os.fdopen(_open_below(real, root), "rb")
    except OSError as error:
        raise _unreadable(name, error) from error
    try:
        status = os.fstat(file.fileno())
        _check_kind(status, name, "read")
        if most_bytes is not None and status.st_size > most_bytes:
            raise _too_large(name, most_bytes)
        if hasattr(os, "O_NONBLOCK"):
            os.set_blocking(file.fileno(), True)
    except BaseException:
        file.close()
        raise
    return file


def read_bytes(path: str | Path, *, within: str | Path | None = None, most_bytes: int = MOST_BYTES) -> bytes:
    """What a regular file holds.

    Args:
        path: the file.
        within: the folder that no link may lead out of; None where the user named the file itself.
        most_bytes: the largest size, kept to even if the file grows while it is read.

    Returns:
        Its bytes.

    Raises:
        PhasewatchError: as `open_regular`, and if reading fails.
    """
    content = io.BytesIO()
    try:
        with open_regular(path, within=within, most_bytes=most_bytes) as file:
            while piece := file.read(2**20):
                content.write(piece)
                if content.tell() > most_bytes:
                    raise _too_large(printable(path), most_bytes)
    except OSError as error:
        raise _unreadable(printable(path), error) from error
    return content.getvalue()


def read_text(path: str | Path, *, within: str | Path | None = None, most_bytes: int = MOST_BYTES) -> str:
    """The text of a regular file in UTF-8, without a byte order mark.

    Args:
        path: the file.
        within: the folder that no link may lead out of; None where the user named the file itself.
        most_bytes: the largest size.

    Returns:
        Its text, line ends as they are.

    Raises:
        PhasewatchError: as `read_bytes`, and if it isn't UTF-8.
    """
    try:
        return read_bytes(path, within=within, most_bytes=most_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PhasewatchError(
            f"{printable(path)} is not text in UTF-8 (its byte {error.start} is none); copy or save it again."
        ) from error


def read_json(
    path: str | Path,
    *,
    within: str | Path | None = None,
    most_bytes: int = MOST_JSON_BYTES,
    most_depth: int = MOST_DEPTH,
    allow_nan: bool = False,
) -> Any:
    """The value of a JSON file.

    Args:
        path: the file.
        within: the folder that no link may lead out of; None where the user named the file itself.
        most_bytes: the largest size.
        most_depth: how deep lists and objects may nest.
        allow_nan: as for `parse_json`.

    Returns:
        Plain Python values.

    Raises:
        PhasewatchError: as `read_text` and `parse_json`.
    """
    text = read_text(path, within=within, most_bytes=most_bytes)
    return parse_json(text, printable(path), most_depth, allow_nan=allow_nan)


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write beside a file and rename, so that a reader or a killed process leaves the old one or the new one.

    A symbolic link at `path` is replaced, and what it leads to stays as it is.

    Args:
        path: the file, replaced if it is there.
        content: what it is to hold; text as UTF-8, with half surrogates written as escapes.

    Raises:
        PhasewatchError: if no file can have this path.
        OSError: if the disk refuses it.
    """
    with replacing(path) as unfinished, open(unfinished, "r+b") as file:
        file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A new, empty file beside `path` that takes its place when the block ends, and is removed if the block raises.

    Its name starts with a dot, ends in `.unfinished` and can't be guessed, so that nothing can lie there already.

    Args:
        path: the file, replaced if it is there; a symbolic link is replaced itself.

    Yields:
        The path to write to.

    Raises:
        PhasewatchError: if no file can have this path.
        OSError: if the disk refuses it.
    """
    unfinished = Path(_possible(path)).parent / f".{secrets.token_hex(16)}.unfinished"
    try:
        os.close(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK | _OPEN, 0o666))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        yield unfinished
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def open_append(path: str | Path) -> BinaryIO:
    """Open a regular file to append to, made if it isn't there; never through a symbolic link.

    Args:
        path: the file.

    Returns:
        The open file, at its end.

    Raises:
        PhasewatchError: if there is a link, anything else than a regular file, or one that has another name as well.
        OSError: if the disk refuses it.
    """
    name = printable(path)
    _possible(path)
    with suppress(FileNotFoundError):
        _check_kind(os.lstat(path), name, "written")
    try:
        file = os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _NO_LINK | _OPEN, 0o666), "ab")
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENXIO}:  # what took the file's place since it was looked at
            _check_kind(os.lstat(path), name, "written")
        raise
    try:
        status = os.fstat(file.fileno())
        _check_kind(status, name, "written")
        if status.st_nlink > 1:
            raise PhasewatchError(f"{name} is also a file elsewhere (a hard link), which would change; copy it.")
        if hasattr(os, "O_NONBLOCK"):
            os.set_blocking(file.fileno(), True)
    except BaseException:
        file.close()
        raise
    return file


def create_new(path: str | Path) -> bool:
    """Make an empty file unless something is there already, a link too: of several processes that try, one succeeds.

    Args:
        path: the file.

    Returns:
        Whether it was made.

    Raises:
        OSError: if the disk refuses it.
    """
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK | _OPEN, 0o666))
    except FileExistsError:
        return False
    return True


def inside(folder: str | Path, name: object) -> Path:
    """The path that a name from a file stands for, which can't leave the folder on any system.

    Args:
        folder: the folder that the name belongs to.
        name: as it was read, with `/` between folders; anything but text is refused.

    Returns:
        `folder / name`, whether or not it is there.

    Raises:
        PhasewatchError: if it is no name, is absolute, has a drive or `..`, or a link leads out of the folder.

    >>> inside("checkpoints", "part-1/model.safetensors").as_posix()
    'checkpoints/part-1/model.safetensors'
    """
    shown = f"'{printable(name)}'"
    parts = PureWindowsPath(name) if isinstance(name, str) and _is_possible(name) else PureWindowsPath()
    if not isinstance(name, str) or not parts.parts or parts.anchor or ".." in parts.parts:
        raise PhasewatchError(
            f"{shown} names no file in {printable(folder)}; use a relative name without '..', "
            "or copy what names it again."
        )
    path = Path(folder) / name
    if not _lies_in(os.path.realpath(path), os.path.realpath(folder)):
        raise _outside(shown, folder)
    return path


def _possible(path: str | Path) -> str | Path:
    if not _is_possible(os.fspath(path)):
        raise PhasewatchError(f"{printable(path)} can't be the name of a file on this system; give another path.")
    return path


def _is_possible(name: str) -> bool:
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def leads_out(path: str | Path, folder: str | Path) -> bool:
    """Whether a link at a path, or above it, leads out of a folder.

    Args:
        path: any path.
        folder: the folder.
    """
    return not _lies_in(os.path.realpath(path), os.path.realpath(folder))


def _lies_in(real: str, root: str) -> bool:
    """Whether one path without links is another, or lies below it."""
    return Path(real).is_relative_to(root)


def _open_below(real: str, root: str | None) -> int:
    """Open a path without links, one folder after another, so that a link made meanwhile is refused."""
    flags = os.O_RDONLY | _NO_LINK | _OPEN
    if root is None or real == root or not _CAN_DESCEND:
        return os.open(real, flags)
    *folders, last = Path(real).relative_to(root).parts
    below = os.open(root, _FOLDER)
    try:
        for folder in folders:
            above, below = below, os.open(folder, _FOLDER, dir_fd=below)
            os.close(above)
        return os.open(last, flags, dir_fd=below)
    finally:
        os.close(below)


def _check_kind(status: os.stat_result, name: str, done: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no file")
        raise PhasewatchError(f"{name} is {kind}, and only a regular file can be {done}; give another path.")


def _outside(name: str, folder: str | Path | None) -> PhasewatchError:
    return PhasewatchError(f"{name} leads out of {printable(folder)}; put the file itself there, not a link to it.")


def _too_large(name: str, most: int) -> PhasewatchError:
    return PhasewatchError(f"{name} has more than {integer(most)} bytes, the most that is read; give a smaller file.")


def _unreadable(name: str, error: OSError) -> PhasewatchError:
    if isinstance(error, FileNotFoundError):
        return PhasewatchError(f"{name} is not there; check the path.")
    if isinstance(error, PermissionError):
        return PhasewatchError(f"{name} can't be read ({error.strerror}); check its permissions.")
    return PhasewatchError(f"{name} can't be read ({error.strerror or error}); check the path and the disk.")
