"""Series of checkpoints: which of the things in a folder are checkpoints, of which steps, and who reads them."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.files import inside, read_text
from phasewatch.monitor.snapshots.folder import SnapshotFolder
from phasewatch.monitor.snapshots.formats import FORMATS, Entry, Format
from phasewatch.monitor.snapshots.formats.base import stem_of
from phasewatch.monitor.snapshots.formats.hugging_face import TRAINER_STATE, WEIGHTS, weights_files
from phasewatch.monitor.snapshots.snapshot import Snapshot, same_weights
from phasewatch.monitor.snapshots.steps import step_in_name

MOST_BYTES_OF_REF = 1000
"""A branch in a hub's cache holds the 40 characters of a revision; a larger file is refused."""


class Checkpoint(NamedTuple):
    """One checkpoint of a series.

    Attributes:
        step: its training step.
        source: the file that is read.
        format: what reads it.
    """

    step: int
    source: Path
    format: Format


@dataclass(frozen=True)
class Series:
    """Checkpoints in order of step: paths alone, so that it can be sent to another process; `load` reads the weights.

    Attributes:
        path: the folder of the checkpoints.
        checkpoints: what it holds, by ascending step.
        left_out: names in the folder that look like checkpoints and whose step or weights file isn't clear, or that
            are copies of a step that is there (Lightning's `last.ckpt`).
    """

    path: Path
    checkpoints: tuple[Checkpoint, ...] = field(repr=False)
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.checkpoints)

    def __iter__(self) -> Iterator[Snapshot]:
        return (self.load(step) for step in self.steps)

    @property
    def steps(self) -> tuple[int, ...]:
        """The training steps, ascending."""
        return tuple(checkpoint.step for checkpoint in self.checkpoints)

    @property
    def sources(self) -> tuple[Path, ...]:
        """The file that is read for each step."""
        return tuple(checkpoint.source for checkpoint in self.checkpoints)

    def source(self, step: int) -> Path:
        """The file that holds the weights of `step`; of a sharded checkpoint, its index.

        Raises:
            PhasewatchError: if the series has no such step.
        """
        return self._checkpoint(step).source

    def load(self, step: int) -> Snapshot:
        """Read the weights of `step`: copies on the CPU, contiguous, without gradients, by the names in the file.

        Raises:
            PhasewatchError: if there is no such step, or its file is gone, damaged, or holds no state dict.
        """
        checkpoint = self._checkpoint(step)
        return Snapshot(step=int(step), tensors=checkpoint.format.load(checkpoint.source, _root(self.path)))

    def _checkpoint(self, step: int) -> Checkpoint:
        place = self._places.get(step)
        if place is None:
            steps = self.steps
            nearest = min(steps, key=lambda known: abs(known - step))
            raise PhasewatchError(
                f"The series {self.path} has no step {step!r}: it has {len(self)} steps from {steps[0]} to "
                f"{steps[-1]}, and the nearest is {nearest}."
            )
        return self.checkpoints[place]

    @functools.cached_property
    def _places(self) -> dict[int, int]:
        """Where each step is in `checkpoints`."""
        return {checkpoint.step: place for place, checkpoint in enumerate(self.checkpoints)}


def open_series(path: str | Path) -> Series | SnapshotFolder:
    """The checkpoints of a folder, in order of step. Reads no weights, except those of two checkpoints of one step.

    A folder of checkpoints holds files of state dicts (.safetensors, .pt, .pth, .bin, .ckpt), or folders with one such
    file each, as Hugging Face's Trainer leaves them. In the cache of a model hub, the checkpoints are the branches
    (`models--ORG--NAME/refs`). A checkpoint's step is the `global_step` in its trainer_state.json or in the file; or
    else in its name (see `steps.step_in_name`); or else an integer `step`, `iteration`, `iter_num` or `step_count` in
    the file.

    Args:
        path: the folder of a phasewatch run, or of checkpoints.

    Returns:
        A run's own `SnapshotFolder`, or the series of the checkpoints.

    Raises:
        PhasewatchError: if there is no such folder, it holds no checkpoints, or two of one step differ.

    Example:
        >>> import pathlib, tempfile, torch
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> for step in (20, 100):
        ...     torch.save(torch.nn.Linear(2, 1).state_dict(), folder / f"model_{step}.pt")
        >>> series = open_series(folder)
        >>> series.steps, sorted(series.load(100).tensors)
        ((20, 100), ['bias', 'weight'])
    """
    folder = Path(path)
    call = f"open_series({str(path)!r})"
    try:
        if not folder.exists():
            raise PhasewatchError(f"{call}: there is no such folder; give the folder that holds the checkpoints.")
        if not folder.is_dir():
            raise PhasewatchError(f"{call}: this is a file; give the folder that holds it and the other checkpoints.")
        return _of_a_run(folder, call) or _scan(folder, call)
    except OSError as error:
        raise PhasewatchError(
            f"{call}: {error.filename or folder} can't be read ({error.strerror}); check its permissions."
        ) from error


