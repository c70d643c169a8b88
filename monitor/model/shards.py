"""Parameters of which each process of a group holds a part: FSDP2 (`fully_shard`) and tensor parallelism (DTensor).

Each parameter is held as a plain tensor that shares its memory with this process's shard. Chains move those tensors,
and what is summed over all parameters is summed over the processes, with replicated parameters counted once. Nothing
random is drawn by DTensor, whose numbers depend on how many processes there are.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn

from phasewatch.monitor.errors import PhasewatchError, in_words
from phasewatch.monitor.model.gradients import Vector, clear_gradients, square
from phasewatch.monitor.model.weights import Mask, mask_of

_Thing = TypeVar("_Thing")


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this process holds a part or a replica."""
    return hasattr(tensor, "full_tensor")


class Shard:
    """A parameter or buffer as this process holds it.

    Args:
        own: a DTensor, or a plain tensor of which every process holds all.

    Attributes:
        own: as given.
        local: this process's part as a plain tensor that shares its memory; `own` itself where that is plain.
        shape: of the whole tensor.
        counts: whether sums over all processes take this part from here, as one process alone holds it, or the first.
    """

    def __init__(self, own: Any) -> None:
        self.own = own
        self.shape: torch.Size = own.shape
        self.local: Tensor = own
        self.counts = dist.get_rank() == 0
        self._where: list[slice | Tensor] = [slice(None)] * own.ndim
        if is_shard(own):
            self.local = own.to_local().detach().requires_grad_(own.requires_grad)
            self._where = [self._along(axis) for axis in range(own.ndim)]
            mesh = own.device_mesh
            replica = [at for at, how in zip(mesh.get_coordinate(), own.placements, strict=True) if how.is_replicate()]
            self.counts = not any(replica) and 0 in mesh.mesh  # of parallel meshes, the one with the first process

    def of(self, whole: Tensor) -> Tensor:
        """This process's part of a tensor of the whole's shape, which may be expanded."""
        for axis, where in enumerate(self._where):
            if isinstance(where, slice):
                whole = whole[(slice(None),) * axis + (where,)]
            else:
                whole = whole.index_select(axis, where.to(whole.device))
        return whole

    @property
    def offset(self) -> int | None:
        """Where this part begins in the whole one, flattened; None if it isn't a contiguous piece of that."""
        slices = [where for where in self._where if isinstance(where, slice)]
        if len(slices) < len(self.shape) or any(where != slice(None) for where in slices[1:]):
            return None
        return (slices[0].start or 0) * math.prod(self.shape[1:]) if slices else 0

    def lend(self) -> None:
        """Let the parameter itself hold the gradient that `local` holds, for a backward pass to add to."""
        if self.own is self.local:
            return
        grad, own = self.local.grad, self.own
        own.grad = None
        if grad is not None:
            from torch.distributed.tensor import DTensor

            placed = {"shape": own.shape, "stride": own.stride(), "run_check": False}
            own.grad = DTensor.from_local(grad, own.device_mesh, own.placements, **placed)

    def take(self) -> None:
        """Let `local` hold the gradient that a backward pass left, and the parameter itself none."""
        if self.own is self.local:
            return
        grad, self.own.grad = self.own.grad, None
        if grad is not None:
            grad = grad.redistribute(placements=self.own.placements) if grad.placements != self.own.placements else grad
            self.local.grad = grad.to_local()

    def refresh(self) -> None:
        """Share memory with the parameter again, where it was given other memory."""
        if self.own is not self.local and self.local.data_ptr() != self.own.to_local().data_ptr():
            self.local.data = self.own.to_local().detach()

    def _along(self, axis: int) -> slice | Tensor:
        """Which indices of an axis are here, found by sharding their numbers in the same way."""
        from torch.distributed.tensor import Replicate, distribute_tensor

        mesh = self.own.device_mesh
        here = [_at_axis_0(how) if getattr(how, "dim", None) == axis else Replicate() for how in self.own.placements]
        numbers = torch.arange(self.shape[axis], device=mesh.device_type)
        indices = distribute_tensor(numbers, mesh, here, src_data_rank=None).to_local().cpu()
        if len(indices) == self.shape[axis]:
            return slice(None)
        if not len(indices):
            return slice(0, 0)
        first, last = int(indices[0]), int(indices[-1])
        return slice(first, last + 1) if last - first + 1 == len(indices) else indices


