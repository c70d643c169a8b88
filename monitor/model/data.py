"""Every form of training data as one thing: a function that draws a minibatch with a generator."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler, WeightedRandomSampler
from torch.utils.data import default_collate as collate_by_default

from phasewatch.monitor.errors import PhasewatchError, in_words, warn
from phasewatch.monitor.model.random_state import iterators_in, own_copy_of

_FORMS = (
    "Probe(data=...) takes a tensor, a tuple or dict of tensors with the sample axis first, a Dataset with a length, "
    "a list of samples that are tuples or dicts, a DataLoader over one, or a function (generator, batch_size) -> batch"
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
        """The batch of some samples.

        Raises:
            PhasewatchError: if the dataset or the collate function fails.
        """
        try:
            return self.collate([self.dataset[row] for row in rows.tolist()])
        except PhasewatchError:
            raise
        except Exception as error:
            raise PhasewatchError(
                f"Probe(data=...): {len(rows)} samples of {type(self.dataset).__name__} can't be put together "
                f"({in_words(error)}). Give a DataLoader(dataset, collate_fn=...) that makes a batch of them."
            ) from error


@dataclass(frozen=True)
class FunctionData:
    """Minibatches that a function draws."""

    draw: Callable[[Generator, int], Any]

    def __call__(self, generator: Generator, batch_size: int) -> Any:
        """Draw `batch_size` samples.

        Raises:
            PhasewatchError: if the function fails.
        """
        try:
            return self.draw(generator, batch_size)
        except (PhasewatchError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            name = getattr(self.draw, "__name__", type(self.draw).__name__)
            raise PhasewatchError(
                f"Probe(data={name}): {name}(generator, {batch_size}) failed ({in_words(error)}). It is called with a "
                "torch.Generator and how many samples to draw, as often as minibatches are needed."
            ) from error


def as_minibatches(data: Any, batch_size: int | None, sampler: str = "Langevin") -> Minibatches:
    """Turn any form of data into a source of minibatches.

    A DataLoader is asked for its dataset and its collate function and never iterated, so that its sampler, its
    workers and its place in the epoch stay as they are. Where its sampler draws from a subset, so do minibatches.
    Samples are drawn from copies of both, which may hold random generators or counters of their own.

    Args:
        data: a tensor; a tuple, list or dict of tensors, sample axis first; a map-style Dataset, or a list of samples
            that are tuples or mappings; a DataLoader over one; or a function `(generator, batch_size) -> batch`.
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
    elif loader is None and isinstance(dataset, Tensor | tuple | list | Mapping) and not _are_samples(dataset):
        source = _tensor_data(dict(dataset) if isinstance(dataset, Mapping) else dataset)
    elif hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not isinstance(dataset, str | bytes):
        collate = collate_by_default if loader is None else loader.collate_fn
        if collate is collate_by_default:
            collate = _PlainCollate(_text_columns(dataset))
        dataset, collate = own_copy_of((dataset if loader is None else dataset_of(loader), collate))
        source = DatasetData(dataset, len(dataset), collate)
    elif callable(data):
        if iterators_in(data):
            warn(
                "Probe(data=...) is a function that takes from an iterator. What it draws then depends on what was "
                "taken before, so a replay sees other data; and if training takes from it too, it misses what the "
                "probe takes. Draw by the generator that the function is given, or give some of the samples as tensors."
            )
        if batch_size is None:
            raise PhasewatchError(
                f"{sampler}(batch_size=None) means all of the data at each step, and Probe(data=...) is a function, "
                "which has no end. Give batch_size a number, or give the data as tensors."
            )
        return data if isinstance(data, FunctionData) else FunctionData(data)
    else:
        raise PhasewatchError(f"{_FORMS}; a {type(dataset).__name__} came.")
    if source.size < (batch_size or 1):
        raise PhasewatchError(
            f"Probe(data=...) has {source.size} samples, fewer than {sampler}(batch_size={batch_size or 1}). "
            "Give more data or a smaller batch_size."
        )
    return source


