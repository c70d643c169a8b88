"""Which of the state dicts in a file is the model's: the one under a usual key, or the one that the user names."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.snapshots.formats.base import is_training_state
from phasewatch.monitor.snapshots.formats.unpickler import StandIn, StoredTensor

WEIGHTS_KEYS = ("model", "state_dict", "model_state_dict", "module", "net", "params")
"""Keys under which the weights that are trained lie; where one is there, other dicts of tensors are no rivals."""

_StateDict = dict[Any, Any]


def state_dict(content: Any, file: Path, key: str | None, leaf: type = StoredTensor) -> dict[str, Any]:
    """The tensors of the one state dict in what a file holds, by name.

    Args:
        content: of the file.
        file: for messages.
        key: what the user calls the state dict: its dotted key, the last part of it, a word of that, or a prefix of
            the names in it, or a word of their first part. None for the model's own.
        leaf: what stands for a tensor in the content.

    Raises:
        PhasewatchError: if there is none, or more than one.
    """
    if isinstance(content, StandIn):
        raise PhasewatchError(
            f"{file} holds a pickled {content.stands_for}, and phasewatch runs no pickled code; "
            "save model.state_dict() instead."
        )
    if not isinstance(content, dict):
        kind = "Tensor" if isinstance(content, leaf) else type(content).__name__
        raise PhasewatchError(f"{file} holds a {kind}, not a state dict; save model.state_dict() there.")
    found = dict(_candidates(content, "", set(), leaf)) if key is None else _called(content, file, key, leaf)
    if not found:
        raise PhasewatchError(_nothing(content, file))
    if len(found) > 1:
        keys = " and ".join(repr(path) if path else "at its top level" for path in found)
        raise PhasewatchError(
            f"{file} holds {len(found)} state dicts, {keys}; save the one to measure as {{'state_dict': ...}}, or "
            f"choose it with key={next(filter(None, found))!r}."
        )
    return next(iter(found.values()))


def has_word(name: str, key: str) -> bool:
    """Whether a key is one of the words of a name, as `ema` is of `model_ema`.

    Args:
        name: of a file or a key in one.
        key: as the user typed it.
    """
    return key.lower() in re.split(r"[_\W]+", name.lower())


def under_prefix(tensors: Mapping[str, Tensor], file: Path, key: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, for files that hold names alone.

    Args:
        tensors: of the file.
        file: for messages.
        key: the prefix, up to a dot, or a word of its first part.

    Raises:
        PhasewatchError: if there are none.
    """
    prefix = _called_prefix(tensors, key)
    found = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}
    if not found:
        there = sorted({name.partition(".")[0] for name in tensors})
        raise PhasewatchError(f"{file} holds nothing under key={key!r}; its names begin with {_some(there)}.")
    return found


def _called_prefix(names: Iterable[str], key: str) -> str:
    """The one first part of names that a key is a word of, as `ema` is of `model_ema.weight`; else the key itself."""
    called = {name.partition(".")[0] for name in names if "." in name and has_word(name.partition(".")[0], key)}
    return key if key in called or len(called) != 1 else called.pop()


def _called(content: _StateDict, file: Path, key: str, leaf: type) -> dict[str, dict[str, Any]]:
    """What a key may stand for: the first of its meanings that finds anything."""
    nodes = dict(_nodes(content, "", set()))
    meanings = (
        lambda path: path == key,
        lambda path: path.rpartition(".")[2] == key,
        lambda path: has_word(path.rpartition(".")[2], key),
    )
    for means in meanings:
        seen: set[int] = set()
        found = {
            at: tensors
            for path, node in nodes.items()
            if path and means(path)
            for at, tensors in _candidates(node, path, seen, leaf)
        }
        if found:
            return {path: _copy_called(tensors, key) for path, tensors in found.items()}
    for path, node in nodes.items():
        tensors = _tensors(node, leaf)
        prefix = _called_prefix(tensors, key.removeprefix(f"{path}.") if path else key)
        if tensors := {name: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}:
            return {path: tensors}
    there = [path for path, node in nodes.items() if path and _tensors(node, leaf)]
    raise PhasewatchError(f"{file} holds no state dict under key={key!r}; it holds {_some(there)}.")


def _copy_called(tensors: dict[str, Any], key: str) -> dict[str, Any]:
    """Of a model that lies there twice, under `online_model.` and `ema_model.`, the one that a key calls."""
    under: dict[str, set[str]] = {}
    for name in tensors:
        prefix, _, rest = name.partition(".")
        under.setdefault(prefix, set()).add(rest)
    called = [prefix for prefix in under if has_word(prefix, key.rpartition(".")[2])]
    if len(called) != 1 or [*under.values()].count(under[called[0]]) < 2:
        return tensors
    return {name: tensor for name, tensor in tensors.items() if name.startswith(f"{called[0]}.")}


def _nodes(content: _StateDict, path: str, seen: set[int]) -> Iterator[tuple[str, _StateDict]]:
    """Every dict by its dotted key, once, but for optimizers'."""
    if "param_groups" in content or id(content) in seen:
        return
    seen.add(id(content))
    yield path, content
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, dict):
            yield from _nodes(value, f"{path}.{key}" if path else key, seen)


def _candidates(content: _StateDict, path: str, seen: set[int], leaf: type) -> Iterator[tuple[str, dict[str, Any]]]:
    """State dicts by their dotted key: those under a usual key if there are any, else whatever holds tensors.

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

    def below(key: str) -> Iterator[tuple[str, dict[str, Any]]]:
        return _candidates(inside[key], f"{path}.{key}" if path else key, seen, leaf)

    usual = [found for key in inside if key in WEIGHTS_KEYS for found in below(key)]
    if usual:
        yield from usual
        return
    if tensors := _tensors(content, leaf):
        yield path, tensors
    for key in inside:
        if key not in WEIGHTS_KEYS and not is_training_state(key):
            yield from below(key)


def _tensors(content: _StateDict, leaf: type) -> dict[str, Any]:
    return {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, leaf)}


def _nothing(content: _StateDict, file: Path) -> str:
    for key in (*WEIGHTS_KEYS, "ema"):
        if isinstance(value := content.get(key), StandIn):
            return (
                f"{file} holds a pickled {value.stands_for} under {key!r}, and phasewatch runs no pickled code; "
                "save model.state_dict() instead."
            )
    keys = ", ".join(repr(key) for key in list(content)[:6] if isinstance(key, str | int)) or "nothing"
    return f"{file} holds a dict without a state dict ({keys}); save model.state_dict() there."


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:6]) or "none"
    return shown + (f" and {len(names) - 6} more" if len(names) > 6 else "")