class ShardedVector(Vector):
    """The sampled parameters of all processes as one vector.

    Args:
        shards: of the sampled parameters.
        data_parallel: whether gradients are means over processes that see different samples.
    """

    def __init__(self, shards: Sequence[Shard], *, data_parallel: bool = False) -> None:
        super().__init__([shard.local for shard in shards])
        self._shards = list(shards)
        self._data_parallel = data_parallel
        self.sizes = [shard.shape.numel() for shard in shards]
        self.ranks = dist.get_world_size()

    @property
    def offsets(self) -> list[int] | None:
        """Where each part begins in its whole parameter; None where one isn't a contiguous piece."""
        found = [shard.offset for shard in self._shards]
        return None if None in found else [offset or 0 for offset in found]

    def total(self, sums: Tensor) -> Tensor:
        """Sums over this process's parameters, added over all processes."""
        sums = sums.contiguous()
        dist.all_reduce(sums)
        return sums

    def counted(self, things: Sequence[_Thing]) -> list[_Thing]:
        """Those of one thing for each parameter that sums take from this process."""
        return [thing for thing, shard in zip(things, self._shards, strict=True) if shard.counts]

    @torch.no_grad()
    def norm(self, tensors: Sequence[Tensor]) -> float:
        """The Euclidean length of one tensor for each parameter, as one vector."""
        zero = torch.zeros((), dtype=torch.float64, device=self.parameters[0].device)
        return math.sqrt(float(self.total(sum(map(square, self.counted(tensors)), zero))))

    def all(self, here: bool) -> bool:
        """Whether something holds on every process."""
        return float(self.total(torch.tensor(float(not here), device=self.parameters[0].device))) == 0

    def most(self, here: int) -> int:
        """The largest of the numbers of all processes."""
        found = torch.tensor(here, device=self.parameters[0].device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def noise(self, number: int, generator: Generator, like: Tensor) -> Tensor:
        """Standard normal noise of a parameter's whole shape, of which this process takes its part."""
        shard = self._shards[number]
        return shard.of(torch.empty(shard.shape, dtype=like.dtype, device=like.device).normal_(generator=generator))

    def part(self, group: Sequence[int], flat: Tensor) -> Tensor:
        """What this process needs of a vector of the whole of some parameters."""
        shards = [self._shards[k] for k in group]
        pieces = flat.split([self.sizes[k] for k in group])
        parts = [s.of(piece.view(s.shape)).reshape(-1) for s, piece in zip(shards, pieces, strict=True)]
        return torch.cat(parts)

    @contextmanager
    def intercepted(self, masks: Mask, see: Callable[[Tensor, Tensor | None], object], *, add: bool) -> Iterator[None]:
        """As `gradients.intercepted`; what the parameters hold is put aside, and new gradients go as they come.

        FSDP calls a parameter's hook once, with the gradient of all its uses, but no hook of its gradient. Gradients of
        tensor parallelism that have to be summed over the processes first are seen at the end.
        """
        held = [parameter.grad for parameter in self.parameters]
        clear_gradients(self.parameters)

        def take(number: int, grad: Tensor) -> None:
            before = held[number]
            if (mask := mask_of(masks, number)) is not None:
                grad.mul_(mask)
            if self._shards[number].counts:
                see(grad, before)
            if add:
                held[number] = grad if before is None else before.add_(grad)

        def hook(number: int) -> Callable[[Any], None]:
            def came(own: Any) -> None:
                if own.grad.placements == own.placements:
                    grad, own.grad = own.grad, None
                    take(number, grad.to_local())

            return came

        shards = [(number, shard.own) for number, shard in enumerate(self._shards) if is_shard(shard.own)]
        handles = [own.register_post_accumulate_grad_hook(hook(number)) for number, own in shards]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        for number, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                take(number, parameter.grad)
            parameter.grad = held[number]

    def backward(self, value: Tensor) -> None:
        """A backward pass that adds to what the parameters hold."""
        for shard in self._shards:
            shard.lend()
        value.backward()
        for shard in self._shards:
            shard.take()
            if self._data_parallel and shard.own is shard.local and shard.local.grad is not None:  # FSDP leaves it out
                dist.all_reduce(shard.local.grad)
                shard.local.grad.div_(self.ranks)

    def agree(self, **what: Any) -> None:
        """Compare what the processes are about to do.

        Raises:
            PhasewatchError: on every process, if one of them differs from the first.
        """
        found: list[Any] = [None] * self.ranks
        with self.together():
            dist.all_gather_object(found, {name: repr(value) for name, value in what.items()})
        for rank, other in enumerate(found):
            if differing := [name for name in other if other[name] != found[0].get(name)]:
                name = differing[0]
                ours, theirs = (text[:200] for text in (str(found[0].get(name)), other[name]))
                raise PhasewatchError(
                    f"A probe of a sharded model is to be the same on every process, and {name} differs: {ours} on "
                    f"rank 0, and {theirs} on rank {rank}. Every rank must make the probe with the same arguments and "
                    "call it with the same snapshots."
                )

    def together(self) -> AbstractContextManager[None]:
        """Say in a sentence inside that another process has ended, or didn't come along."""
        return _together()


BACKENDS = "gloo", "nccl", "mpi", "xccl", "pair closure"
"""Words of errors of the exchange with other processes; the last is of gloo, which doesn't name itself there."""


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        words = str(error).lower()
        if not isinstance(error, dist.DistError) and not any(name in words for name in BACKENDS):
            raise
        raise PhasewatchError(
            f"The processes that hold the probe's model no longer work together ({in_words(error)[:300]}). One of them "
            "has ended or hangs, built another model, or wasn't called. Every rank must make the same probe and call "
            "it with the same snapshots."
        ) from error


def mean_over_ranks(value: Tensor) -> Tensor:
    """A loss as the mean over all processes, whose backward pass is that of each one's own."""
    return _Mean.apply(value)  # pyright: ignore[reportReturnType]


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.detach().double()
        dist.all_reduce(total)
        return (total / dist.get_world_size()).to(value.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad


def shards_of(tensors: Mapping[str, Tensor]) -> dict[str, Shard]:
    """Tensors of a model as this process holds them.

    Raises:
        PhasewatchError: if none is a DTensor, or one is spread over other processes than this one.
    """
    if not any(map(is_shard, tensors.values())):
        raise PhasewatchError(
            "Probe(model=...) builds a model that FullyShardedDataParallel or DeepSpeed's ZeRO 3 has spread over "
            "processes, which can't be sampled. Build it with torch.distributed.fsdp.fully_shard, or unsharded."
        )
    for name, tensor in tensors.items():
        if is_shard(tensor) and tensor.device_mesh.get_coordinate() is None:  # pyright: ignore[reportAttributeAccessIssue]
            raise PhasewatchError(
                f"Probe(model=...): process {dist.get_rank()} holds no part of {name}, whose device mesh leaves it "
                "out. Build the model over all processes, and start no more than hold it."
            )
    return {name: Shard(tensor) for name, tensor in tensors.items()}


def fully_sharded(module: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was called on."""
    return [part for part in module.modules() if hasattr(part, "_get_fsdp_state")]


def data_rank(module: nn.Module) -> tuple[int, int]:
    """This process's number among those over which FSDP takes the mean of gradients, and how many they are.

    It is 0 of 1 where that differs from module to module: each process then takes all of a minibatch.
    """
    found = set()
    for part in fully_sharded(module):
        state = part._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for group in filter(None, groups):
            info = group.mesh_info
            rank, size = getattr(info, "shard_mesh_rank", 0), getattr(info, "shard_mesh_size", 1)
            outer, times = getattr(info, "replicate_mesh_rank", 0), getattr(info, "replicate_mesh_size", 1)
            found.add((outer * size + rank, times * size))
    return found.pop() if len(found) == 1 else (0, 1)


def computed_in(module: nn.Module) -> set[torch.dtype]:
    """The types that FSDP's mixed precision computes in."""
    policies = [part._get_fsdp_state()._mp_policy for part in fully_sharded(module)]
    return {policy.param_dtype for policy in policies if policy.param_dtype is not None}


def _at_axis_0(how: Any) -> Any:
    from torch.distributed.tensor import Shard as Split

    return type(how)(0, split_factor=how.split_factor) if hasattr(how, "split_factor") else Split(0)
