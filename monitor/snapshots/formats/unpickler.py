"""The pickle of a file of `torch.save`, read without running or importing anything that it names.

It may call only the few functions below, which describe tensors and make dicts. Every other class or function that it
names is answered by a `StandIn` that does nothing. Work and memory are bounded by the size of the file.
"""

import math
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any, ClassVar, NamedTuple, Self

import torch

_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
    "Untyped": torch.uint8,
}
_MOST_ARGUMENTS = 64
"""A pickle that passes more values to a function is refused: by reference it can pass a million, a million times."""


class Storage(NamedTuple):
    """Where a tensor's numbers lie in a file.

    Attributes:
        key: of the record.
        dtype: of its elements.
        length: how many there are.
    """

    key: str
    dtype: torch.dtype
    length: int


class StoredTensor:
    """A tensor as a file describes it. What it claims is checked when it is read.

    Attributes:
        storage: where its numbers lie.
        dtype: its own.
        offset: of the first element, in elements.
        size: its shape.
        stride: its strides, in elements.
    """

    def __init__(self, storage: Storage, dtype: torch.dtype, offset: int, size: Any, stride: Any) -> None:
        self.storage = storage
        self.dtype = dtype
        self.offset = offset
        self.size = size
        self.stride = stride

    def __setstate__(self, *_: Any) -> None:
        """A pickle can't change it."""

    def span(self) -> int:
        """Elements of the storage up to the last one that the tensor uses.

        Raises:
            ValueError: if what the file claims is no tensor.
        """
        numbers = (self.offset, *self.size, *self.stride)
        if len(self.size) != len(self.stride) or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
            raise ValueError("not the layout of a tensor")
        if 0 in self.size:
            return 0
        return 1 + self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))

    def nbytes(self) -> int:
        """Bytes that a contiguous copy takes."""
        return math.prod(self.size) * self.dtype.itemsize


class StandIn:
    """Takes the place of a class or function that a pickle names, takes whatever is done to it, and does nothing."""

    stands_for = "object"

    def __new__(cls, *_: Any, **__: Any) -> Self:  # noqa: D102
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *_: Any, **__: Any) -> "StandIn":  # noqa: D102
        return self

    def __setitem__(self, *_: Any) -> None: ...

    def __setstate__(self, *_: Any) -> None: ...

    def append(self, *_: Any) -> None:
        """Take an item of a list."""

    extend = add = append


class _Dict(OrderedDict[Any, Any]):
    """An ordered dict without attributes of its own."""

    def __setstate__(self, *_: Any) -> None: ...


