"""A model's weights at a training step, in memory and in the folder of a run."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from phasewatch.monitor.errors import PhasewatchError


@dataclass(frozen=True)
class Snapshot:
    """The weights of a model at a training step.

    Attributes:
        step: the training step.
        tensors: parameters and buffers together, on the CPU and contiguous. `Snapshot.of` names them as
            `named_parameters` and `named_buffers` do; other people's files name them as `state_dict` does.
    """

    step: int
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, step: int) -> "Snapshot":
        """Copy a model's parameters and buffers, tied ones once.

        A wrapper left by DDP or `torch.compile` is looked through.

        Args:
            model: any module, left as it is.
            step: the training step it is at.

        Returns:
            The copy.

        Raises:
            PhasewatchError: if the model lies on the `meta` device.
        """
        model = unwrap(model)
        if any(tensor.is_meta for _, tensor in named_tensors(model)):
            raise PhasewatchError(
                f"Snapshot.of({type(model).__name__}(...), {step}): the model lies on the meta device, which holds "
                "shapes and no weights. Give the one that is trained."
            )
        return cls(step, {name: _copy(tensor) for name, tensor in named_tensors(model)})


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `DistributedDataParallel`, `DataParallel` and `torch.compile`."""
    while isinstance(
        inner := model.module
        if isinstance(model, DistributedDataParallel | nn.DataParallel)
        else getattr(model, "_orig_mod", None),
        nn.Module,
    ):
        model = inner
    return model


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer once, by its first name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _copy(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())


@dataclass(frozen=True)
class SnapshotFolder:
    """The snapshots of a run, one safetensors file a step: `step-00001234.safetensors`.

    Attributes:
        path: the folder, as a path or a string; made when the first snapshot is saved.
    """

    path: Path

    _PATTERN = re.compile(r"step-(\d+)\.safetensors")

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that are there, in order."""
        if not self.path.is_dir():
            return ()
        found = (self._PATTERN.fullmatch(entry.name) for entry in self.path.iterdir())
        return tuple(sorted(int(match[1]) for match in found if match))

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Snapshot]:
        return (self.load(step) for step in self.steps)

    def source(self, step: int) -> Path:
        """The file of a step."""
        return self.path / f"step-{step:08d}.safetensors"

    def save(self, snapshot: Snapshot) -> None:
        """Write a snapshot; a file under its final name is always whole, whatever kills the process.

        Raises:
            OSError: if the disk refuses it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        target = self.source(snapshot.step)
        unfinished = target.with_suffix(".unfinished")
        try:
            save_file(dict(snapshot.tensors), unfinished, metadata={"step": str(snapshot.step)})
            os.replace(unfinished, target)
        except SafetensorError as error:  # which is what a full disk is to safetensors
            raise OSError(str(error)) from error
        finally:
            unfinished.unlink(missing_ok=True)

    def load(self, step: int) -> Snapshot:
        """Read the snapshot of a step.

        Args:
            step: one of `steps`.

        Returns:
            The snapshot as it was saved, bit for bit.

        Raises:
            PhasewatchError: if the file is missing or damaged.
        """
        source = self.source(step)
        try:
            return Snapshot(step, load_file(source))
        except (OSError, SafetensorError) as error:
            raise PhasewatchError(
                f"The snapshot {source} can't be read ({error}). Delete it to go on without step {step}."
            ) from error


def same_weights(a: Snapshot, b: Snapshot) -> bool:
    """Whether two snapshots hold the same tensors, bit for bit."""
    return a.tensors.keys() == b.tensors.keys() and all(
        _same_bits(tensor, b.tensors[name]) for name, tensor in a.tensors.items()
    )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype and a.shape == b.shape and a.flatten().view(torch.uint8).equal(b.flatten().view(torch.uint8))
    )


class Snapshots(Protocol):
    """Anything that finds snapshots by step: `SnapshotFolder`, or a series of somebody else's."""

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that are there, in order."""
        ...

    def load(self, step: int) -> Snapshot:
        """Read one."""
        ...

    def source(self, step: int) -> Path:
        """Where one comes from, for messages."""
        ...
