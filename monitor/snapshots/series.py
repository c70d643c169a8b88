"""Series of checkpoints in order of step, wherever they lie: in a folder, an archive, a hub, a repository."""

import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.files import inside, read_text
from phasewatch.monitor.snapshots.folder import SnapshotFolder
from phasewatch.monitor.snapshots.formats import Entry
from phasewatch.monitor.snapshots.formats.base import stem_of
from phasewatch.monitor.snapshots.git_branches import branches_of, is_repository
from phasewatch.monitor.snapshots.hub import open_hub
from phasewatch.monitor.snapshots.scan import Checkpoint, Choice, StepOf, chosen, of_revisions, reason_for, scan
from phasewatch.monitor.snapshots.snapshot import Snapshot
from phasewatch.monitor.snapshots.stores import Revisions, Store, archive_protocol, borrowed, open_store

MOST_BYTES_OF_REF = 1000
"""A branch in a hub's cache holds the 40 characters of a revision; a larger file is refused."""


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


@dataclass(frozen=True)
class FetchedSeries(Series):
    """A series that lies elsewhere: the files of a checkpoint are fetched when it is loaded, and deleted afterwards.

    Attributes:
        store: where it lies.
        key: of the state dict to read; None for the model's own.
    """

    store: Store = field(kw_only=True)
    key: str | None = None

    def shapes(self, step: int) -> dict[str, tuple[int, ...]] | None:
        """The shapes of a checkpoint's tensors, from a few kilobytes of it; None where that can't be.

        Args:
            step: one of `steps`.

        Raises:
            PhasewatchError: if there is no such step, or it can't be reached.
        """
        if self.key is not None:
            return None
        found = _shapes(self.store, self._name(step))
        return None if found is None else dict(found)

    def load(self, step: int) -> Snapshot:
        """Fetch the files of `step`, read its weights, and delete the files.

        Raises:
            PhasewatchError: if there is no such step, it can't be fetched or read, or its tensors have other shapes
                than those of the first step, which is seen before its weights are fetched.
        """
        name = self._name(step)
        first, own = self.shapes(self.steps[0]), self.shapes(step)
        if first is not None and own is not None and own != first:
            odd = min(key for key in own.keys() | first.keys() if own.get(key) != first.get(key))
            raise PhasewatchError(
                f"{name} of {self.store} isn't fetched: {odd} has the shape {own.get(odd)} there and {first.get(odd)} "
                f"at step {self.steps[0]}. Choose one model's checkpoints with revisions=."
            )
        with borrowed(self.store, [name]) as root:
            path = root / name
            entry = Entry(stem_of(path), path, root)
            form, source = next(((f, s) for f in chosen(self.key) if (s := f.claims(path))), (None, None))
            if form is None or source is None:
                raise PhasewatchError(f"{name} of {self.store} {reason_for(entry) or 'holds no checkpoint'}.")
            try:
                return Snapshot(int(step), form.load(source, root))
            except PhasewatchError as error:
                raise PhasewatchError(str(error).replace(f"{root}/", f"{self.store}: ")) from error

    def _name(self, step: int) -> str:
        return str(self._checkpoint(step).source.relative_to(self.path))


@functools.lru_cache(maxsize=256)
def _shapes(store: Store, name: str) -> tuple[tuple[str, tuple[int, ...]], ...] | None:
    found = store.shapes(name)
    return None if found is None else tuple(found.items())


