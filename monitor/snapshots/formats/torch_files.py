"""Files of `torch.save` that hold a state dict, by itself or among the state of a training."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from phasewatch.monitor.errors import LARGEST_STEP, PhasewatchError
from phasewatch.monitor.snapshots.formats.base import (
    Entry,
    is_training_state,
    is_weights_file,
    reading,
    some_tensors,
)
from phasewatch.monitor.snapshots.formats.pickled import SavedFile
from phasewatch.monitor.snapshots.formats.unpickler import StandIn, StoredTensor
from phasewatch.monitor.snapshots.steps import step_in_name

_OTHER_STEP_KEYS = ("step", "iteration", "iter_num", "step_count")
_WEIGHTS_KEYS = ("model", "state_dict", "model_state_dict", "module", "net", "params")


@dataclass(frozen=True)
class TorchFile:
    """`step1000.pt`, or the files of Lightning, Composer, nanoGPT and others. Nothing that is pickled in it is run."""

    suffixes = (".pt", ".pth", ".bin", ".ckpt", ".pth.tar")

    def claims(self, path: Path) -> Path | None:
        """A file with one of the usual suffixes."""
        return path if is_weights_file(path, self.suffixes) else None

    def step(self, entry: Entry) -> int | None:
        """The `global_step` in the file, or the step in the name, or another usual key in the file."""
        content = _top_level(entry)
        if is_step(content.get("global_step")):
            return content["global_step"]
        step = step_in_name(entry.name)
        if step is not None:
            return step
        return next((content[key] for key in _OTHER_STEP_KEYS if is_step(content.get(key))), None)

    def load(self, source: Path, within: Path | None) -> dict[str, Tensor]:
        """The tensors of the one state dict in the file.

        Raises:
            PhasewatchError: if the file can't be read, or holds no state dict or several.
        """
        with reading(source), SavedFile(source, within) as saved:
            state = _state_dict(saved.content, source)
            wanted = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, StoredTensor)}
            tensors = saved.read(wanted)
        return some_tensors(tensors, source)


def is_step(value: object) -> bool:
    """Whether a value in a file's metadata can be a step.

    Args:
        value: any.
    """
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_STEP


def _top_level(entry: Entry) -> dict[Any, Any]:
    """What a file holds beside the weights; nothing if it can't be read, which loading it says."""
    try:
        with reading(entry.path), SavedFile(entry.path, entry.within) as saved:
            return saved.content if isinstance(saved.content, dict) else {}
    except (PhasewatchError, MemoryError):
        return {}


def _state_dict(content: Any, file: Path) -> dict[Any, Any]:
    """The one state dict in what a file holds.

    Raises:
        PhasewatchError: if there is none, or more than one.
    """
    if isinstance(content, StandIn):
        raise PhasewatchError(
            f"{file} holds a pickled {content.stands_for}, and phasewatch runs no pickled code; "
            "save model.state_dict() instead."
        )
    if not isinstance(content, dict):
        kind = "Tensor" if isinstance(content, StoredTensor) else type(content).__name__
        raise PhasewatchError(f"{file} holds a {kind}, not a state dict; save model.state_dict() there.")
    found = dict(_state_dicts(content, "", set()))
    if not found:
        keys = ", ".join(repr(key) for key in list(content)[:6] if isinstance(key, str | int)) or "nothing"
        raise PhasewatchError(f"{file} holds a dict without a state dict ({keys}); save model.state_dict() there.")
    if len(found) > 1:
        keys = " and ".join(repr(key) if key else "at its top level" for key in found)
        raise PhasewatchError(
            f"{file} holds {len(found)} state dicts, {keys}; save the one to measure as {{'state_dict': ...}}."
        )
    return next(iter(found.values()))


def _state_dicts(content: dict[Any, Any], path: str, seen: set[int]) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Candidates by their dotted key: those under a usual key if there are any, else whatever holds tensors.

    Each dict is visited once, however many others hold it.
    """
    if "param_groups" in content or id(content) in seen:  # an optimizer's
        return
    seen.add(id(content))
    inside = {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, dict) and not key.endswith("_extra_state")
    }

    def below(key: str) -> Iterator[tuple[str, dict[Any, Any]]]:
        return _state_dicts(inside[key], f"{path}.{key}" if path else key, seen)

    usual = [found for key in inside if key in _WEIGHTS_KEYS for found in below(key)]
    if usual:
        yield from usual
        return
    if any(isinstance(key, str) and isinstance(value, StoredTensor) for key, value in content.items()):
        yield path, content
    for key in inside:
        if key not in _WEIGHTS_KEYS and not is_training_state(key):
            yield from below(key)
