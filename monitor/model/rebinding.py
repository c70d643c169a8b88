"""Functions that belong to a model's objects, made anew for a copy of the model.

`copy.deepcopy` takes a function as it is, so that a patched `forward`, a hook or an activation with a closure stays
bound to the model that it was made for.
"""

import copy
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from phasewatch.monitor.model.random_state import globals_of, parts_of

_COMPILED = "_torchdynamo_orig_callable"
"""Where `torch.compile` keeps the function that it was given."""


class Rebinding:
    """New functions in place of those that a model's objects hold, with closures of their own.

    Args:
        model: what is about to be copied.
        memo: of the copy, as `copy.deepcopy` takes it; the new functions are put into it.
    """

    def __init__(self, model: nn.Module, memo: dict[int, Any]) -> None:
        self._memo = memo
        self._functions = [
            part
            for part in parts_of((model,), through_globals=False)
            if isinstance(part, types.FunctionType) and _holds_anything(part)
        ]
        for function in self._functions:
            if not hasattr(function, _COMPILED):
                memo[id(function)] = _shell(function)

    def bind(self) -> None:
        """Fill the closures, after the model was copied."""
        memo = self._memo
        for function in self._functions:
            if hasattr(function, _COMPILED):  # what is compiled would keep its graph of the original
                continue
            new: types.FunctionType = memo[id(function)]
            for cell, mine in zip(function.__closure__ or (), new.__closure__ or (), strict=True):
                try:
                    mine.cell_contents = _copied(cell.cell_contents, memo)
                except ValueError:  # a name that isn't bound yet
                    continue
            new.__globals__.update({name: _copied(value, memo) for name, value in _state_of(function).items()})
            new.__defaults__ = _copied(function.__defaults__, memo)
            new.__kwdefaults__ = _copied(function.__kwdefaults__, memo)
            vars(new).update({name: _copied(value, memo) for name, value in vars(function).items()})


@contextmanager
def methods_of_copies() -> Iterator[None]:
    """Have `copy.deepcopy` take a bound method's function from its memo too, as it does with what it is bound to.

    A `forward` that was patched with `types.MethodType` is one; by itself, `copy.deepcopy` keeps its function, closure
    and all.
    """
    dispatch: dict[Any, Any] = copy._deepcopy_dispatch  # pyright: ignore[reportAttributeAccessIssue]
    before = dispatch[types.MethodType]
    dispatch[types.MethodType] = lambda method, memo: type(method)(
        memo.get(id(method.__func__), method.__func__), copy.deepcopy(method.__self__, memo)
    )
    try:
        yield
    finally:
        dispatch[types.MethodType] = before


def without_compilation(model: nn.Module, memo: dict[int, Any]) -> None:
    """Have compiled functions that a model's objects hold copied as what they were compiled from.

    Args:
        model: what is about to be copied.
        memo: of the copy.
    """
    for part in parts_of((model,), through_globals=False):
        if isinstance(part, types.FunctionType) and hasattr(part, _COMPILED):
            memo[id(part)] = copy.deepcopy(getattr(part, _COMPILED), memo)


def _shell(function: types.FunctionType) -> types.FunctionType:
    """The same code with an empty closure."""
    cells = tuple(types.CellType() for _ in function.__closure__ or ())
    names = function.__globals__
    new = types.FunctionType(function.__code__, dict(names) if _state_of(function) else names, closure=cells or None)
    new.__name__, new.__qualname__, new.__module__ = function.__name__, function.__qualname__, function.__module__
    new.__doc__ = function.__doc__
    return new


def _holds_anything(function: types.FunctionType) -> bool:
    return bool(function.__closure__ or function.__defaults__ or function.__kwdefaults__ or _state_of(function))


def _state_of(function: types.FunctionType) -> Mapping[str, Any]:
    """Global variables that a function may change: containers, and objects of a class from where it was written."""
    return {
        name: value
        for name, value in globals_of(function).items()
        if isinstance(value, list | dict | set | nn.Module)
        or (not isinstance(value, type | types.FunctionType) and type(value).__module__ == function.__module__)
    }


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except Exception:
        return value
