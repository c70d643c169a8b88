"""Processes that share the work on a run, wherever they run: each has a file of its own that only it appends to.

A member shows that it lives by appending a line every few seconds. Others judge it by whether its file grows, on their
own clock: the clocks of two machines may differ, and so may the times that a network file system gives to files.
"""

import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from phasewatch.monitor.errors import PhasewatchError, in_words, say
from phasewatch.monitor.files import open_append, open_regular
from phasewatch.monitor.strict_json import parse_json

try:
    import fcntl
except ImportError:  # Windows: members are judged by their lines alone
    fcntl = None

BEAT_SECONDS = 5.0
"""Seconds between two signs of life."""

STALE_SECONDS = 60.0
"""A member whose file hasn't grown for so many seconds counts as gone, and what it had begun is measured again. NFS may
show a change that much later, at its default settings."""

HANG_SECONDS = 120.0
"""A process that measures and has not used its processor for so many seconds counts as hung: its parent ends it, or it
gives no more signs of life. A measurement may take days, but none of it waits for two minutes, except for a disk or a
network that is gone."""

BEAT_WORK = 0.005
"""Processor seconds between two beats from which a process counts as being at work: the beat itself takes a
hundredth."""

MOST_UNREAD_BYTES = 64 * 2**20
"""The most that is read of a member's file at a time; the rest follows with the next reading."""


class Member:
    """This process as one of those that share a run: its file, and the thread that shows that it lives.

    Args:
        folder: of the members' files.
        hello: what the others have to know of this one; plain JSON values.

    Raises:
        PhasewatchError: if the file can't be made.
    """

    def __init__(self, folder: Path, hello: Mapping[str, Any]) -> None:
        host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:40]
        self.name = f"{host}-{os.getpid()}-{secrets.token_hex(4)}"
        self.path = folder / f"{self.name}.jsonl"
        self.busy = False
        self._lock = threading.Lock()
        self._unsaved: list[bytes] = []
        self._end = 0
        self._complained = False
        self._closing = threading.Event()
        try:
            self._file = open_append(self.path)
        except OSError as error:
            raise PhasewatchError(f"{self.path} can't be written ({error.strerror or error}).") from error
        locked = _lock(self._file, shared=False)
        self.write({"hello": {**hello, "machine": machine(), "locked": locked}})
        self._beats = threading.Thread(target=self._beat, name="phasewatch-beat", daemon=True)
        self._beats.start()

    @property
    def is_lost(self) -> bool:
        """Whether somebody deleted the file, so that nobody reads it any more."""
        return os.fstat(self._file.fileno()).st_nlink == 0

    def write(self, record: Mapping[str, Any]) -> bool:
        """Append a line.

        Args:
            record: plain JSON values.

        Returns:
            Whether it is on disk. A disk that refuses it is tried again with the next line or sign of life.
        """
        with self._lock:
            self._unsaved.append(json.dumps(record).encode() + b"\n")
            return self._save()

    def leave(self, *, most_seconds: float = STALE_SECONDS) -> None:
        """Say that no more comes, after what the disk has refused so far.

        Args:
            most_seconds: how long to try.
        """
        if self._closing.is_set():
            return
        end = time.monotonic() + most_seconds
        done = self.write({"left": True})
        while not done and not self.is_lost and time.monotonic() < end:
            time.sleep(1.0)
            with self._lock:
                done = self._save()
        if not done:
            say(f"{self.path} can't be written; {len(self._unsaved)} lines of it are lost and will be measured again.")
        self._closing.set()
        self._beats.join()
        self._file.close()

    def _save(self) -> bool:
        descriptor, content = self._file.fileno(), b"".join(self._unsaved)
        rest = memoryview(content)
        try:
            if os.fstat(descriptor).st_size > self._end:  # a write was cut short
                os.ftruncate(descriptor, self._end)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        except OSError as error:
            if not self._complained:
                self._complained = True
                say(f"{self.path} can't be written ({error.strerror or error}); it is tried again.")
            return False
        self._end += len(content)
        self._unsaved.clear()
        return True

    def _beat(self) -> None:
        used, active, count = 0.0, time.monotonic(), 0
        while not self._closing.wait(BEAT_SECONDS):
            now = time.process_time()
            if not self.busy or now - used > BEAT_WORK:
                active = time.monotonic()
            used = now
            if time.monotonic() - active < HANG_SECONDS:
                count += 1
                self.write({"beat": count})


class Tail:
    """The lines of a file that another process appends to: each once, when it is whole.

    A line that isn't JSON, such as the zeros that a network file system may show for a moment, is waited for.

    Args:
        path: the file.
        within: the folder that no link may lead out of.
    """

    def __init__(self, path: Path, within: Path) -> None:
        self._path = path
        self._within = within
        self._place = 0
        self._number = 0
        self._complained = False

    def read(self) -> list[Any]:
        """The new lines' values.

        Raises:
            PhasewatchError: if the file can't be read.
        """
        with open_regular(self._path, within=self._within) as file:
            file.seek(self._place)
            content = file.read(MOST_UNREAD_BYTES)
        found = []
        for line in content.split(b"\n")[:-1]:
            try:
                found.append(parse_json(line.decode(), f"Line {self._number + 1} of {self._path}", allow_nan=True))
            except (UnicodeDecodeError, PhasewatchError) as error:
                if not self._complained and line.strip(b"\0"):
                    self._complained = True
                    say(f"{self._path} isn't read further: {in_words(error)}")
                break
            self._number += 1
            self._place += len(line) + 1
        return found


class Peer:
    """Another member, as seen from here.

    Args:
        path: its file.
        within: the folder that no link may lead out of.
        clock: of this process, in seconds.
    """

    def __init__(self, path: Path, within: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = path.stem
        self.hello: Mapping[str, Any] = {}
        self.has_left = False
        self._path = path
        self._within = within
        self._tail = Tail(path, within)
        self._clock = clock
        self._grew = clock()

    def read(self) -> list[dict[str, Any]]:
        """The records that it appended since the last reading; none if it can't be read."""
        if self.has_left:
            return []
        try:
            records = [record for record in self._tail.read() if isinstance(record, dict)]
        except PhasewatchError:
            return []
        if records:
            self._grew = self._clock()
        for record in records:
            if isinstance(hello := record.get("hello"), dict):
                self.hello = hello
            self.has_left = self.has_left or "left" in record
        return records

    @property
    def silent_seconds(self) -> float:
        """Seconds of this process's clock since the file was last seen to grow."""
        return self._clock() - self._grew

    def is_gone(self) -> bool:
        """Whether nothing more can be expected of it: it left, its process ended, or it gives no sign of life."""
        return self.has_left or self.silent_seconds > STALE_SECONDS or self._has_ended()

    def _has_ended(self) -> bool:
        """Whether its process on this machine has let go of its lock; False where that can't be known."""
        if self.hello.get("machine") != machine() or self.hello.get("locked") is not True:
            return False
        try:
            with open_regular(self._path, within=self._within) as file:
                return _lock(file, shared=True)
        except PhasewatchError:
            return False


def machine() -> str:
    """What tells machines apart, however their clocks go: the random number of this boot, or the host's name."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return socket.gethostname()


def _lock(file: BinaryIO, *, shared: bool) -> bool:
    """Take the lock of a file if nobody else has it; the system lets go of it when the file or the process ends."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file.fileno(), (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