class _Allowed:
    """A function that a pickle may call, and no more than call."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, *_: Any) -> None: ...


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> StoredTensor | StandIn:
    dtype = storage.dtype if isinstance(storage, Storage) else None
    return _tensor_of_dtype(storage, offset, size, stride, None, None, dtype)


def _tensor_of_dtype(storage: Any, offset: int, size: Any, stride: Any, *rest: Any) -> StoredTensor | StandIn:
    dtype = rest[2]
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        return StandIn()
    return StoredTensor(storage, dtype, offset, _few(size), _few(stride))


def _few(values: Any) -> Any:
    if len(values) > _MOST_ARGUMENTS:
        raise ValueError("more values than a function takes")
    return values


def _key(key: Any) -> Any:
    """A key of a dict that costs nothing to hash; nested tuples can take for ever, and integers can all collide."""
    harmless = isinstance(key, str | bytes | bool | float | None) or (type(key) is int and abs(key) < 2**32)
    return key if harmless else StandIn()


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *_: tensor,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda rebuild, _, arguments, *__: rebuild(*_few(arguments)),
    ("torch", "Size"): lambda sizes=(): tuple(_few(sizes)),
    ("collections", "defaultdict"): lambda *_: _Dict(),
}


_PythonUnpickler: Any = pickle._Unpickler  # pyright: ignore[reportAttributeAccessIssue]


class Unpickler(_PythonUnpickler):
    """Python's own unpickler in Python: the one in C allocates as much memory as a file asks it to.

    Args:
        file: the pickle.
        size: bytes of the whole file, which no reading exceeds and no number of items in dicts.
    """

    dispatch: ClassVar = dict(_PythonUnpickler.dispatch)

    def __init__(self, file: IO[bytes], size: int) -> None:
        super().__init__(_Bounded(file, size), encoding="utf-8", errors="replace")
        self._size = size
        self.storages: dict[str, Storage] = {}
        self._items_left = size

    def find_class(self, module: str, name: str) -> Any:
        """The few things that are known, and stand-ins for all others."""
        if (module, name) == ("collections", "OrderedDict"):
            return _Allowed(self._ordered_dict)
        if function := _FUNCTIONS.get((module, name)):
            return _Allowed(function)
        if module in ("torch", "torch.storage") and (dtype := _STORAGES.get(name.removesuffix("Storage"))):
            return dtype
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        return type("StandIn", (StandIn,), {"stands_for": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        """The storage of a tensor; a module whose source lies in an old file is what it wraps."""
        kind, *rest = _few(pid)
        if kind == "module":
            return rest[0]
        dtype, key, _, length = rest[:4]
        if (
            kind != "storage"
            or not isinstance(dtype, torch.dtype)
            or not isinstance(key, str | int)
            or type(length) is not int
            or any(rest[4:])
        ):
            return StandIn()
        return self.storages.setdefault(str(key), Storage(str(key), dtype, length))

    def _ordered_dict(self, items: Any = ()) -> _Dict:
        self._items_left -= len(items)
        if self._items_left < 0:
            raise ValueError("more items than bytes")
        return _Dict((_key(key), value) for key, value in items)

    def _with_keys(self, first: int, every: int) -> None:
        self.stack[first::every] = map(_key, self.stack[first::every])

    def load_setitem(self) -> None:
        """`dict[key] = value`."""
        self._with_keys(len(self.stack) - 2, 2)
        super().load_setitem()

    def load_setitems(self) -> None:
        """The same with many keys."""
        self._with_keys(0, 2)
        super().load_setitems()

    def load_dict(self) -> None:
        """A new dict."""
        self._with_keys(0, 2)
        super().load_dict()

    def load_bytearray8(self) -> None:
        """Bytes that may change, of a length that is said first."""
        (length,) = struct.unpack("<Q", self.read(8))
        if length > self._size:
            raise ValueError("longer than the file")
        self.append(bytearray(self.read(length)))

    def load_additems(self) -> None:
        """Items of a set."""
        self._with_keys(0, 1)
        super().load_additems()

    def load_frozenset(self) -> None:
        """A new set."""
        self._with_keys(0, 1)
        super().load_frozenset()

    def load_reduce(self) -> None:
        """A call."""
        _few(self.stack[-1])
        super().load_reduce()

    def load_newobj(self) -> None:
        """A new object."""
        _few(self.stack[-1])
        super().load_newobj()

    def load_newobj_ex(self) -> None:
        """A new object, with named arguments."""
        _few(self.stack[-1])
        _few(self.stack[-2])
        super().load_newobj_ex()


for _opcode, _load in (
    (pickle.SETITEM, Unpickler.load_setitem),
    (pickle.SETITEMS, Unpickler.load_setitems),
    (pickle.DICT, Unpickler.load_dict),
    (pickle.BYTEARRAY8, Unpickler.load_bytearray8),
    (pickle.ADDITEMS, Unpickler.load_additems),
    (pickle.FROZENSET, Unpickler.load_frozenset),
    (pickle.REDUCE, Unpickler.load_reduce),
    (pickle.NEWOBJ, Unpickler.load_newobj),
    (pickle.NEWOBJ_EX, Unpickler.load_newobj_ex),
):
    Unpickler.dispatch[_opcode[0]] = _load


class _Bounded:
    """Reads no more at a time than a file holds: `read` makes room for all that it is asked for."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._size = size

    def read(self, n: int) -> bytes:
        return self._file.read(min(n, self._size))

    def readline(self) -> bytes:
        return self._file.readline()

    def readinto(self, buffer: memoryview) -> int:
        return self._file.readinto(buffer)  # pyright: ignore[reportAttributeAccessIssue]
