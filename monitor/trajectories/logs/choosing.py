"""Which file of a folder is the one with the points."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.files import inside
from phasewatch.monitor.formatting import integer, printable

MOST_FILES = 100_000
"""In a folder with more files, those after the first ones aren't looked at."""

DEEPEST = 4
"""Folders below a folder without any log are looked through this deep, to say where there is one."""

_CHECKPOINT = re.compile(r"checkpoint-([0-9]{1,18})")


def is_event_file(path: Path) -> bool:
    """Whether this is the name of an event file of TensorBoard."""
    return ".tfevents." in path.name


def log_in(folder: Path) -> tuple[Path, list[Path]]:
    """The file of points, the table or the log in a folder.

    It is the first of these that is there: points.jsonl, a Trainer's trainer_state.json, TensorBoard's event files, a
    .wandb file, Lightning's metrics.csv, and the trainer_state.json of the last checkpoint.

    Args:
        folder: a folder.

    Returns:
        The file, and the event files that follow it.

    Raises:
        PhasewatchError: if there is none, or several .wandb files; it names those in the folders below.
    """
    names = _names(folder)
    for name in ("points.jsonl", "trainer_state.json"):
        if name in names:
            return inside(folder, name), []
    if events := sorted(name for name in names if is_event_file(Path(name))):
        first, *more = (inside(folder, name) for name in events)
        return first, more
    runs = [name for name in names if name.endswith(".wandb")]
    if len(runs) > 1:
        raise PhasewatchError(f"{printable(folder)} holds several .wandb files; name one of them: {_some(runs)}.")
    for name in (*runs, "metrics.csv"):
        if name in names:
            return inside(folder, name), []
    checkpoints = sorted((int(found[1]), name) for name in names if (found := _CHECKPOINT.fullmatch(name)))
    for _, name in reversed(checkpoints):
        if os.path.lexists(folder / name / "trainer_state.json"):
            return inside(folder, f"{name}/trainer_state.json"), []
    raise _nothing(folder)


def _names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry, _ in zip(entries, range(MOST_FILES), strict=False))
    except OSError as error:
        raise PhasewatchError(
            f"{printable(folder)} can't be read ({error.strerror}); check its permissions."
        ) from error


def _nothing(folder: Path) -> PhasewatchError:
    below = _below(folder, lambda name: is_event_file(Path(name)) or name.endswith(".wandb") or name == "points.jsonl")
    if below:
        return PhasewatchError(f"{printable(folder)} has logs in folders below it; name one of them: {_some(below)}.")
    return PhasewatchError(
        f"{printable(folder)} is a folder without points.jsonl, event files, a .wandb file, trainer_state.json or "
        "metrics.csv; give a run's folder, a csv or a jsonl."
    )


def _below(folder: Path, is_log: Callable[[str], bool]) -> list[str]:
    """The folders with logs below a folder; links aren't followed."""
    found = set()
    left = MOST_FILES
    for place, folders, files in os.walk(folder):
        depth = len(Path(place).relative_to(folder).parts)
        folders[:] = sorted(folders) if depth < DEEPEST else []
        if any(map(is_log, files)):
            found.add(str(Path(place).relative_to(folder)))
        left -= len(files) + len(folders)
        if left < 0:
            break
    return sorted(found)


def _some(names: list[str]) -> str:
    more = f" and {integer(len(names) - 8)} more" if len(names) > 8 else ""
    return ", ".join(printable(name, 80) for name in names[:8]) + more
