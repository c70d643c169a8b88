"""Which of the things in a folder are checkpoints, of which steps: what can't be told is refused in words."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from phasewatch.monitor.errors import LARGEST_STEP, PhasewatchError, in_words
from phasewatch.monitor.files import leads_out
from phasewatch.monitor.formatting import printable
from phasewatch.monitor.progress import progress
from phasewatch.monitor.snapshots.axis import (
    SETTLE,
    Named,
    check_runs,
    check_stages,
    check_units,
    pattern,
    without_epochs,
    without_nameless,
)
from phasewatch.monitor.snapshots.formats import FORMATS, Entry, Format
from phasewatch.monitor.snapshots.formats.base import stem_of
from phasewatch.monitor.snapshots.formats.choosing import has_word, under_prefix
from phasewatch.monitor.snapshots.formats.hugging_face import (
    TRAINER_STATE,
    WEIGHTS,
    HuggingFaceFolder,
    weights_files,
)
from phasewatch.monitor.snapshots.formats.unread import reason_unread
from phasewatch.monitor.snapshots.snapshot import Snapshot, same_weights
from phasewatch.monitor.snapshots.steps import Step, step_in_name

StepOf = Callable[[Path], int | None]
"""A user's own function from the path of a checkpoint to its step; None leaves it out."""


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
class Choice:
    """What the user chose among what is there.

    Attributes:
        key: of the state dict to read; None for the model's own.
        step: the user's own step of a path; None for what names and files say.
        names: a pattern of names, such as "stage1-*"; None for all.
    """

    key: str | None = None
    step: StepOf | None = None
    names: str | None = None


@dataclass(frozen=True)
class Under:
    """A format of names alone, of which those under a prefix are read."""

    inner: Format
    key: str

    def claims(self, path: Path) -> Path | None:
        """As the format."""
        return self.inner.claims(path)

    def step(self, entry: Entry) -> int | None:
        """As the format."""
        return self.inner.step(entry)

    def load(self, source: Path, within: Path | None) -> dict[str, Tensor]:
        """The tensors whose names begin with the prefix."""
        return under_prefix(self.inner.load(source, within), source, self.key)


class _Found(NamedTuple):
    """A checkpoint with what is known of its step, under the name that is shown."""

    shown: str
    named: bool
    step: Step
    checkpoint: Checkpoint


def chosen(key: str | None) -> tuple[Format, ...]:
    """All formats, each reading what lies under a key.

    Args:
        key: of the state dict to read; None for the model's own.
    """
    if key is None:
        return FORMATS
    return tuple(
        replace(form, key=key) if is_dataclass(form) and "key" in {f.name for f in fields(form)} else Under(form, key)
        for form in FORMATS
    )


def wanted(name: str, choice: Choice) -> bool:
    """Whether a name is one that the user chose.

    Args:
        name: of a file, folder or branch.
        choice: of the user.
    """
    return choice.names is None or fnmatchcase(name, choice.names)


def of_revisions(names: Iterable[str], where: Path, call: str, choice: Choice) -> tuple[list[Checkpoint], list[str]]:
    """The checkpoints among the branches of a repository, by ascending step, and the names that were left out.

    Args:
        names: of the branches.
        where: the repository.
        call: what the user typed.
        choice: what the user chose; some of the names are wanted and have a step.

    Raises:
        PhasewatchError: if their steps can't be told.
    """
    kept: list[Named] = []
    left_out: list[str] = []
    for name in names:
        if not wanted(name, choice):
            continue
        step = step_in_name(name) if choice.step is None else step_of_user(choice.step, Path(name), call)
        if step is not None:
            kept.append(Named(name, step))
        elif choice.step is None:
            left_out.append(name)
    kept.sort(key=lambda one: one.step)
    if not kept:
        raise PhasewatchError(f"{call}: step= gave no branch a step; it has {some([*names])}.")
    if choice.step is None:
        check_units(kept, call)
        check_runs(kept, call)
        check_stages(kept, call)
    for one, other in pairwise(kept):
        if one.step == other.step:
            raise PhasewatchError(
                f"{call}: the branches {one.shown} and {other.shown} are both of step {one.step:d}; choose by name "
                f"with revisions= (such as {pattern(one.shown)!r}), or {SETTLE}."
            )
    # What reads a branch is found when it is fetched.
    return [Checkpoint(int(one.step), where / one.shown, HuggingFaceFolder()) for one in kept], sorted(left_out)


def scan(
    entries: Sequence[Entry], folder: Path, root: Path, call: str, choice: Choice
) -> tuple[list[Checkpoint], list[str]]:
    """The checkpoints among the things in a folder, by ascending step, and the names that were left out.

    Args:
        entries: what is there.
        folder: for messages.
        root: the folder that no link may lead out of.
        call: what the user typed.
        choice: what the user chose.

    Raises:
        PhasewatchError: if there are no checkpoints, or their steps can't be told.
    """
    names = [entry.path.name for entry in entries]
    if choice.names is not None:
        entries = [entry for entry in entries if wanted(entry.name, choice) or wanted(entry.path.name, choice)]
        if not entries:
            raise PhasewatchError(
                f"{call}: nothing in {folder} is named like {choice.names!r}; it holds {some(names)}."
            )
    forms = chosen(choice.key)
    if choice.key and (called := [entry for entry in entries if has_word(entry.name, choice.key)]):
        entries, forms = called, FORMATS  # `ema_0.9999_010000.pt` beside `model010000.pt`
    found, left_out, refused = _found(entries, forms, root, call, choice)
    if choice.step is None:
        found, epochs = without_epochs(found)
        left_out += epochs
        if epochs:
            refused = refused or f"{epochs[0]} is numbered by its epoch, as it says inside; {SETTLE}"
        found, copies = without_nameless(found)
        left_out += copies
    kept, copies = _one_each(found, root, call, folder)
    left_out += copies
    if not kept:
        raise PhasewatchError(_nothing_found(folder, call, names, refused))
    if choice.step is None:
        check_units(kept, call)
        check_runs(kept, call)
        check_stages(kept, call)
    return [f.checkpoint for f in kept], sorted(left_out)


