"""Files of `torch.save` that hold a state dict, by itself or among the state of a training."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor

from phasewatch.monitor.errors import LARGEST_STEP, PhasewatchError
from phasewatch.monitor.snapshots.formats.base import Entry, is_weights_file, reading, some_tensors
from phasewatch.monitor.snapshots.formats.choosing import state_dict
from phasewatch.monitor.snapshots.formats.pickled import SavedFile
from phasewatch.monitor.snapshots.formats.unpickler import StoredTensor
from phasewatch.monitor.snapshots.steps import Step, step_in_name

_STEP_KEYS = {
    "global_step": "steps",
    "global_steps": "steps",
    "step_count": "steps",
    "num_updates": "updates",
    "iter_num": "iterations",
    "iteration": "iterations",
    "iter": "iterations",
    "batch": "batches",
    "step": "steps",
}
"""Where a file keeps its step, and what it counts. Files of litgpt have `iter_num` too, which counts micro-batches."""

_PLAIN = {"iteration", "iter", "batch", "step"}
"""Keys that may count within an epoch, so that a step at a word of the name goes before them."""

_HOLDERS = (
    "meta",
    "state",
    "timestamp",
    "Timestamp",
    "trainer",
    "trainer_state",
    "train_state",
    "extra_state",
    "progress",
)
"""Dicts in which libraries keep the step: mmengine, Composer and others."""


@dataclass(frozen=True)
class TorchFile:
    """`step1000.pt`, or the files of Lightning, Composer, nanoGPT and others. Nothing that is pickled in it is run.

    Attributes:
        key: of the state dict to read; None for the model's own.
    """

    key: str | None = None

    suffixes = (".pt", ".pth", ".bin", ".ckpt", ".tar")

    def claims(self, path: Path) -> Path | None:
        """A file with one of the usual suffixes."""
        return path if is_weights_file(path, self.suffixes) else None

    def step(self, entry: Entry) -> Step | None:
        """The step in the file, or the one in the name."""
        inside, epoch = _progress(entry)
        named = step_in_name(entry.name)
        if named is not None and (not inside or (inside[0] in _PLAIN and named.unit)):
            return Step(named, named.unit, epoch)
        return Step(inside[1], _STEP_KEYS[inside[0]], epoch) if inside else None

    def load(self, source: Path, within: Path | None) -> dict[str, Tensor]:
        """The tensors of the one state dict in the file.

        Raises:
            PhasewatchError: if the file can't be read, or holds no state dict or several.
        """
        with reading(source), SavedFile(source, within) as saved:
            tensors = saved.read(state_dict(saved.content, source, self.key))
        return some_tensors(tensors, source)


def is_step(value: object) -> TypeGuard[int]:
    """Whether a value in a file's metadata can be a step.

    Args:
        value: any.
    """
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_STEP


def step_in_file(entry: Entry) -> Step | None:
    """The step that a file of torch.save keeps; None if it keeps none, or can't be read.

    Args:
        entry: the file.
    """
    inside, epoch = _progress(entry)
    return Step(inside[1], _STEP_KEYS[inside[0]], epoch) if inside else None


def _progress(entry: Entry) -> tuple[tuple[str, int] | None, int | None]:
    """The key and the step that a file keeps beside its weights, and its epoch."""
    try:
        with reading(entry.path), SavedFile(entry.path, entry.within) as saved:
            holders = list(_holders(saved.content))
            epochs = (holder["epoch"] for holder in holders if is_step(holder.get("epoch")))
            return _step(holders, saved), next(epochs, None)
    except (PhasewatchError, MemoryError):  # which loading it says
        return None, None


def _holders(content: Any, depth: int = 3) -> Iterator[dict[Any, Any]]:
    if isinstance(content, dict):
        yield content
        history = content.get("optimizer_history")  # fairseq's
        if isinstance(history, list) and history:
            yield from _holders(history[-1], 0)
        for key in _HOLDERS if depth else ():
            yield from _holders(content.get(key), depth - 1)


def _step(holders: list[dict[Any, Any]], saved: SavedFile) -> tuple[str, int] | None:
    for holder in holders:
        for key in _STEP_KEYS:
            value = holder.get(key)
            if isinstance(value, StoredTensor) and list(value.size) in ([], [1]) and not value.dtype.is_floating_point:
                value = int(saved.read({key: value})[key])
            if is_step(value) and (key != "batch" or "sample" in holder):  # elsewhere it may be a size
                return key, value
    return None
