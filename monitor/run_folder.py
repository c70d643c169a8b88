"""The files of a run: what was measured, with what, and nothing lost when the process is killed."""

import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from phasewatch.monitor.errors import PhasewatchError, warn
from phasewatch.monitor.snapshot import Snapshot, SnapshotFolder
from phasewatch.monitor.trajectory import Point
from phasewatch.monitor.transitions import Transition

SCHEMA = 1


class RunFolder:
    """A run's folder, held by one writer at a time: `run.json`, `points.jsonl`, `transitions.json` and `snapshots/`.

    Opening an existing folder resumes it: a torn last line of `points.jsonl` is cut off, and `points` holds what was
    measured.

    Args:
        path: the folder; made if it isn't there.
        settings: of the probe. They are compared with those in `run.json`, since points of different settings can't
            be compared.

    Raises:
        PhasewatchError: if the folder can't be written, belongs to another process, holds other settings, or is
            damaged.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.points: list[Point] = []
        self._lines = self.path / "points.jsonl"
        self._unsaved: list[bytes] = []
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path / ".lock")
            self._lock.acquire(timeout=0)
        except Timeout:
            raise PhasewatchError(
                f"Another monitor or replay is writing to run={str(path)!r}. Close it, or choose another run=."
            ) from None
        except OSError as error:
            raise PhasewatchError(
                f"run={str(path)!r} can't be written to ({error.strerror or error}). "
                "Choose a folder that can, or free some space."
            ) from error
        try:
            self._check_settings(settings)
            self._end = self._read_points()
        except OSError as error:
            self.close()
            raise PhasewatchError(
                f"run={str(path)!r} can't be read or written ({error.strerror or error}). "
                "Mend it, or choose another run=."
            ) from error
        except PhasewatchError:
            self.close()
            raise

    @property
    def snapshots(self) -> SnapshotFolder:
        """The run's snapshots."""
        return SnapshotFolder(self.path / "snapshots")

    @property
    def steps(self) -> set[int]:
        """The steps that are measured."""
        return {point.step for point in self.points}

    def append(self, point: Point) -> None:
        """Keep a point, on disk before this returns; on a full disk in memory, to be written with the next one.

        Args:
            point: of a step that isn't there yet.
        """
        self.points.append(point)
        self._unsaved.append(json.dumps(point.as_json()).encode() + b"\n")
        try:
            with open(self._lines, "ab") as file:
                file.truncate(self._end)
                file.write(b"".join(self._unsaved))
                file.flush()
                os.fsync(file.fileno())
                self._end = file.tell()
        except OSError as error:
            if len(self._unsaved) == 1:
                warn(
                    f"{self._lines} can't be written ({error.strerror or error}); "
                    "its points wait in memory until it can."
                )
        else:
            self._unsaved.clear()

    def write_transitions(self, transitions: Sequence[Transition]) -> None:
        """Replace `transitions.json`; it can always be worked out again from the points."""
        write_atomically(
            self.path / "transitions.json", json.dumps([t.as_json() for t in transitions], indent=1) + "\n"
        )

    def close(self) -> None:
        """Let another writer in; say so if points could not be written."""
        if self._unsaved:
            warn(
                f"{len(self._unsaved)} points of {self._lines} were never written to disk; replay measures them again."
            )
            self._unsaved.clear()
        self._lock.release()

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        header = self.path / "run.json"
        if not header.exists():
            record = {
                "schema": SCHEMA,
                "phasewatch": version("phasewatch"),
                "torch": version("torch"),
                "probe": dict(settings),
            }
            write_atomically(header, json.dumps(record, indent=1) + "\n")
            return
        try:
            found = json.loads(header.read_text())
            schema, probe = found["schema"], found["probe"]
        except (ValueError, KeyError, TypeError) as error:
            raise PhasewatchError(
                f"{header} is not the header of a phasewatch run. Choose another run=, or delete the folder."
            ) from error
        if schema != SCHEMA:
            raise PhasewatchError(
                f"{header} has schema {schema}, and this phasewatch writes {SCHEMA}. Choose another run=."
            )
        changes = [
            f"{name} was {before!r} and is {now!r}"
            for name, before, now in _differences(probe, json.loads(json.dumps(dict(settings))))
        ]
        if changes:
            raise PhasewatchError(
                f"run={str(self.path)!r} was measured with other settings: {'; '.join(changes)}. "
                "Such points can't be compared: choose another run=, or go back to those settings."
            )

    def _read_points(self) -> int:
        """Fill `points`, cut a torn last line off, and return the length of what is whole, in bytes."""
        if not self._lines.exists():
            return 0
        content = self._lines.read_bytes()
        end = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:end].splitlines(), start=1):
            try:
                self.points.append(Point.from_json(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                raise PhasewatchError(
                    f"Line {number} of {self._lines} is no point ({error}). Delete that line to measure its step again."
                ) from error
        if end < len(content):
            os.truncate(self._lines, end)
        return end


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that it is whole under its name at every moment."""
    unfinished = path.with_name(path.name + ".unfinished")
    with open(unfinished, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def same_weights(a: Snapshot, b: Snapshot) -> bool:
    """Whether two snapshots hold the same tensors, bit for bit."""
    return a.tensors.keys() == b.tensors.keys() and all(
        a.tensors[name].equal(b.tensors[name]) for name in a.tensors if not a.tensors[name].isnan().any()
    )


def _differences(before: Any, now: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            difference
            for key in sorted(before.keys() | now.keys())
            for difference in _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if before == now else [(name, before, now)]