def _found(
    entries: Iterable[Entry], forms: Sequence[Format], root: Path, call: str, choice: Choice
) -> tuple[list[_Found], list[str], str]:
    """What is claimed and has a step, what is left out, and why the first of these is."""
    found: list[_Found] = []
    left_out: list[str] = []
    refused = ""
    for entry in progress(entries, f"Looking through {printable(root.name, 40)}", " files"):
        shown = entry.path.name if stem_of(entry.path) == entry.name else entry.name
        if entry.path.is_dir() and leads_out(entry.path, root):
            refused = refused or f"{shown} leads out of the folder; put the files themselves there, not a link to them"
            left_out.append(shown)
            continue
        form, source = next(((f, source) for f in forms if (source := f.claims(entry.path))), (None, None))
        step = _step(form, entry, call, choice.step) if form else None
        if form and source and step is not None:
            found.append(_Found(shown, step_in_name(entry.name) is not None, step, Checkpoint(int(step), source, form)))
        elif reason := _reason(entry, claimed=form is not None, own=choice.step is not None):
            refused = refused or f"{shown} {reason}"
            left_out += [shown] if form or weights_files(entry.path) else []
    return found, left_out, refused


def _step(form: Format, entry: Entry, call: str, own: StepOf | None) -> Step | None:
    if own is None:
        step = form.step(entry)
        return step if step is None or isinstance(step, Step) else Step(step)
    return step_of_user(own, entry.path, call)


def step_of_user(own: StepOf, path: Path, call: str) -> Step | None:
    """The step that the user's own function gives a path.

    Args:
        own: the function.
        path: of a checkpoint.
        call: what the user typed.

    Raises:
        PhasewatchError: if it fails, or gives something else than a step or None.
    """
    try:
        step = own(path)
    except Exception as error:
        raise PhasewatchError(f"{call}: step= failed at {path.name} with {in_words(error)}.") from error
    if step is None:
        return None
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step <= LARGEST_STEP:
        raise PhasewatchError(
            f"{call}: step= must return a whole number from 0 on, or None; at {path.name} it returned {step!r}."
        )
    return Step(step)


def _one_each(found: list[_Found], root: Path, call: str, folder: Path) -> tuple[list[_Found], list[str]]:
    """One checkpoint a step, without equal copies.

    Raises:
        PhasewatchError: if two of one step differ.
    """
    by_step: dict[int, list[_Found]] = {}
    for one in found:
        by_step.setdefault(int(one.step), []).append(one)
    copies: list[str] = []
    for _, (first, *others) in sorted(by_step.items()):
        for other in others:
            if not _are_equal(first.checkpoint, other.checkpoint, root):
                raise PhasewatchError(
                    f"{call}: {first.shown} and {other.shown} are both of step {first.checkpoint.step} and differ; "
                    f"move one of them out of {folder}, choose by name with revisions=, or {SETTLE}."
                )
            copies.append(other.shown)
    return [by_step[step][0] for step in sorted(by_step)], copies


def _are_equal(a: Checkpoint, b: Checkpoint, within: Path) -> bool:
    """Whether two checkpoints of one step hold the same weights, as the last one's copy does."""
    try:
        weights = [Snapshot(c.step, c.format.load(c.source, within)) for c in (a, b)]
    except (PhasewatchError, MemoryError):
        return False
    return same_weights(*weights)


def _reason(entry: Entry, *, claimed: bool, own: bool) -> str:
    """Why an entry that looks like a checkpoint is none that can be read; nothing if it doesn't look like one."""
    if claimed:
        return "" if own else f"carries no step, neither in its name nor in its metadata; {SETTLE}"
    if reason := reason_unread(entry.path):
        return reason
    if not entry.path.is_dir():
        return ""
    if len(files := weights_files(entry.path)) > 1:
        return f"holds {files[0].name} and {files[1].name}, and it isn't clear which one to read"
    below = next((sub for sub in sorted(entry.path.glob("*/")) if weights_files(sub)), None)
    return f"holds no checkpoint itself; {below.relative_to(entry.path.parent)} does" if below else ""


def reason_for(entry: Entry) -> str:
    """Why no format reads an entry; nothing if it doesn't look like a checkpoint.

    Args:
        entry: that none claims.
    """
    return _reason(entry, claimed=False, own=False)


def _nothing_found(folder: Path, call: str, names: list[str], refused: str) -> str:
    if any(name in WEIGHTS or name in (TRAINER_STATE, ".metadata") for name in names):
        return f"{call}: {folder} is one checkpoint, not a series; give the folder that holds it and the others."
    if refused:
        return f"{call} found no checkpoint that can be read: {refused}."
    return (
        f"{call} looked in {folder} for .safetensors, .pt, .pth, .bin, .ckpt files, or folders with one such file, "
        f"that carry a step (step1000.pt, checkpoint-500/), and found {some(names) or 'nothing'}; give the folder that "
        "holds the checkpoints."
    )


def some(names: list[str]) -> str:
    """The first names, and how many more there are.

    Args:
        names: any.
    """
    shown = ", ".join(printable(name, 80) for name in names[:6])
    return shown + (f" and {len(names) - 6} more" if len(names) > 6 else "")
