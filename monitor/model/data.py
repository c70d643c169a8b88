"""Every form of training data as one thing: a function that draws a minibatch with a generator."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Generator, Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data import default_collate as collate_by_default

from phasewatch.monitor.errors import PhasewatchError

_FORMS = (
    "Probe(data=...) takes a tensor, a tuple or dict of tensors with the sample axis first, a Dataset with a length, "
    "a DataLoader over one, or a function (generator, batch_size) -> batch"
)


class Minibatches(Protocol):
    """A source of minibatches; what it draws depends on the generator alone."""

    def __call__(self, generator: Generator, batch_size: int) -> Any:
        """Draw a minibatch."""
        ...


class HeldData(ABC):
    """Samples that can be counted and fetched by number."""

    size: int

    @abstractmethod
    def rows(self, rows: Tensor) -> Any:
        """The batch of some samples.

        Args:
            rows: their numbers, shape (sample,), on the CPU.
        """

    def __call__(self, generator: Generator, batch_size: int) -> Any:
        """Draw `batch_size` of the samples."""
        return self.rows(draw_indices(self.size, batch_size, generator))


@dataclass(frozen=True)
class TensorData(HeldData):
    """Samples held as tensors whose first axis counts them."""

    tensors: Any
    size: int

    def rows(self, rows: Tensor) -> Any:
        """The batch of some samples."""
        return tree_map(lambda tensor: tensor[rows.to(tensor.device)], self.tensors)


@dataclass(frozen=True)
class DatasetData(HeldData):
    """Samples fetched one by one and put together by a collate function."""

    dataset: Dataset
    size: int
    collate: Callable[[list[Any]], Any]

    def rows(self, rows: Tensor) -> Any:
        """The batch of some samples."""
        return self.collate([self.dataset[row] for row in rows.tolist()])


def as_minibatches(data: Any, batch_size: int | None, sampler: str = "Langevin") -> Minibatches:
    """Turn any form of data into a source of minibatches.

    A DataLoader is asked for its dataset and its collate function and never iterated, so that its sampler, its
    workers and its place in the epoch stay as they are.

    Args:
        data: a tensor; a tuple, list or dict of tensors, sample axis first; a map-style Dataset; a DataLoader over
            one; or a function `(generator, batch_size) -> batch`.
        batch_size: the samples that will be drawn at a time; None for all of them.
        sampler: the name of the settings that say so, for messages.

    Returns:
        The source.

    Raises:
        PhasewatchError: if the data is of another form, or has fewer samples than a minibatch.

    Example:
        >>> source = as_minibatches((torch.arange(6.0), torch.arange(6)), batch_size=3)
        >>> x, y = source(Generator().manual_seed(0), 3)
        >>> x.shape, torch.equal(x.long(), y)
        (torch.Size([3]), True)
    """
    loader = data if isinstance(data, DataLoader) else None
    dataset: Any = data if loader is None else loader.dataset
    if isinstance(dataset, IterableDataset):
        raise PhasewatchError(
            f"Probe(data={'IterableDataset' if loader is None else 'DataLoader'}(...)) needs a dataset with a length, "
            "and this one can only be iterated. Give a function (generator, batch_size) -> batch instead."
        )
    if loader is not None and loader.batch_sampler is None:
        raise PhasewatchError(
            "Probe(data=DataLoader(batch_size=None)) has a dataset of whole batches, and minibatches are drawn sample "
            "by sample. Give a function (generator, batch_size) -> batch instead."
        )
    if isinstance(data, HeldData):
        source = data
    elif loader is None and isinstance(dataset, Tensor | tuple | list | Mapping):
        source = _tensor_data(dict(dataset) if isinstance(dataset, Mapping) else dataset)
    elif hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not isinstance(dataset, str | bytes):
        source = DatasetData(dataset, len(dataset), collate_by_default if loader is None else loader.collate_fn)
    elif callable(data):
        if batch_size is None:
            raise PhasewatchError(
                f"{sampler}(batch_size=None) means all of the data at each step, and Probe(data=...) is a function, "
                "which has no end. Give batch_size a number, or give the data as tensors."
            )
        return cast(Minibatches, data)
    else:
        raise PhasewatchError(f"{_FORMS}; a {type(dataset).__name__} came.")
    if source.size < (batch_size or 1):
        raise PhasewatchError(
            f"Probe(data=...) has {source.size} samples, fewer than {sampler}(batch_size={batch_size or 1}). "
            "Give more data or a smaller batch_size."
        )
    return source


def _tensor_data(data: Any) -> TensorData:
    leaves = tree_leaves(data)
    strangers = [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor)]
    if strangers or not leaves:
        raise PhasewatchError(
            f"{_FORMS}; a {type(data).__name__} with {strangers[0] if strangers else 'nothing'} in it came."
        )
    sizes = {len(leaf) if leaf.ndim else 0 for leaf in leaves}
    if len(sizes) > 1:
        raise PhasewatchError(
            f"The tensors of Probe(data=...) have {sorted(sizes)} samples; "
            "the first axis must be the same in all of them."
        )
    return TensorData(data, sizes.pop())


def draw_indices(size: int, count: int, generator: Generator) -> Tensor:
    """`count` of `size` samples without replacement; from more than 65,536 samples with replacement, which is faster.

    Args:
        size: how many samples there are.
        count: how many to draw; all of them means each once, in order.
        generator: on the CPU.

    Returns:
        Indices of shape (count,).

    Example:
        >>> draw_indices(3, 3, Generator())
        tensor([0, 1, 2])
    """
    if count == size:
        return torch.arange(size, device="cpu")
    if size > 2**16:
        return torch.randint(size, (count,), generator=generator, device="cpu")
    return torch.randperm(size, generator=generator, device="cpu")[:count]


def move(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device; mappings become plain dicts, everything else stays what it is."""
    if isinstance(batch, Mapping):
        return {key: move(value, device) for key, value in batch.items()}
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)