def open_series(
    path: str | Path,
    *,
    key: str | None = None,
    step: StepOf | None = None,
    revisions: str | None = None,
    keep: bool = False,
) -> Series | SnapshotFolder:
    """The checkpoints of a folder, in order of step. Reads no weights, except those of two checkpoints of one step.

    A folder of checkpoints holds files of state dicts (.safetensors, .pt, .pth, .bin, .ckpt, .tar), or folders with one
    checkpoint each: of Hugging Face's Trainer, torch.distributed.checkpoint, DeepSpeed, Megatron, and others that the
    manual lists. In the cache of a model hub, and in a git repository, the checkpoints are the branches. A
    checkpoint's step is what it says itself (`global_step` and others, `trainer_state.json`), or else what its name
    says (see `steps.step_in_name`).

    Args:
        path: the folder of a phasewatch run, or of checkpoints; a .zip or .tar of one; `hf://ORG/NAME`, whose
            branches or folders are the checkpoints (the only path that uses the network, with `s3://` and `gs://`).
        key: which state dict of a checkpoint to read, such as "ema": its key, dotted, or the last part or a word of
            it, or a prefix of its names. The model's own if not given.
        step: a function from the path of a checkpoint to its step, or None to leave it out, where names mislead.
        revisions: a pattern of the names to use, such as "stage1-*": of branches, or of files and folders.
        keep: keep what is fetched from a hub in its cache; it is deleted after it was read if not.

    Returns:
        A run's own `SnapshotFolder`, or the series of the checkpoints.

    Raises:
        PhasewatchError: if there is no such folder, it holds no checkpoints, two of one step differ, steps are counted
            in two units, or start again.

    Example:
        >>> import pathlib, tempfile, torch
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> for step in (20, 100):
        ...     torch.save(torch.nn.Linear(2, 1).state_dict(), folder / f"model_{step}.pt")
        >>> series = open_series(folder)
        >>> series.steps, sorted(series.load(100).tensors)
        ((20, 100), ['bias', 'weight'])
        >>> open_series(folder, step=lambda path: 1000 * int(path.stem.split("_")[1]), revisions="*_20").steps
        (20000,)
    """
    call = f"open_series({str(path)!r})"
    choice = Choice(key, step, revisions)
    address = re.sub(r"^(\w\w+):/(?!/)", r"\1://", str(path)) if isinstance(path, Path) else path  # it lost a slash
    protocol, separated, rest = address.partition("://")
    try:
        if separated and protocol == "hf":
            found = open_hub(rest, call, choice, keep=keep)
            return (
                _of_folder(found, call, choice) if isinstance(found, Path) else _elsewhere(found, address, call, choice)
            )
        if separated and protocol != "file":
            return _elsewhere(open_store(protocol, address, call), address, call, choice)
        folder = Path(rest if separated else path)
        if not folder.exists():
            raise PhasewatchError(f"{call}: there is no such folder; give the folder that holds the checkpoints.")
        if folder.is_dir():
            return _of_folder(folder, call, choice)
        if archive := archive_protocol(folder):
            return _elsewhere(open_store(archive, str(folder), call), str(folder), call, choice)
        raise PhasewatchError(f"{call}: this is a file; give the folder that holds it and the other checkpoints.")
    except OSError as error:
        raise PhasewatchError(
            f"{call}: {error.filename or path} can't be read ({error.strerror}); check its permissions."
        ) from error


def _of_folder(folder: Path, call: str, choice: Choice) -> Series | SnapshotFolder:
    if run := _of_a_run(folder, call):
        if choice != Choice():
            raise PhasewatchError(f"{call} is a run's own folder, whose steps are known; leave out all but the path.")
        return run
    branches = branches_of(folder, choice) if is_repository(folder) else None
    if branches and choice.names is not None:
        return _elsewhere(branches, str(folder), call, choice)
    try:
        checkpoints, left_out = scan(_entries(folder), folder, _root(folder), call, choice)
    except PhasewatchError:
        if branches:
            return _elsewhere(branches, str(folder), call, choice)
        raise
    return Series(folder, tuple(checkpoints), tuple(left_out))


def _elsewhere(store: Store, path: str, call: str, choice: Choice) -> FetchedSeries:
    """The series of a store: by names alone if they are revisions, else by what can be told from small files."""
    where = Path(path)
    if isinstance(store, Revisions):
        found, left_out = of_revisions(store.names(), where, call, choice)
    else:
        with borrowed(store, store.names(), opening=True) as root:
            entries = [Entry(stem_of(file), file, root) for file in sorted(root.iterdir())]
            found, left_out = scan(entries, where, root, call, choice)
            found = [c._replace(source=where / c.source.relative_to(root).parts[0]) for c in found]
    return FetchedSeries(where, tuple(found), tuple(left_out), store=store, key=choice.key)


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
    whole = Path(os.path.realpath(folder))
    caches = (above for above in (whole, *whole.parents) if above.name.startswith("models--"))
    return next((cache for cache in caches if (cache / "blobs").is_dir()), folder)
