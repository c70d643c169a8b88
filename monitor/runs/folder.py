"""The files of a run: what was measured, with what, and nothing lost when the process is killed."""

import json
import os
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from phasewatch.monitor.errors import PhasewatchError, in_words, warn
from phasewatch.monitor.files import inside, open_append, read_bytes, read_json, read_text, write_atomically
from phasewatch.monitor.formatting import printable
from phasewatch.monitor.snapshots.folder import SnapshotFolder
from phasewatch.monitor.snapshots.snapshot import Snapshot
from phasewatch.monitor.strict_json import differences
from phasewatch.monitor.trajectories.trajectory import Point, parse_points
from phasewatch.monitor.trajectories.transitions import Transition

SCHEMA = 2
"""Of the files in a run's folder, kept in `run.json`; raised when an earlier phasewatch can't read them."""


class RunFolder:
    """A run's folder, held by one writer at a time: `run.json`, `points.jsonl`, `transitions.json` and `snapshots/`.

    Opening an existing folder resumes it: a torn last line of `points.jsonl` is cut off, and `points` holds what was
    measured.

    Args:
        path: the folder; made if it isn't there.
        settings: of the probe. They are compared with those in `run.json`, since points of different settings can't
            be compared.
        chains: in a sentence, whether chains run together and why, for the record.

    Raises:
        PhasewatchError: if the folder can't be written, belongs to another process, holds other settings, or is
            damaged.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], *, chains: str = "") -> None:
        self.path = Path(path)
        self._chains = chains
        self.points: list[Point] = []
        self._settings = dict(settings)
        self._averaging: Any = None
        self._calibration: Any = None
        self._header_waits = False
        self._lines = self.path / "points.jsonl"
        self._unsaved: list[bytes] = []
        self._transitions: str | None = None
        self._complained = False
        try:
            self._take()
        except PhasewatchError:
            raise
        except Timeout:
            raise PhasewatchError(
                f"Another monitor or replay is writing to run={str(path)!r}. Close it, or choose another run=."
            ) from None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else None
            advice = "Choose a folder that can, or free some space."
            if isinstance(error, FileExistsError | NotADirectoryError):
                advice = "It is a file; give a folder."
            raise PhasewatchError(f"run={str(path)!r} can't be written to ({reason or error}). {advice}") from error
        try:
            self._check_settings()
            self._end = self._read_points()
            self._steps = {point.step for point in self.points}
            self._remove_unfinished()
        except OSError as error:
            self.close()
            raise self._unusable(error) from error
        except PhasewatchError:
            self.close()
            raise

    @property
    def snapshots(self) -> SnapshotFolder:
        """The run's snapshots.

        Raises:
            PhasewatchError: if a link leads out of the run.
        """
        return SnapshotFolder(inside(self.path, "snapshots"))

    @property
    def settings(self) -> dict[str, Any]:
        """What the points are measured with; a calibration makes them others before the first point."""
        return self._settings

    @property
    def steps(self) -> Set[int]:
        """The steps that are measured; it grows with the points."""
        return self._steps

    def keep_averaging(self, averaging: Any, call: str) -> None:
        """Write into `run.json` over what the weights are averaged, as points of other averages don't compare.

        Args:
            averaging: plain JSON values, None for weights as they are.
            call: what the user typed, such as "PhaseMonitor(average=0.02)".

        Raises:
            PhasewatchError: if the folder holds snapshots or points of another average, or can't be written. It is
                closed then.
        """
        if averaging == self._averaging:
            return
        try:
            if self.points or self.snapshots.steps:
                raise PhasewatchError(
                    f"{call}: run={str(self.path)!r} holds snapshots or points taken with average={self._averaging!r}. "
                    "They can't be compared: choose another run=, or go back to that one."
                )
            self._averaging = averaging
            self._write_header()
        except OSError as error:
            self.close()
            raise self._unusable(error) from error
        except PhasewatchError:
            self.close()
            raise

    def keep_calibration(self, calibration: Any, settings: Mapping[str, Any], why: str = "") -> None:
        """Write into `run.json` that the setting of this run is calibrated, with the setting as it is by now.

        Args:
            calibration: plain JSON values.
            settings: of the probe.
            why: of the setting, for `calibration.txt`.

        Raises:
            PhasewatchError: if the folder holds points of a setting that isn't calibrated. It is closed then.
        """
        if calibration == self._calibration:
            return
        if self.points:
            self.close()
            raise PhasewatchError(
                f"run={str(self.path)!r} holds points of a setting that was given and not calibrated. They can't be "
                "compared with others: choose another run=, or leave sampler='calibrate' out."
            )
        self._calibration, self._settings = calibration, dict(settings)
        try:
            self._write_header()
            if why:
                write_atomically(self.path / "calibration.txt", why + "\n")
        except OSError as error:
            self._header_waits = True
            self._complain(error)

    def append(self, *points: Point) -> bool:
        """Keep points, on disk before this returns; on a full disk in memory, to be written with the next ones.

        Args:
            points: of steps that aren't there yet.

        Returns:
            Whether every point is on disk.
        """
        for point in points:
            self.points.append(point)
            self._steps.add(point.step)
            self._unsaved.append(_line(point))
        return self._write_points()

    def save(self, snapshot: Snapshot) -> bool:
        """Write a snapshot.

        Args:
            snapshot: kept by the caller until it is written.

        Returns:
            Whether the disk took it.
        """
        try:
            self.snapshots.save(snapshot)
        except Exception as error:  # not only the disk's: a dtype that the format lacks, such as complex128
            self._complain(error)
            return False
        return True

    def write_transitions(self, transitions: Sequence[Transition]) -> None:
        """Replace `transitions.json` if it says something else, unless the disk refuses.

        It can always be worked out again from the points.
        """
        path, text = self.path / "transitions.json", json.dumps([t.as_json() for t in transitions], indent=1) + "\n"
        try:
            if self._transitions is None and os.path.lexists(path):
                with suppress(PhasewatchError):  # what can't be read is replaced
                    self._transitions = read_text(path, within=self.path)
            if text != self._transitions or not os.path.lexists(path):
                write_atomically(path, text)
                self._transitions = text
        except OSError as error:
            self._complain(error)

    def close(self) -> None:
        """Let another writer in; say so if points could not be written."""
        is_gone = bool(self.points) and not self._is_held()
        if (self._unsaved or is_gone) and not self._write_points():
            warn(
                f"{len(self.points if is_gone else self._unsaved)} points of {self._lines} were never written to disk; "
                "a replay measures those again whose snapshots are there."
            )
            self._unsaved.clear()
        self._lock.release()

    def _write_points(self) -> bool:
        try:
            self._restore()
            with open_append(self._lines) as file:
                if file.tell() < self._end:  # cut or deleted by somebody, who can't have meant the points to be lost
                    self._unsaved = [_line(point) for point in self.points]
                    self._end = 0
                if file.tell() > self._end:  # a write was cut short
                    file.truncate(self._end)
                file.write(b"".join(self._unsaved))
                file.flush()
                os.fsync(file.fileno())
                self._end = file.tell()
        except (OSError, PhasewatchError) as error:
            self._complain(error)
            return False
        self._unsaved.clear()
        return True

    def _take(self) -> None:
        """Make the folder, and keep other writers out."""
        self.path.mkdir(parents=True, exist_ok=True)
        open_append(self.path / ".lock").close()  # refuses a link, which the lock would follow
        self._lock = FileLock(self.path / ".lock", thread_local=False)  # one thread may take it again, another let go
        self._lock.acquire(timeout=0)
        self._locked = os.stat(self.path / ".lock")

    def _restore(self) -> None:
        """Write what somebody took away while the run goes on, and say what can't come back."""
        if not self._is_held():
            self._lock.release()
            try:
                self._take()
            except Timeout as error:
                raise PhasewatchError("another monitor or replay has begun there since it was deleted") from error
            warn(
                f"{self.path} was deleted or moved while this run writes to it. Its run.json and all points are "
                "written there again; its earlier snapshots are not, and those that weren't measured can't be any more."
            )
        if self._header_waits or not os.path.lexists(self.path / "run.json"):
            self._write_header()

    def _is_held(self) -> bool:
        """Whether the lock that this holds is the one that lies in the folder."""
        try:
            return os.path.samestat(os.stat(self.path / ".lock"), self._locked)
        except OSError:
            return False

    def _complain(self, error: Exception) -> None:
        """Say once that the folder can't be written to."""
        if not self._complained:
            self._complained = True
            reason = (error.strerror if isinstance(error, OSError) else None) or in_words(error)
            warn(f"{self.path} can't be written to ({reason}); what belongs there waits in memory until it can.")

    def _unusable(self, error: OSError) -> PhasewatchError:
        return PhasewatchError(
            f"run={str(self.path)!r} can't be read or written ({error.strerror or error}). "
            "Mend it, or choose another run=."
        )

    def _write_header(self) -> None:
        record = {
            "schema": SCHEMA,
            "settings": self._settings,
            "averaging": self._averaging,
            **({} if self._calibration is None else {"calibration": self._calibration}),
            **({"chains": self._chains} if self._chains else {}),
            "versions": {"phasewatch": version("phasewatch"), "torch": version("torch")},
        }
        write_atomically(self.path / "run.json", json.dumps(record, indent=1) + "\n")
        self._header_waits = False

    def _check_settings(self) -> None:
        header = self.path / "run.json"
        if not os.path.lexists(header):
            if os.path.lexists(self._lines) and read_bytes(self._lines, within=self.path):
                raise PhasewatchError(
                    f"run={str(self.path)!r} holds points without a run.json that says what they were measured with. "
                    "Choose another run=."
                )
            self._write_header()
            return
        try:
            found = read_json(header, within=self.path)
        except PhasewatchError as error:
            raise PhasewatchError(f"{error} Or choose another run=.") from error
        try:
            schema = found["schema"]
            settings = dict(found["settings"]) if schema == SCHEMA else {}
            self._averaging = found["averaging"] if schema == SCHEMA else None
            self._calibration = found.get("calibration")
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise PhasewatchError(
                f"{header} is not the header of a phasewatch run. Choose another run=, or delete the folder."
            ) from error
        if schema != SCHEMA:
            advice = (
                ""
                if self.snapshots.steps == ()
                else (
                    " Its snapshots can be measured again: "
                    f"phasewatch replay {self.snapshots.path} --probe FILE.py:NAME --run NEW."
                )
            )
            raise PhasewatchError(
                f"{header} has schema {printable(repr(schema), 40)}, and this phasewatch reads and writes {SCHEMA}. "
                "Choose another run=."
                f"{advice}"
            )
        changes = [
            f"{name} was {before!r} and is {now!r}"
            for name, before, now in differences(settings, json.loads(json.dumps(self._settings)))
        ]
        if changes:
            raise PhasewatchError(
                f"run={str(self.path)!r} was measured with other settings: {'; '.join(changes)}. "
                "Such points can't be compared: choose another run=, or go back to those settings."
            )

    def _read_points(self) -> int:
        """Fill `points`, cut a torn last line off, and return the length of what is whole, in bytes."""
        if not os.path.lexists(self._lines):
            return 0
        content = read_bytes(self._lines, within=self.path)
        end = content.rfind(b"\n") + 1
        self.points = list(parse_points(content[:end], str(self._lines)))
        with open_append(self._lines) as file:
            if end < len(content):
                file.truncate(end)
        return end

    def _remove_unfinished(self) -> None:
        """Clear what a killed process was writing; safetensors' own unfinished files are called `.tmp...`."""
        snapshots = self.snapshots.path
        for pattern in (self.path.glob("*.unfinished"), snapshots.glob("*.unfinished"), snapshots.glob(".tmp*")):
            for leftover in pattern:
                leftover.unlink(missing_ok=True)


def settings_of(run: Path) -> dict[str, Any]:
    """What the points of a run's folder were measured with, by its `run.json`; nothing if that doesn't say."""
    try:
        return dict(read_json(run / "run.json", within=run)["settings"])
    except (PhasewatchError, OSError, KeyError, TypeError, ValueError):
        return {}


def _line(point: Point) -> bytes:
    return json.dumps(point.as_json()).encode() + b"\n"
