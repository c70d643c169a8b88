"""Folders of `torch.distributed.checkpoint`, by whatever number of ranks, and its form in safetensors.

`torch.distributed.checkpoint.load` runs what a `.metadata` names. Here the metadata is read as `Unpickler` reads every
pickle, and each piece of a tensor as a file of `torch.save`, one at a time.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.files import MOST_JSON_BYTES, open_regular
from phasewatch.monitor.snapshots.formats.base import Entry, is_training_state, reading, some_tensors
from phasewatch.monitor.snapshots.formats.choosing import state_dict
from phasewatch.monitor.snapshots.formats.hugging_face import numbered_by_accelerate, step_of_trainer
from phasewatch.monitor.snapshots.formats.pickled import SHARED_BYTES, SavedFile
from phasewatch.monitor.snapshots.formats.pieces import Piece, Pieces
from phasewatch.monitor.snapshots.formats.safetensors import SafetensorsFile
from phasewatch.monitor.snapshots.formats.torch_files import step_in_file
from phasewatch.monitor.snapshots.formats.unpickler import Unpickler
from phasewatch.monitor.snapshots.steps import Step, step_in_name
from phasewatch.monitor.strict_json import parse_json

METADATA = ".metadata"

_STEP_FILES = ("meta.pt", "common.pt", "train/rank0.pt")
"""Where Lightning, Megatron and OLMo-core keep the step beside the pieces."""

_OPTIMIZER = re.compile(r"optim(izer)?s?|lr_schedulers?|chained_\d+")
_PACKAGE = "torch.distributed.checkpoint."
_CLASSES = {
    ("metadata", "Metadata"),
    ("metadata", "MetadataIndex"),
    ("metadata", "TensorStorageMetadata"),
    ("metadata", "BytesStorageMetadata"),
    ("metadata", "ChunkStorageMetadata"),
    ("metadata", "TensorProperties"),
    ("filesystem", "_StorageInfo"),
}


class _Record:
    """An instance of one of the classes of a `.metadata`: its attributes, and nothing that it can do."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        """An attribute, None if it has none of this name."""
        return self.state.get(name) if isinstance(self.state, dict) else None


class _Metadata(Unpickler):
    """Reads a `.metadata`."""

    def find_class(self, module: str, name: str) -> Any:
        """The classes of a `.metadata` as records; everything else as in any pickle."""
        if (module.removeprefix(_PACKAGE), name) in _CLASSES and module.startswith(_PACKAGE):
            return type(name, (_Record,), {})
        return super().find_class(module, name)

    def _with_keys(self, first: int, every: int) -> None:
        """Records may be keys: they are told apart by what they are, not by what they hold, which costs nothing."""
        keys = range(first, len(self.stack), every)
        records = {i: self.stack[i] for i in keys if isinstance(self.stack[i], _Record)}
        super()._with_keys(first, every)
        for i, record in records.items():
            self.stack[i] = record


class _Place(NamedTuple):
    """Where the bytes of a piece lie."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class DistributedFolder:
    """`step-1000/` with `.metadata` and `__0_0.distcp`, as torchtitan, OLMo-core, Accelerate and Lightning write it.

    Attributes:
        key: of the state dict to read; None for the model's own.
    """

    key: str | None = None

    def claims(self, path: Path) -> Path | None:
        """A folder with `.metadata`, in it or in its one folder that isn't of an optimizer."""
        if (path / METADATA).is_file():
            return path / METADATA
        if not path.is_dir():
            return None
        below = sorted(path.glob(f"*/{METADATA}"))
        if len(below) > 1:
            below = [file for file in below if not is_training_state(file.parent.name)]
        return below[0] if len(below) == 1 else None

    def step(self, entry: Entry) -> Step | None:
        """The step of the Trainer, or of Lightning, Megatron and OLMo-core, or else the one in the folder's name."""
        source = self.claims(entry.path)
        if source is None or numbered_by_accelerate(entry):
            return None
        if (step := step_of_trainer(entry)) is not None:
            return step
        files = [folder / name for folder in {entry.path, source.parent} for name in _STEP_FILES]
        inside = (step_in_file(entry._replace(path=file)) for file in files if file.is_file())
        named = step_in_name(entry.name)
        return next((step for step in inside if step is not None), named)

    def load(self, source: Path, within: Path | None) -> dict[str, Tensor]:
        """The weights, put together from their pieces.

        Raises:
            PhasewatchError: if a file can't be read, or the pieces don't make up the tensors.
        """
        with reading(source):
            content = _content(source, within)
            wanted = state_dict(content, source, self.key, Pieces)
            _check_sizes(wanted, source)
            found = {name: tensor.empty() for name, tensor in wanted.items()}
        placed = sorted(
            ((place, name, piece) for name, tensor in wanted.items() for piece, place in tensor.pieces.items()),
            key=lambda one: one[0],
        )
        for place, name, piece in placed:
            file = source.parent / place.file
            with reading(file), SavedFile(file, within, part=(place.offset, place.length)) as saved:
                piece.fill(found[name], saved.read({"": saved.content})[""])
        return some_tensors(found, source)


