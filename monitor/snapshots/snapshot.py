"""A model's weights at a training step, in memory."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedTensorMixin  # pyright: ignore[reportAttributeAccessIssue]

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.snapshots.transfers import transfer


@dataclass(frozen=True)
class Snapshot:
    """The weights of a model at a training step.

    Attributes:
        step: the training step.
        tensors: parameters and buffers together, on the CPU and contiguous. `Snapshot.of` names them as
            `named_parameters` and `named_buffers` do; other people's files name them as `state_dict` does, wrappers
            and all, and `names.match_names` finds a model's tensors among them.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> snapshot = Snapshot.of(model, step=100)
        >>> snapshot.step, {name: tuple(tensor.shape) for name, tensor in snapshot.tensors.items()}
        (100, {'weight': (1, 2), 'bias': (1,)})
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
            PhasewatchError: if the model lies on the `meta` device, has lazy layers that haven't run, or is sharded.
        """
        model = unwrap(model)
        if any(hasattr(tensor, "full_tensor") for _, tensor in named_tensors(model)):
            raise PhasewatchError(
                f"Snapshot.of({type(model).__name__}(...), {step}): the model's weights are spread over several "
                "processes (FSDP or tensor parallelism). Have PhaseMonitor gather them, called on every rank."
            )
        if any(tensor.is_meta for _, tensor in named_tensors(model)):
            raise PhasewatchError(
                f"Snapshot.of({type(model).__name__}(...), {step}): the model lies on the meta device, which holds "
                "shapes and no weights. Give the one that is trained."
            )
        if any(isinstance(tensor, UninitializedTensorMixin) for _, tensor in named_tensors(model)):
            raise PhasewatchError(
                f"Snapshot.of({type(model).__name__}(...), {step}): the model has lazy layers that have no weights "
                "yet. Run it on a batch first."
            )
        return cls(step, {name: _copy(tensor) for name, tensor in named_tensors(model)})


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `DistributedDataParallel`, `DataParallel`, DeepSpeed's engine and `torch.compile`."""
    while isinstance(
        inner := model.module if _is_wrapper(model) else getattr(model, "_orig_mod", None),
        nn.Module,
    ):
        model = inner
    return model


def _is_wrapper(model: nn.Module) -> bool:
    is_engine = any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__)
    return is_engine or isinstance(model, DistributedDataParallel | nn.DataParallel)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer once, by its first name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _copy(tensor: Tensor) -> Tensor:
    copied = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    transfer(copied, tensor.detach())
    return copied


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
