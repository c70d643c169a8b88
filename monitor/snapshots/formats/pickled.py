"""What `torch.save` wrote: the content by `Unpickler`, and tensors from records that were checked.

Tensors are read one storage at a time and only those that are wanted, from records whose method, length and checksum
were checked.
"""

import io
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Self
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch
from torch import Tensor

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.files import open_regular
from phasewatch.monitor.snapshots.formats.unpickler import Storage, StoredTensor, Unpickler

SHARED_BYTES = 64 * 2**20
"""Bytes that the tensors of a file may take beyond four times the file's own size.

Expanded and tied tensors are larger in memory than in the file: a position buffer of shape (2048, 2048) over one row
takes 32 MiB. A file of a kilobyte must not make its reader allocate gigabytes.
"""

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_CHUNK = 2**24


class SavedFile:
    """An open file of `torch.save`.

    Args:
        file: its path.
        within: the folder that no link may lead out of; None where the user named the file itself.
        part: offset and length of what `torch.save` wrote, where it is one of several things in a file.

    Attributes:
        content: what was saved, with `StoredTensor` for tensors and `StandIn` for everything foreign.

    Raises:
        PhasewatchError: if it can't be opened, was packed again, or is TorchScript.
    """

    def __init__(self, file: Path, within: Path | None, *, part: tuple[int, int] | None = None) -> None:
        self._file = file
        self._opened: IO[bytes] = open_regular(file, within=within)
        self._size = os.fstat(self._opened.fileno()).st_size
        if part is not None:
            self._opened = io.BufferedReader(_Part(self._opened, *part))
            self._size = min(part[1], max(self._size - part[0], 0))
        try:
            zipped = self._opened.read(4) == b"PK\x03\x04"
            self._opened.seek(0)
            self._records = (_ZipRecords if zipped else _LegacyRecords)(file, self._opened, self._size)
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
        size = self._size
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


class _Part(io.RawIOBase):
    """Some bytes of an open file, as a file."""

    def __init__(self, opened: IO[bytes], offset: int, length: int) -> None:
        self._opened, self._offset, self._length = opened, offset, length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(start + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        n = max(min(len(buffer), self._length - self._at), 0)
        self._opened.seek(self._offset + self._at)
        piece = self._opened.read(n)
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def close(self) -> None:
        self._opened.close()
        super().close()


class _ZipRecords:
    """The records of a file as torch has written it since 1.6: an archive without compression."""

    def __init__(self, file: Path, opened: IO[bytes], size: int) -> None:
        self._file = file
        self._archive = ZipFile(opened)
        self._size = size
        (main,) = (name for name in self._archive.namelist() if name.split("/")[1:] == ["data.pkl"])
        self._folder = main.removesuffix("data.pkl")
        if f"{self._folder}constants.pkl" in self._archive.NameToInfo:
            raise PhasewatchError(f"{file} is TorchScript, which is code; save model.state_dict() instead.")
        order = f"{self._folder}byteorder"
        if order in self._archive.NameToInfo and self._read(order) != b"little":
            raise PhasewatchError(f"{file} was saved on a big-endian machine; load it there and save it again.")
        self.content = Unpickler(io.BytesIO(self._read(main)), size).load()

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

    def __init__(self, _: Path, opened: IO[bytes], size: int) -> None:
        self._opened = opened
        magic, _, system = (Unpickler(opened, size).load() for _ in range(3))
        if magic != _LEGACY_MAGIC or not system["little_endian"]:
            raise ValueError("not a file of torch.save")
        unpickler = Unpickler(opened, size)
        self.content = unpickler.load()
        self._storages = unpickler.storages
        self._keys = [str(key) for key in Unpickler(opened, size).load()]
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