def _of_a_run(folder: Path, call: str) -> SnapshotFolder | None:
    run = folder.parent if folder.name == "snapshots" else folder
    if not (run / "run.json").is_file() or not (run / "snapshots").is_dir():
        return None
    snapshots = SnapshotFolder(inside(run, "snapshots"))
    if not snapshots.steps:
        raise PhasewatchError(f"{call}: {snapshots.path} holds no snapshots of the run; give a run that saved some.")
    return snapshots


def _entries(folder: Path) -> list[Entry]:
    """What may be a checkpoint in a folder; in the cache of a hub, the branches."""
    cache = folder.parent if folder.name == "snapshots" else folder
    root = _root(folder)
    if (cache / "refs").is_dir() and (cache / "snapshots").is_dir():
        refs = sorted(ref for ref in (cache / "refs").iterdir() if ref.is_file())
        revisions = {ref.name: read_text(ref, within=cache, most_bytes=MOST_BYTES_OF_REF).strip() for ref in refs}
        found = {name: cache / "snapshots" / Path(revision).name for name, revision in revisions.items()}
        return [Entry(name, revision, root) for name, revision in found.items() if revision.is_dir()]
    return [Entry(stem_of(path), path, root) for path in sorted(folder.iterdir()) if not path.name.startswith(".")]


def _root(folder: Path) -> Path:
    """The folder that no link may lead out of; in the cache of a hub, snapshots are links to blobs beside them."""
    whole = folder.resolve()
    caches = (above for above in (whole, *whole.parents) if above.name.startswith("models--"))
    return next((cache for cache in caches if (cache / "blobs").is_dir()), folder)


def _scan(folder: Path, call: str) -> Series:
    """The series of a folder, `call` being what the user typed.

    Raises:
        PhasewatchError: if the folder holds no checkpoints, or two of one step differ.
    """
    entries = _entries(folder)
    named: dict[int, list[tuple[str, Checkpoint]]] = {}
    unnamed: dict[int, list[tuple[str, Checkpoint]]] = {}
    left_out: list[str] = []
    refused = ""
    for entry in entries:
        shown = entry.path.name if stem_of(entry.path) == entry.name else entry.name
        form, source = next(((f, source) for f in FORMATS if (source := f.claims(entry.path))), (None, None))
        step = form.step(entry) if form else None
        if form and source and step is not None:
            found = unnamed if step_in_name(entry.name) is None else named
            found.setdefault(step, []).append((shown, Checkpoint(step, source, form)))
        elif reason := _reason(entry, claimed=form is not None):
            refused = refused or f"{shown} {reason}"
            left_out += [shown] if form or weights_files(entry.path) else []
    left_out += [name for step in named.keys() & unnamed.keys() for name, _ in unnamed.pop(step)]
    checkpoints: list[Checkpoint] = []
    for _, same in sorted((named | unnamed).items()):
        kept, *copies = same
        checkpoints.append(kept[1])
        for copy in copies:
            if not _are_equal(kept[1], copy[1], _root(folder)):
                raise PhasewatchError(
                    f"{call}: {kept[0]} and {copy[0]} are both of step {kept[1].step} and differ; "
                    f"move one of them out of {folder}."
                )
            left_out.append(copy[0])
    if not checkpoints:
        raise PhasewatchError(_nothing_found(folder, call, [entry.path.name for entry in entries], refused))
    return Series(folder, tuple(checkpoints), tuple(sorted(left_out)))


def _are_equal(a: Checkpoint, b: Checkpoint, within: Path) -> bool:
    """Whether two checkpoints of one step hold the same weights, as the last one's copy does."""
    try:
        weights = [Snapshot(c.step, c.format.load(c.source, within)) for c in (a, b)]
    except (PhasewatchError, MemoryError):
        return False
    return same_weights(*weights)


def _reason(entry: Entry, *, claimed: bool) -> str:
    """Why an entry that looks like a checkpoint is none that can be read; nothing if it doesn't look like one."""
    if claimed:
        return "carries no step, neither in its name nor in its metadata"
    if not entry.path.is_dir():
        return ""
    if next(entry.path.glob(".metadata"), None) or next(entry.path.glob("*/.metadata"), None):
        return (
            "is a torch.distributed.checkpoint folder, which isn't read; write each one into a file with "
            "torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
        )
    if len(files := weights_files(entry.path)) > 1:
        return f"holds {files[0].name} and {files[1].name}, and it isn't clear which one to read"
    below = next((sub for sub in sorted(entry.path.glob("*/")) if weights_files(sub)), None)
    return f"holds no checkpoint itself; {below.relative_to(entry.path.parent)} does" if below else ""


def _nothing_found(folder: Path, call: str, names: list[str], refused: str) -> str:
    if any(name in WEIGHTS or name == TRAINER_STATE for name in names):
        return f"{call}: {folder} is one checkpoint, not a series; give the folder that holds it and the others."
    if refused:
        return f"{call} found no checkpoint that can be read: {refused}."
    there = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return (
        f"{call} looked in {folder} for .safetensors, .pt, .pth, .bin, .ckpt files, or folders with one such file, "
        f"that carry a step (step1000.pt, checkpoint-500/), and found {there or 'nothing'}; give the folder that holds "
        "the checkpoints."
    )
