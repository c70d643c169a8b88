"""When a monitor measures: while training waits, or beside it."""

import queue
import threading
from contextlib import suppress
from typing import Protocol

from phasewatch.callbacks.trainers.backlog import Backlog
from phasewatch.monitor.errors import PhasewatchError, in_words, warn
from phasewatch.monitor.snapshots.snapshot import Snapshot

DISK_SECONDS = 120.0
"""Seconds that a disk may take for one file before nothing waits for it any more: several gigabytes on a slow one."""

SHORTEST_WAIT = 0.5
"""Seconds between two looks at what waits, where a snapshot waits that can't be measured yet."""


class Measuring(Protocol):
    """Takes snapshots from the training thread, and has them saved and measured."""

    def take(self, snapshot: Snapshot) -> None:
        """Take one."""
        ...

    def finish(self, seconds: float | None = None) -> None:
        """Save what was taken, and end after the measurement that is under way.

        Args:
            seconds: how long to wait for either; None waits until they are done.

        Raises:
            PhasewatchError: if the disk hangs.
        """
        ...

    def abandon(self) -> None:
        """End as soon as possible, without waiting."""
        ...


class Inline:
    """Saves and measures before the training step goes on.

    Args:
        backlog: what waits.
    """

    def __init__(self, backlog: Backlog) -> None:
        self._backlog = backlog

    def take(self, snapshot: Snapshot) -> None:
        """Save it, and measure as much as the plan allows."""
        self._backlog.take(snapshot)
        while self._backlog.measure_next():
            pass

    def finish(self, seconds: float | None = None) -> None:
        """Nothing is under way."""

    def abandon(self) -> None:
        """Nothing is under way."""


class Background:
    """Saves in one thread and measures in another, so that a long measurement delays no file.

    Training waits where snapshots come faster than the disk takes them: one is being written and one waits in memory.

    Args:
        backlog: what waits.
    """

    def __init__(self, backlog: Backlog) -> None:
        self._backlog = backlog
        self._taken: queue.Queue[Snapshot | None] = queue.Queue(maxsize=1)
        self._saved = threading.Event()
        self._ending = False
        self._saver = threading.Thread(target=self._save, name="phasewatch-save", daemon=True)
        self._measurer = threading.Thread(target=self._measure, name="phasewatch-measure", daemon=True)
        self._saver.start()
        self._measurer.start()

    def take(self, snapshot: Snapshot) -> None:
        """Pass it on to the thread that saves.

        Raises:
            PhasewatchError: if the disk hangs; the snapshot is let go.
        """
        while True:
            with suppress(queue.Full):
                self._taken.put(snapshot, timeout=min(1.0, DISK_SECONDS))
                return
            self._check_disk("a snapshot is left out")

    def finish(self, seconds: float | None = None) -> None:
        """Join both threads."""
        with suppress(queue.Full):
            self._taken.put(None, timeout=seconds or DISK_SECONDS)
        self._wait_for(self._saver, seconds)
        self.abandon()
        self._wait_for(self._measurer, seconds)

    def abandon(self) -> None:
        """Let both threads end after what they are at."""
        self._ending = True
        self._saved.set()
        with suppress(queue.Full):
            self._taken.put_nowait(None)

    def _wait_for(self, thread: threading.Thread, seconds: float | None) -> None:
        """Wait for so many seconds, or until it ends or the disk hangs."""
        if seconds is not None:
            thread.join(seconds)
            return
        while thread.is_alive():
            thread.join(min(1.0, DISK_SECONDS))
            if thread.is_alive():
                self._check_disk("what waits for it is left to a resumed run or a replay")

    def _check_disk(self, what: str) -> None:
        if self._backlog.disk_seconds > DISK_SECONDS:
            raise PhasewatchError(f"the disk has taken more than {DISK_SECONDS:g} seconds for one file; {what}.")

    def _save(self) -> None:
        while (snapshot := self._taken.get()) is not None:
            try:
                self._backlog.take(snapshot)
            except Exception as error:
                warn(f"The snapshot of step {snapshot.step} was lost, and training goes on: {in_words(error)}")
            self._saved.set()

    def _measure(self) -> None:
        while not self._ending:
            # Not until the next snapshot alone: the time earned before it would be spent when training is over.
            wait = self._backlog.seconds_to_next
            self._saved.wait(None if wait is None else max(wait, SHORTEST_WAIT))
            self._saved.clear()
            try:
                while not self._ending and self._backlog.measure_next():
                    pass
            except Exception as error:
                warn(f"A measurement was lost, and training goes on: {in_words(error)}")
