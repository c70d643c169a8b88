"""Reading snapshots ahead, while others are measured."""

import os
import threading
from collections.abc import Iterable
from contextlib import suppress

from phasewatch.monitor.snapshots.snapshot import Snapshot, Snapshots


class Ahead:
    """Snapshots, of which the next ones are read in a thread while the caller is busy with others.

    Args:
        snapshots: where they are.
    """

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots
        self._reading: dict[int, _Reading] = {}
        self._size = 0

    def expect(self, steps: Iterable[int]) -> None:
        """Begin to read the snapshots of some steps, as far as there is memory for them; forget others read ahead.

        Args:
            steps: that `load` will be asked for next, in that order.
        """
        steps = list(steps)
        self._reading = {step: reading for step, reading in self._reading.items() if step in steps}
        free = _free_memory()
        previous = None
        for number, step in enumerate(steps, start=1):
            if step in self._reading:
                continue
            if not self._size or (free is not None and number * self._size > free / 2):
                break
            previous = self._reading[step] = _Reading(self._snapshots, step, previous)

    def load(self, step: int) -> Snapshot:
        """The snapshot of a step, read ahead or now.

        Args:
            step: one of the series' steps.

        Returns:
            The snapshot.

        Raises:
            PhasewatchError: if it can't be read.
        """
        reading = self._reading.pop(step, None)
        snapshot = reading.result() if reading else self._snapshots.load(step)
        self._size = sum(tensor.nbytes for tensor in snapshot.tensors.values())
        return snapshot


class _Reading:
    """One snapshot that a thread reads, after another one."""

    def __init__(self, snapshots: Snapshots, step: int, after: "_Reading | None") -> None:
        self._found: Snapshot | BaseException | None = None
        self._thread = threading.Thread(
            target=self._read, args=(snapshots, step, after), name="phasewatch-ahead", daemon=True
        )
        self._thread.start()

    def result(self) -> Snapshot:
        self._thread.join()
        if not isinstance(self._found, Snapshot):
            assert self._found
            raise self._found
        return self._found

    def _read(self, snapshots: Snapshots, step: int, after: "_Reading | None") -> None:
        try:
            if after:
                after._thread.join()
            self._found = snapshots.load(step)
        except BaseException as error:
            self._found = error


def _free_memory() -> int | None:
    """Bytes that could still be taken without swapping; None where the system doesn't say."""
    with suppress(OSError, ValueError, IndexError):
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    with suppress(AttributeError, OSError, ValueError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
