"""A model whose weights are spread over processes, and its loss, as chains sample them in place."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.model.gradients import clear_gradients
from phasewatch.monitor.model.loss import Loss, ModelLoss
from phasewatch.monitor.model.minibatches import Batches
from phasewatch.monitor.model.outputs import scalar_of
from phasewatch.monitor.model.pieces import in_pieces, pieces_beside, samples_in
from phasewatch.monitor.model.shards import (
    ShardedVector,
    computed_in,
    data_rank,
    fully_sharded,
    mean_over_ranks,
    shards_of,
)
from phasewatch.monitor.model.weights import Mask, SampledModel
from phasewatch.monitor.snapshots.snapshot import Snapshot, named_tensors


class ShardedModel(SampledModel):
    """A `SampledModel` of which every process holds its part; snapshots and masks are of the whole.

    Args:
        module: built by `fully_shard` or `parallelize_module`, and kept and changed.
        device: where the user asked for it; it stays where it is.
        only: as of `SampledModel`.
        held: as of `SampledModel`.
        renamed: as of `SampledModel`.
        order: as of `SampledModel`.

    Attributes:
        parameters: this process's parts of the sampled parameters, as plain tensors.
        ranks: how many processes there are.

    Raises:
        PhasewatchError: for a model that can't be sampled.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device | None = None,
        only: Collection[str] | None = None,
        *,
        held: Mapping[str, Tensor] | None = None,
        renamed: Mapping[str, str] | None = None,
        order: Sequence[str] = (),
    ) -> None:
        tensors = dict(named_tensors(module))
        there = next(iter(tensors.values())).device
        if device is not None and device.type != there.type:
            raise PhasewatchError(
                f"Probe(device='{device}'): the model that the function builds is sharded on {there.type}. Build it on "
                "the devices where it is to be measured, and leave device=... out."
            )
        super().__init__(module, None, only, held=held, renamed=renamed, order=order)
        self._shards = shards_of(self._tensors)
        self.data_rank = data_rank(self.module)
        self.vector = ShardedVector([self._shards[name] for name in self.names], data_parallel=self.data_rank[1] > 1)
        self.parameters = list(self.vector.parameters)
        self.ranks = self.vector.ranks

    @property
    def size(self) -> int:
        """How many numbers are sampled, over all processes."""
        return self.vector.size

    @property
    def fixed(self) -> list[Tensor]:
        """This process's parts of what isn't sampled."""
        is_sampled = frozenset(self.names)
        return [shard.local for name, shard in self._shards.items() if name not in is_sampled]

    @property
    def description(self) -> dict[str, Any]:
        """What has to be the same on all processes."""
        placed = {
            name: (tuple(tensor.shape), str(tensor.dtype), str(getattr(tensor, "placements", "")))
            for name, tensor in self._tensors.items()
        }
        return {"model": type(self.module).__name__, "weights": sorted(placed.items()), "sampled": self.names}

    @property
    def own_buffers(self) -> list[Tensor]:
        """Those that snapshots may lack, so that the processes have to agree on them."""
        return list(self._optional.values())

    def mask(self, masks: Mapping[str, Tensor] | None) -> Mask:
        """As of `SampledModel`, of this process's parts."""
        if masks is None and not self._held:
            return None
        found: list[Tensor | None] = []
        still, moving = torch.zeros((), dtype=torch.bool), torch.ones((), dtype=torch.bool)
        for name in self.names:
            shard = self._shards[name]
            mask = (moving if masks is None else masks.get(name, still)).expand(shard.shape)
            mask = shard.of(mask & self._held[name] if name in self._held else mask)
            found.append(None if mask.all() else (mask if mask.any() else still).to(self.device))
        return None if all(mask is None for mask in found) else found

    @torch.no_grad()
    def load(self, snapshot: Snapshot) -> None:
        """As of `SampledModel`: each process takes its part of a whole snapshot."""
        self.reshard()
        self.refresh()
        super().load(snapshot)

    def nearby(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot itself: no process has room for the whole."""
        return snapshot

    def refresh(self) -> None:
        """Share memory with FSDP's parameters again, which may get other memory in their first pass."""
        for shard in self._shards.values():
            shard.refresh()

    def reshard(self) -> None:
        """Have FSDP forget whole parameters that it gathered, which a pass without a gradient leaves behind."""
        for part in fully_sharded(self.module):
            part.reshard()

    def _take(self, name: str, tensor: Tensor) -> None:
        self._shards[name].local.copy_(self._here(name, tensor))

    def _here(self, name: str, tensor: Tensor) -> Tensor:
        return self._shards[name].of(tensor)


class ShardedLoss(ModelLoss):
    """The loss of a sharded model: the same number on every process.

    Where the loss is the mean over samples and FSDP takes the mean of gradients, each process takes its part of a
    minibatch; else every process takes all of it.

    Args:
        model: the model.
        loss: `loss(model, batch)`, a scalar tensor.
    """

    model: ShardedModel

    def __init__(self, model: ShardedModel, loss: Loss) -> None:
        super().__init__(model, loss)
        self.captured = False
        self._survey = 0

    @property
    def vector(self) -> ShardedVector:
        """The sampled parameters of all processes as one vector."""
        return self.model.vector

    def value(self, batch: Any, *, for_chains: bool = False) -> Tensor:
        """The loss at the weights that the model has now, the mean over the processes; it is never compiled."""
        self.model.reshard()
        rank, ranks = self.model.data_rank
        if self._splits and ranks > 1 and samples_in(batch) % ranks == 0:
            batch = in_pieces(batch, ranks)[rank][1]
        return mean_over_ranks(_whole(super().value(batch)))

    def here(self, batch: Any) -> Any:
        """What the loss returned on this process for all of a minibatch."""
        self.model.reshard()
        return _whole(scalar_of(self.loss(self.model.module, batch)))

    def backward(self, value: Tensor) -> None:
        """The backward pass of a value, whose gradients each process adds to its own parts."""
        self.vector.backward(value)

    def choose_path(self, batches: Batches, chosen: tuple[bool, str] | None = None) -> None:
        """One chain after another, since functions of weights that are handed in aren't those of a sharded module.

        Args:
            batches: two or more minibatches.
            chosen: as of `ModelLoss`; there is no other choice here.
        """
        some = [batches[number] for number in range(len(batches))]
        _, ranks = self.model.data_rank
        if ranks > 1:
            self._splits = self.splits(some)
            self._splits = self.vector.all(self._splits)
        if self.model.device.type == "cuda":
            self.bytes_of_a_row(some[0])
            self.activations = self.vector.most(self.activations)
            self._survey = self.vector.most(self._bytes_of_a_survey(some))
        shared = self._splits and ranks > 1 and samples_in(some[0]) % ranks == 0
        each = f"1/{ranks} of a minibatch" if shared else "all of a minibatch"
        self.path = (
            f"Chains run one after another in place, on the shards of {self.model.ranks} process"
            f"{'es, each' if self.model.ranks > 1 else ''} with {each}: a sharded model can't be vectorised."
        )

    def choose_rounded(self, batches: Sequence[Any]) -> None:
        """Leave parameters as they are: FSDP's mixed precision rounds them as it gathers them.

        Args:
            batches: some minibatches.
        """

    def bytes_of_a_pass(self, pieces: int) -> int:
        """As of `ModelLoss`, with what FSDP gathers; as much as a survey takes at least."""
        gathered = max(self._survey - self.model.nbytes, 0)
        return max(super().bytes_of_a_pass(pieces) + gathered, self._survey) if self._survey else 0

    def _bytes_of_a_survey(self, batches: Sequence[Any]) -> int:
        """The most memory that torch takes for the passes of steps and surveys, beside the weights.

        It is measured, since all processes wait where one has no memory left in the middle of a pass. What FSDP frees
        on one of its streams can't be used on another, so that more is taken than is ever allocated. Where that isn't
        there, torch waits for the GPU in each step and gives memory back.
        """
        device, parts = self.model.device, 1
        if self.splits(batches):
            parts = pieces_beside(self.model.nbytes, self.activations, samples_in(batches[0]))
        part = in_pieces(batches[0], self.vector.most(parts))[0][1]
        clear_gradients(self.model.parameters)
        self.model.reshard()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        self.add_gradient(batches[0])
        clear_gradients(self.model.parameters)
        for _ in range(2):
            self.add_gradient(part)
        clear_gradients(self.model.parameters)
        return torch.cuda.max_memory_reserved(device) - before

    @property
    def tolerance(self) -> float:
        """As of `ModelLoss`, with the types of FSDP's mixed precision."""
        low = any(dtype.itemsize <= 2 for dtype in computed_in(self.model.module))
        return 0.05 if low else super().tolerance


def class_name(module: nn.Module) -> str:
    """The name of a model's class, without what `fully_shard` puts in front of it."""
    kinds = type(module).__mro__
    return kinds[getattr(kinds[0], "_orig_cls_mro_index", 2) if hasattr(module, "_get_fsdp_state") else 0].__name__


def _whole(value: Any) -> Any:
    """A loss as a plain tensor, where tensor parallelism left it a DTensor."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