@dataclass(frozen=True)
class DistributedSafetensors:
    """`shard-00001-model-00001-of-00001.safetensors` and others: each rank's pieces, with their offsets."""

    def claims(self, path: Path) -> Path | None:
        """A folder with such files, in it or in `sharded/`."""
        return next((s for folder in (path, path / "sharded") for s in _shards(folder)), None)

    def step(self, entry: Entry) -> Step | None:
        """The step of the Trainer, or in the folder's name."""
        step = step_of_trainer(entry)
        return step_in_name(entry.name) if step is None else step

    def load(self, source: Path, within: Path | None) -> dict[str, Tensor]:
        """The tensors, put together from their pieces.

        Raises:
            PhasewatchError: if a file can't be read, or the pieces don't make up the tensors.
        """
        found: dict[str, Pieces] = {}
        for shard in _shards(source.parent):
            tensors = SafetensorsFile().load(shard, within)
            with reading(shard):
                offsets = _saved_offsets(shard, within)
                for name, tensor in tensors.items():
                    piece = Piece(tuple(offsets.get(name, (0,) * tensor.dim())), tuple(tensor.shape))
                    end = [o + n for o, n in zip(piece.offsets, piece.sizes, strict=True)]
                    whole = found.setdefault(name, Pieces(tensor.dtype, tuple(end)))
                    whole.size = tuple(max(pair) for pair in zip(whole.size, end, strict=True))
                    whole.pieces[piece] = tensor
        with reading(source):
            return some_tensors({name: _joined(found.pop(name)) for name in sorted(found)}, source)


def _joined(whole: Pieces) -> Tensor:
    whole.check()
    tensor = whole.empty()
    for piece, content in whole.pieces.items():
        piece.fill(tensor, content)  # pyright: ignore[reportArgumentType]
    return tensor


def _shards(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("shard-*-model-*.safetensors") if file.is_file())


def _saved_offsets(file: Path, within: Path | None) -> dict[str, list[int]]:
    """Where each tensor of a shard begins in the whole one, from the header."""
    with open_regular(file, within=within) as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = parse_json(opened.read(min(length, MOST_JSON_BYTES)).decode(), f"The header of {file}")
    info = header.get("__metadata__", {}).get("DCP_SHARDING_INFO")
    offsets = {name: one["saved_offsets"] for name, one in json.loads(info).items()} if info else {}
    if not all(type(n) is int for numbers in offsets.values() for n in numbers):
        raise ValueError("offsets that are no numbers")
    return offsets


def _content(source: Path, within: Path | None) -> dict[str, Any]:
    """What was saved, nested as it was, with `Pieces` for its tensors."""
    with open_regular(source, within=within) as opened:
        size = opened.seek(0, 2)
        opened.seek(0)
        metadata = _Metadata(opened, size).load()
    places = {
        (index.get("fqn"), _ints(index.get("offset") or ())): info
        for index, info in metadata.get("storage_data").items()
    }
    paths = metadata.get("planner_data")
    content: dict[str, Any] = {}
    for name, described in metadata.get("state_dict_metadata").items():
        if (size := described.get("size")) is None:  # pickled, or a tensor's worth of bytes
            continue
        tensor = Pieces(described.get("properties").state[0], _ints(size))
        for chunk in described.get("chunks"):
            piece = Piece(_ints(chunk.get("offsets")), _ints(chunk.get("sizes")))
            tensor.pieces[piece] = places.get((name, piece.offsets))
        *above, last = _path(name, paths.get(name) if isinstance(paths, dict) else None)
        inner = content
        for part in above:
            inner = inner.setdefault(part, {})
        inner[last] = tensor
    return content


def _path(name: str, saved: Any) -> tuple[str, ...]:
    """The keys that a tensor lay under when it was saved; Megatron has them in the name alone."""
    if isinstance(saved, tuple) and len(saved) > 1:
        named = next((i for i, part in enumerate(saved) if not isinstance(part, str)), len(saved) - 1)
        return (*saved[:named], ".".join(str(part) for part in saved[named:]))
    first, _, rest = name.partition(".")
    return (first, rest) if rest and _OPTIMIZER.fullmatch(first) else (name,)


def _check_sizes(wanted: dict[str, Pieces], source: Path) -> None:
    """See that the tensors are whole and no larger than the files, and turn what the metadata says into places.

    Raises:
        PhasewatchError: if a file is missing, or packed.
        ValueError: if the metadata doesn't fit itself or the files.
    """
    sizes: dict[str, int] = {}
    for tensor in wanted.values():
        if not isinstance(tensor.dtype, torch.dtype):
            raise ValueError("no dtype")
        tensor.check()
        for piece, info in tensor.pieces.items():
            tensor.pieces[piece] = place = _place(info, source)
            if place.file != Path(place.file).name or place.file in ("", "..", "."):
                raise PhasewatchError(f"{source} names {place.file!r}, which isn't a file beside it.")
            if place.file not in sizes:
                file = source.parent / place.file
                if not file.is_file():
                    raise PhasewatchError(f"{source} names {place.file}, which isn't there; put it beside it.")
                sizes[place.file] = file.stat().st_size
            if math.prod(piece.sizes) * tensor.dtype.itemsize > place.length:
                raise ValueError("a piece larger than its record")
    if sum(tensor.nbytes() for tensor in wanted.values()) > sum(sizes.values()) + SHARED_BYTES:
        raise ValueError("tensors larger than the files")


def _place(info: Any, source: Path) -> _Place:
    if packed := info.get("transform_descriptors"):
        raise PhasewatchError(f"{source} names packed pieces ({packed!r}), which aren't read; save without extensions.")
    place = _Place(info.get("relative_path"), info.get("offset"), info.get("length"))
    if not isinstance(place.file, str) or not all(type(n) is int and 0 <= n < 2**63 for n in place[1:]):
        raise ValueError("no place")
    return place


def _ints(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or not all(type(n) is int for n in values):
        raise ValueError("no whole numbers")
    return tuple(values)
