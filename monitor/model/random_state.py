"""Random state in the user's own objects: a generator that a collate function, a dataset, a loss or a model holds."""

import copy
import functools
import io
import random
import types
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Generator, Tensor, nn

MOST_OBJECTS = 10_000
"""Objects looked into for generators at most. It takes about 10 ms, and reaches a few levels below a dataset."""

LONG = 1000
"""A list or mapping of more elements than this counts as data: it isn't looked into, and is shared and not copied."""

_Thing = TypeVar("_Thing")
_GENERATORS = (Generator, np.random.Generator, np.random.RandomState, random.Random)
_SHARED = (Tensor, np.ndarray, bytes, nn.Module, types.ModuleType, type)


def own_copy_of(thing: _Thing) -> _Thing:
    """Copy a dataset or a collate function, so that what is drawn from the copy leaves the user's own as it is.

    Tensors, arrays, modules and long lists are shared.

    Args:
        thing: any object.

    Returns:
        The copy, or the object itself if it can't be copied.

    Example:
        >>> class Collate:
        ...     def __init__(self):
        ...         self.generator = Generator().manual_seed(0)
        >>> mine = Collate()
        >>> own_copy_of(mine).generator is mine.generator
        False
    """
    shared = {id(part): part for part in parts_of((thing,)) if isinstance(part, _SHARED) or _is_long(part)}
    try:
        return copy.deepcopy(thing, dict(shared))
    except Exception:
        return thing


def generators_in(*things: Any) -> list[Any]:
    """The random generators that objects hold, also those in the closures and globals of functions.

    Args:
        things: what to look into.

    Returns:
        Generators of torch, numpy and Python; the global ones are left out.
    """
    everyones = {id(torch.default_generator), id(np.random.mtrand._rand), id(getattr(random, "_inst", None))}
    return [part for part in parts_of(things) if isinstance(part, _GENERATORS) and id(part) not in everyones]


def iterators_in(*things: Any) -> list[Any]:
    """The iterators that objects hold, also those in the closures and globals of functions; files aren't meant.

    Args:
        things: what to look into.

    Example:
        >>> stream = iter([1, 2])
        >>> len(iterators_in(lambda: next(stream))), iterators_in(lambda: [1, 2])
        (1, [])
    """
    return [part for part in parts_of(things) if isinstance(part, Iterator) and not isinstance(part, io.IOBase)]


@contextmanager
def reseeded(generators: Iterable[Any], seed: int) -> Iterator[None]:
    """Start generators from a seed inside, and put them back after.

    Args:
        generators: of `generators_in`.
        seed: what each of them starts from.
    """
    before = []
    try:
        for generator in generators:
            state = _state(generator)
            if state is not None:
                before.append((generator, state))
                _seed(generator, seed)
        yield
    finally:
        for generator, state in before:
            _set_state(generator, state)


def _state(generator: Any) -> Any:
    if isinstance(generator, Generator | np.random.RandomState):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return copy.deepcopy(generator.bit_generator.state)
    try:
        return generator.getstate()
    except NotImplementedError:  # the system's own
        return None


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, Generator | np.random.RandomState):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.setstate(state)


def _seed(generator: Any, seed: int) -> None:
    if isinstance(generator, Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        kind: Any = type(generator.bit_generator)
        generator.bit_generator.state = kind(seed).state
    else:
        generator.seed(seed % 2**32)


def parts_of(things: Iterable[Any], *, through_globals: bool = True) -> Iterator[Any]:
    """Objects and what they hold, each once, from the outside in.

    Args:
        things: where to begin.
        through_globals: also follow the global variables that functions name.

    Yields:
        The objects, as many as `MOST_OBJECTS`.
    """
    waiting, seen = list(things), {}
    for thing in waiting:
        if id(thing) in seen:
            continue
        if len(seen) >= MOST_OBJECTS:
            return
        seen[id(thing)] = thing  # kept, so that no other object gets its number
        yield thing
        if isinstance(thing, types.FunctionType) and through_globals:
            waiting += globals_of(thing).values()
        waiting += _held_by(thing)


def _held_by(thing: Any) -> list[Any]:
    if isinstance(thing, nn.Module):
        return list(vars(thing).values())
    if isinstance(thing, _SHARED + _GENERATORS) or _is_long(thing):
        return []
    if isinstance(thing, Mapping):
        return list(dict(thing).values())
    if isinstance(thing, list | tuple | Set):
        return list(thing)
    if isinstance(thing, types.MethodType):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, types.FunctionType):
        return [*closure_of(thing), *(thing.__defaults__ or ()), *vars(thing).values()]
    return list(getattr(thing, "__dict__", {}).values())


def closure_of(function: types.FunctionType) -> list[Any]:
    """What a function's closure holds; names that aren't bound yet are left out."""
    found = []
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:
            continue
    return found


def globals_of(function: types.FunctionType) -> dict[str, Any]:
    """The global variables that a function's code names, functions nested in it included."""
    names: set[str] = set()
    codes = [function.__code__]
    for code in codes:
        names.update(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return {name: function.__globals__[name] for name in names if name in function.__globals__}


def _is_long(thing: Any) -> bool:
    return isinstance(thing, list | tuple | dict | set) and len(thing) > LONG
