"""What `torch.save` wrote, read without running or importing anything that the file names.

The pickle in a file may call only the few functions below, which describe tensors and make dicts. Every other class or
function that it names is answered by a `StandIn` that does nothing. Tensors are read after that, one storage at a time
and only those that are wanted, from records whose method, length and checksum were checked.
"""

import io
import math
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, Self
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch
from torch import Tensor

from phasewatch.monitor.errors import PhasewatchError

SHARED_BYTES = 64 * 2**20
"""Bytes that the tensors of a file may take beyond four times the file's own size.

Expanded and tied tensors are larger in memory than in the file: a position buffer of shape (2048, 2048) over one row
takes 32 MiB. A file of a kilobyte must not make its reader allocate gigabytes.
"""

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
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_CHUNK = 2**24


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
        if len(self.size) != len(self.stride) or any(type(n) is not int or n < 0 for n in numbers):
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


class _Allowed:
    """A function that a pickle may call, and no more than call."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, *_: Any) -> None: ...


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> StoredTensor | StandIn:
    return StoredTensor(storage, storage.dtype, offset, size, stride) if isinstance(storage, Storage) else StandIn()


def _tensor_of_dtype(storage: Any, offset: int, size: Any, stride: Any, *rest: Any) -> StoredTensor | StandIn:
    dtype = rest[2]
    known = isinstance(storage, Storage) and isinstance(dtype, torch.dtype)
    return StoredTensor(storage, dtype, offset, size, stride) if known else StandIn()


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *_: tensor,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda rebuild, _, arguments, *__: rebuild(*arguments),
    ("torch", "Size"): lambda sizes=(): tuple(sizes),
    ("collections", "defaultdict"): lambda *_: OrderedDict(),
}


class _Unpickler(pickle._Unpickler):  # pyright: ignore[reportAttributeAccessIssue]
    """Python's own unpickler in Python: the one in C allocates as much memory as a file asks it to."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="utf-8", errors="replace")
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The few things that are known, and stand-ins for all others."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if function := _FUNCTIONS.get((module, name)):
            return _Allowed(function)
        if module in ("torch", "torch.storage") and (dtype := _STORAGES.get(name.removesuffix("Storage"))):
            return dtype
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        return type("StandIn", (StandIn,), {"stands_for": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        """The storage of a tensor; a module whose source lies in an old file is what it wraps."""
        kind, *rest = pid
        if kind == "module":
            return rest[0]
        dtype, key, _, length = rest[:4]
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(length) is not int or any(rest[4:]):
            return StandIn()
        return self.storages.setdefault(str(key), Storage(str(key), dtype, length))


class SavedFile:
    """An open file of `torch.save`.

    Args:
        file: its path.

    Attributes:
        content: what was saved, with `StoredTensor` for tensors and `StandIn` for everything foreign.

    Raises:
        PhasewatchError: if it was packed again, or is TorchScript.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._opened = file.open("rb")
        try:
            zipped = self._opened.read(4) == b"PK\x03\x04"
            self._opened.seek(0)
            self._records = _ZipRecords(file, self._opened) if zipped else _LegacyRecords(self._opened)
            self.content: Any = self._records.content
        except BaseException:
            self._opened.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def read(self, wanted: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
        """Contiguous copies of tensors, one storage in memory at a time.

        Args:
            wanted: the tensors by name.

        Raises:
            PhasewatchError: if a record is damaged, or a tensor claims more than the file can hold.
        """
        size = self._file.stat().st_size
        largest = max((tensor.span() * tensor.storage.dtype.itemsize for tensor in wanted.values()), default=0)
        if max(largest, sum(tensor.nbytes() for tensor in wanted.values()) - 3 * size - SHARED_BYTES) > size:
            raise PhasewatchError(f"{self._file} names tensors that are larger than the file; copy it again.")
        users: dict[Storage, list[str]] = {}
        for name, tensor in wanted.items():
            users.setdefault(tensor.storage, []).append(name)
        found: dict[str, Tensor] = {}
        for storage, names in users.items():
            numbers = torch.empty(_checked_bytes(storage, size), dtype=torch.uint8, device="cpu")
            self._records.read_into(storage, numbers.numpy().data)
            found |= {name: _copied(numbers, wanted[name]) for name in names}
        return {name: found[name] for name in wanted}


def _checked_bytes(storage: Storage, most: int) -> int:
    nbytes = storage.length * storage.dtype.itemsize
    if not 0 <= nbytes <= most:
        raise ValueError("a storage larger than its file")
    return nbytes


def _copied(numbers: Tensor, tensor: StoredTensor) -> Tensor:
    if 0 in tensor.size:
        return torch.empty(tuple(tensor.size), dtype=tensor.dtype, device="cpu")
    typed = numbers.view(tensor.dtype)
    if tensor.span() > len(typed):
        raise ValueError("a tensor larger than its storage")
    view = typed.as_strided(tuple(tensor.size), tuple(tensor.stride), tensor.offset)
    return view.clone(memory_format=torch.contiguous_format)


class _ZipRecords:
    """The records of a file as torch has written it since 1.6: an archive without compression."""

    def __init__(self, file: Path, opened: IO[bytes]) -> None:
        self._file = file
        self._archive = ZipFile(opened)
        self._size = file.stat().st_size
        (main,) = (name for name in self._archive.namelist() if name.split("/")[1:] == ["data.pkl"])
        self._folder = main.removesuffix("data.pkl")
        if f"{self._folder}constants.pkl" in self._archive.NameToInfo:
            raise PhasewatchError(f"{file} is TorchScript, which is code; save model.state_dict() instead.")
        order = f"{self._folder}byteorder"
        if order in self._archive.NameToInfo and self._read(order) != b"little":
            raise PhasewatchError(f"{file} was saved on a big-endian machine; load it there and save it again.")
        self.content = _Unpickler(io.BytesIO(self._read(main))).load()

    def read_into(self, storage: Storage, target: memoryview) -> None:
        """Fill a buffer of the record's length."""
        name = f"{self._folder}data/{storage.key}"
        self._check(name, len(target))
        with self._chunks(name) as record:
            done = 0
            while n := record.readinto(target[done : done + _CHUNK]):
                done += n
            record.read(1)  # the checksum is compared at the end

    def _read(self, name: str) -> bytes:
        self._check(name)
        with self._chunks(name) as record:
            return record.read()

    def _check(self, name: str, length: int | None = None) -> None:
        info = self._archive.getinfo(name)
        if info.compress_type != ZIP_STORED:
            raise PhasewatchError(
                f"{self._file} was packed again with compression; unpack it, and use the file that torch.save wrote."
            )
        if info.file_size != info.compress_size or info.file_size > self._size:
            raise PhasewatchError(f"{self._file} is damaged: {name!r} doesn't fit in it; copy it again.")
        if length is not None and info.file_size != length:
            raise PhasewatchError(
                f"{self._file} is damaged: {name!r} has {info.file_size} bytes where {length} belong; copy it again."
            )

    @contextmanager
    def _chunks(self, name: str) -> Iterator[Any]:
        try:
            with self._archive.open(name) as record:
                yield record
        except BadZipFile as error:
            raise PhasewatchError(f"{self._file} is damaged ({error}); copy it again.") from error


class _LegacyRecords:
    """The records of a file as torch wrote it before 1.6: pickles and raw numbers, one after the other."""

    def __init__(self, opened: IO[bytes]) -> None:
        self._opened = opened
        magic, _, system = (_Unpickler(opened).load() for _ in range(3))
        if magic != _LEGACY_MAGIC or not system["little_endian"]:
            raise ValueError("not a file of torch.save")
        unpickler = _Unpickler(opened)
        self.content = unpickler.load()
        self._storages = unpickler.storages
        self._keys = [str(key) for key in _Unpickler(opened).load()]
        self._first = opened.tell()

    def read_into(self, storage: Storage, target: memoryview) -> None:
        """Fill a buffer of the record's length."""
        self._opened.seek(self._first)
        for key in self._keys:
            (length,) = struct.unpack("<q", self._opened.read(8))
            if length != self._storages[key].length:
                raise ValueError("a record of another length than the file says")
            if key == storage.key:
                break
            self._opened.seek(length * self._storages[key].dtype.itemsize, io.SEEK_CUR)
        else:
            raise ValueError("a record is missing")
        if self._opened.readinto(target) != len(target):  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError("cut off")