def dataset_of(loader: Any) -> Any:
    """The part of a loader's dataset that its sampler draws from.

    Args:
        loader: a DataLoader, or what a trainer has in its place.

    Example:
        >>> loader = DataLoader(range(9), sampler=SubsetRandomSampler([3, 8]))
        >>> list(dataset_of(loader))
        [3, 8]
    """
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, SubsetRandomSampler):
        return Subset(loader.dataset, list(sampler.indices))
    if isinstance(sampler, WeightedRandomSampler):
        warn(
            "DataLoader(sampler=WeightedRandomSampler(...)): minibatches are drawn from all samples alike, so the loss "
            "isn't that of training. Give a function (generator, batch_size) -> batch that draws by weight."
        )
    return loader.dataset


def _are_samples(data: Any) -> bool:
    """Whether it is a list of samples, a tuple or a mapping each, and not one of columns."""
    return isinstance(data, list) and len(data) > 1 and all(isinstance(sample, tuple | Mapping) for sample in data)


def is_a_source(data: Any) -> bool:
    """Whether it is a dataset or a loader, and not a batch."""
    return isinstance(data, Dataset | DataLoader) or hasattr(data, "column_names")


@dataclass(frozen=True)
class _PlainCollate:
    """torch's default, which also takes columns of numbers in lists, as tokenised datasets of Hugging Face have them.

    Attributes:
        text: the columns to leave out.
    """

    text: frozenset[str]

    def __call__(self, samples: list[Any]) -> Any:
        if not isinstance(samples[0], Mapping):
            return collate_by_default(samples)
        names = [name for name in samples[0] if name not in self.text]
        return {name: self._column(name, [sample[name] for sample in samples]) for name in names}

    def _column(self, name: str, values: list[Any]) -> Any:
        if not isinstance(values[0], list):
            if isinstance(values[0], Tensor) and len(lengths := {tuple(value.shape) for value in values}) > 1:
                raise _ragged(name, sorted(shape[0] if len(shape) == 1 else shape for shape in lengths))
            return collate_by_default(values)
        if len(lengths := {len(value) for value in values}) > 1:
            raise _ragged(name, sorted(lengths))
        return torch.tensor(values)


def _ragged(name: str, lengths: list[Any]) -> PhasewatchError:
    return PhasewatchError(
        f"Probe(data=...): samples have {name!r} of lengths {', '.join(map(str, lengths[:3]))}"
        f"{' and others' if len(lengths) > 3 else ''}, so they make no tensor. Give a DataLoader with a collate "
        "function that pads them, such as DataLoader(dataset, collate_fn=DataCollatorWithPadding(tokenizer)) or "
        "trainer.get_train_dataloader()."
    )


def _text_columns(dataset: Any) -> frozenset[str]:
    """The columns of a Hugging Face dataset that hold text, which no model takes."""
    if not hasattr(dataset, "column_names") or not len(dataset) or not isinstance(dataset[0], Mapping):
        return frozenset()
    text = frozenset(name for name, value in dataset[0].items() if isinstance(value, str))
    if text:
        warn(f"Probe(data=Dataset(...)): the columns of text {', '.join(map(repr, sorted(text)))} are left out.")
    return text


def _in_tensors(data: Any) -> Any:
    """Arrays, and columns of numbers in lists, as a tokenizer returns them, as tensors."""
    if not isinstance(data, Mapping):
        return data
    return {name: _column_in_tensors(name, column) for name, column in data.items()}


def _column_in_tensors(name: str, column: Any) -> Any:
    if isinstance(column, np.ndarray) and column.dtype.kind in "iufcb":
        return torch.from_numpy(column)
    if not isinstance(column, list) or any(isinstance(leaf, Tensor) for leaf in tree_leaves(column)):
        return column
    if all(isinstance(row, list) for row in column) and len(lengths := {len(row) for row in column}) > 1:
        raise _ragged(name, sorted(lengths))
    try:
        return torch.tensor(column)
    except (ValueError, TypeError, RuntimeError):
        return column


def _tensor_data(data: Any) -> TensorData:
    data = _in_tensors(data)
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
