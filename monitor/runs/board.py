"""What is to be measured and who has taken it, as files in a run's folder: `work/tasks.jsonl` and `work/claims/`.

A replay shares its steps out as tasks, one line each, numbered from 0. A worker takes a task by making a file of the
task's number, which only one can. Nothing is ever taken back: where a worker is gone, its step is shared out again, as
a new task.
"""

import hashlib
import json
import os
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from phasewatch.monitor.errors import LARGEST_STEP, PhasewatchError
from phasewatch.monitor.files import create_new, inside, open_append, read_bytes
from phasewatch.monitor.runs.members import Peer, Tail

FOLDER = "work"
"""In a run's folder: the tasks, the claims and the members' files."""


class Board:
    """The files by which a replay and its workers share the steps of a run.

    Args:
        run: the run's folder.

    Raises:
        PhasewatchError: if a link leads out of it.
    """

    def __init__(self, run: str | Path) -> None:
        self.run = Path(run)
        self.members = inside(self.run, f"{FOLDER}/members")
        self.claims = inside(self.run, f"{FOLDER}/claims")
        self._lines = self.run / FOLDER / "tasks.jsonl"
        self._tail = Tail(self._lines, self.run)
        self.tasks: list[int | None] = []
        """The step of each line; None for a line that is no task."""
        self.driver = ""
        """The member that shares the tasks out."""
        self.sessions = 0
        """How many have done so, one after another."""
        self.settings = ""
        """What its points are measured with, see `digest`."""
        self.has_ended = False
        """Whether the replay is over."""

    @property
    def is_there(self) -> bool:
        """Whether a replay has ever shared its work out here."""
        return os.path.lexists(self._lines)

    def make(self) -> None:
        """Make the folders, and cut off a line that a killed process left unfinished.

        Raises:
            PhasewatchError: if they can't be made.
        """
        try:
            for folder in (self.members, self.claims):
                folder.mkdir(parents=True, exist_ok=True)
            with open_append(self._lines) as file:
                content = read_bytes(self._lines, within=self.run)
                if (end := content.rfind(b"\n") + 1) < len(content):
                    file.truncate(end)
        except OSError as error:
            raise PhasewatchError(f"{self.run / FOLDER} can't be written ({error.strerror or error}).") from error

    def refresh(self) -> None:
        """Read the lines that are new.

        Raises:
            PhasewatchError: if they can't be read.
        """
        for record in self._tail.read():
            record = record if isinstance(record, dict) else {}
            step = record.get("step")
            is_step = isinstance(step, int) and not isinstance(step, bool) and 0 <= step <= LARGEST_STEP
            self.tasks.append(step if is_step else None)
            if isinstance(driver := record.get("driver"), str):
                self.driver = driver
                self.sessions += 1
                settings = record.get("settings", self.settings)
                if settings != self.settings:  # points of others don't count, and so their tasks don't
                    self.settings = str(settings)
                    self.tasks[:] = [None] * len(self.tasks)
            self.has_ended = "end" in record

    def post(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append lines, in one write.

        Raises:
            PhasewatchError: if the disk refuses them.
        """
        try:
            with open_append(self._lines) as file:
                file.write(b"".join(json.dumps(record).encode() + b"\n" for record in records))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise PhasewatchError(f"{self._lines} can't be written ({error.strerror or error}).") from error

    def claim(self, name: str) -> bool:
        """Take what only one can take.

        Args:
            name: a task's number, or `driver-` and a session's.

        Returns:
            Whether it was free.
        """
        return create_new(self.claims / name)

    def claimed(self) -> set[str]:
        """The names of what is taken. A network file system may show them late; `claim` knows at once."""
        return set(os.listdir(self.claims))

    def is_claimed(self, name: str) -> bool:
        """Whether something is taken."""
        return os.path.lexists(self.claims / name)

    def driver_peer(self) -> Peer | None:
        """The member that shares the tasks out; None if its name is none."""
        if not self.driver:
            return None
        with suppress(PhasewatchError):
            return Peer(inside(self.members, f"{self.driver}.jsonl"), self.run)
        return None


class Chooser:
    """Takes tasks for one worker, in an order of its own, so that workers seldom try the same.

    Args:
        board: what the tasks are on.
    """

    def __init__(self, board: Board) -> None:
        self._board = board
        self._random = random.Random()
        self._seen = 0
        self._free: list[int] = []

    def take(self, most: int) -> list[int]:
        """Claim tasks.

        Args:
            most: how many at most. Fewer are taken where more members could take what is left.

        Returns:
            Their numbers; none if none is free.
        """
        self._note_new()
        taken: list[int] = []
        share = 1 if most == 1 else min(most, -(-len(self._free) // max(1, self._members())))
        while self._free and len(taken) < share:
            task = self._free.pop()
            if self._board.claim(str(task)):
                taken.append(task)
            else:
                self._drop_claimed()
        return taken

    def likely(self, most: int) -> list[int]:
        """The tasks that `take` would try next."""
        self._note_new()
        return self._free[::-1][:most]

    def _note_new(self) -> None:
        """Put the tasks that are new among the free ones, in random order."""
        new = [task for task in range(self._seen, len(self._board.tasks)) if self._board.tasks[task] is not None]
        self._seen = len(self._board.tasks)
        if new:
            self._free += new
            self._random.shuffle(self._free)
            self._drop_claimed()

    def _drop_claimed(self) -> None:
        claimed = self._board.claimed()
        self._free = [task for task in self._free if str(task) not in claimed]

    def _members(self) -> int:
        return len(os.listdir(self._board.members)) - 1  # the replay itself is one


def digest(settings: Mapping[str, Any]) -> str:
    """A short name for a probe's settings, by which points of others are told apart.

    Args:
        settings: plain JSON values.

    Returns:
        16 hexadecimal digits.

    Example:
        >>> digest({"seed": 0})
        'de7d7744ccd7722e'
    """
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
