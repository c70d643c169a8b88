"""Numbers that a model or a loss computes with and that are no tensors of the model: no snapshot holds them."""

import functools
import math
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from phasewatch.monitor.model.random_state import globals_of
from phasewatch.monitor.snapshots.snapshot import unwrap


class Place(NamedTuple):
    """Where a number is kept.

    Attributes:
        holder: the mapping, or the cell of a closure.
        key: its name there.
    """

    holder: Any
    key: Any

    def get(self) -> float | None:
        """The number; None where there is none by now."""
        try:
            return _number(self._content())
        except (KeyError, ValueError):
            return None

    def put(self, number: Any) -> Any:
        """Set it, in the form that is there; returns what was there."""
        before = self._content()
        content = torch.full_like(before, number) if isinstance(before, Tensor) else type(before)(number)
        self.restore(content)
        return before

    def restore(self, content: Any) -> None:
        """Put back what `put` returned."""
        if isinstance(self.holder, types.CellType):
            self.holder.cell_contents = content
        else:
            self.holder[self.key] = content

    def _content(self) -> Any:
        return self.holder.cell_contents if isinstance(self.holder, types.CellType) else self.holder[self.key]


def values_of(places: Mapping[str, Place]) -> dict[str, float]:
    """The numbers that are there now, by name."""
    return {name: number for name, place in places.items() if (number := place.get()) is not None}


def places_in(model: nn.Module) -> dict[str, Place]:
    """The numbers among the attributes of a model's modules, and of plain objects and mappings that these hold.

    Args:
        model: any module, looked through as `Snapshot.of` does.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.3))
        >>> model[0].temperature, model.options = 2.0, {"scale": 3}
        >>> found = values_of(places_in(model))
        >>> found["0.temperature"], found["1.p"], found["options.scale"]
        (2.0, 0.3, 3)
    """
    found: dict[str, Place] = {}
    seen: set[int] = set()
    for prefix, module in unwrap(model).named_modules():
        for name, place in _places(vars(module), seen, lambda _: True):
            found[f"{prefix}.{name}" if prefix else name] = place
    return found


def places_outside(loss: Callable[..., Any], model: nn.Module) -> dict[str, Place]:
    """The numbers that a loss and the `forward` of a model's modules read from elsewhere, by who reads what.

    Those are global variables, closures, attributes of the loss where it is an object, and what objects and mappings
    among them hold by a name that the code has.

    Args:
        loss: any callable.
        model: any module.

    Example:
        >>> beta = {"kl": 0.5}
        >>> def make():
        ...     weight = 2.0
        ...     def loss(model, batch):
        ...         return weight * beta["kl"] * model(batch).mean()
        ...     return loss
        >>> found = places_outside(make(), nn.Linear(2, 1))
        >>> found["loss: weight"].get()
        2.0
    """
    found: dict[str, Place] = {}
    seen: set[int] = set()
    functions, owner = _functions_of(loss)
    if owner is not None:
        name = getattr(owner, "__name__", type(owner).__name__)
        found |= {f"{name}: {key}": place for key, place in _places(_variables(owner) or {}, seen, lambda _: True)}
    for kind in dict.fromkeys(type(module) for module in model.modules()):
        if not kind.__module__.startswith("torch."):
            functions += [value for value in vars(kind).values() if isinstance(value, types.FunctionType)]
    for function in functions:
        named = _names_in(function.__code__)
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        held = {name: _cell_content(cell) for name, cell in cells.items()}
        for key, place in _places(globals_of(function), seen, named.__contains__, holder=function.__globals__):
            found.setdefault(f"{function.__name__}: {key}", place)
        for key, place in _places(held, seen, named.__contains__):
            own = Place(cells[key], None) if key in cells else place
            found.setdefault(f"{function.__name__}: {key}", own)
    return found


def _places(
    variables: Mapping[str, Any], seen: set[int], wanted: Callable[[Any], bool], holder: Any = None
) -> Iterator[tuple[str, Place]]:
    """The numbers among variables, and one level below them."""
    for name, value in list(variables.items()):
        if isinstance(name, str) and name.startswith("_"):
            continue
        if _number(value) is not None:
            yield name, Place(variables if holder is None else holder, name)
            continue
        inner = _variables(value)
        if inner is None or id(inner) in seen:
            continue
        seen.add(id(inner))
        for key, content in list(inner.items()):
            if isinstance(key, str) and not key.startswith("_") and wanted(key) and _number(content) is not None:
                yield f"{name}.{key}", Place(inner, key)


def _variables(thing: Any) -> dict[Any, Any] | None:
    """What a mapping or a plain object holds."""
    if isinstance(thing, dict):
        return thing
    if isinstance(thing, nn.Module | Tensor | type | types.ModuleType | types.FunctionType):
        return None
    return getattr(thing, "__dict__", None) if isinstance(getattr(thing, "__dict__", None), dict) else None


def _functions_of(thing: Any) -> tuple[list[types.FunctionType], Any]:
    """The function that a callable runs, and the object whose attributes it has at hand."""
    while isinstance(thing, functools.partial):
        thing = thing.func
    thing = getattr(thing, "in_full_precision", thing)
    if isinstance(thing, types.FunctionType):
        return [thing], None
    if isinstance(thing, types.MethodType):
        return [cast(types.FunctionType, thing.__func__)], thing.__self__
    calls = [kind.__dict__["__call__"] for kind in type(thing).__mro__ if "__call__" in kind.__dict__][:1]
    return [call for call in calls if isinstance(call, types.FunctionType)], thing


def _names_in(code: types.CodeType) -> set[Any]:
    found: set[Any] = set(code.co_names) | {value for value in code.co_consts if isinstance(value, str)}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names_in(constant)
    return found


def _cell_content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that isn't bound yet
        return None


def _number(value: Any) -> float | None:
    """A finite number, of any library, that isn't a truth value; None for anything else."""
    if isinstance(value, bool) or not (isinstance(value, int | float) or _is_single(value)):
        return None
    try:
        number = value if isinstance(value, int | float) else float(value)
        return number if math.isfinite(number) else None
    except (OverflowError, TypeError, ValueError, RuntimeError):
        return None


def _is_single(value: Any) -> bool:
    if isinstance(value, Tensor):
        plain = type(value) is Tensor and not value.is_meta and value.ndim == 0
        return plain and (value.is_floating_point() or value.dtype in {torch.int64, torch.int32})
    return isinstance(value, np.number) or (isinstance(value, np.ndarray) and value.ndim == 0)
