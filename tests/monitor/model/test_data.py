"""Every form of data as one function of a generator."""

from collections import Counter, OrderedDict, UserDict, namedtuple

import numpy as np
import pytest
import torch
from torch import Generator
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.model.data import as_minibatches, draw_indices, move

N = 50
X = torch.arange(N * 3, dtype=torch.float32).reshape(N, 3)
Y = torch.arange(N)
Pair = namedtuple("Pair", ["x", "y"])


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


class Squares(Dataset):
    """Sample i is (row i of X, i)."""

    def __len__(self):
        return N

    def __getitem__(self, row):
        return X[row], row


class NeverIterated(DataLoader):
    """A loader that fails as soon as anything but its parts is asked for."""

    def __iter__(self):
        raise AssertionError("the loader was iterated")


def on_the_fly(generator, batch_size):
    rows = torch.randint(N, (batch_size,), generator=generator)
    return X[rows], rows


def pairs(samples):
    """A collate function of one's own."""
    return {"x": torch.stack([x for x, _ in samples]), "y": torch.tensor([y for _, y in samples])}


FORMS = {
    "tensor": lambda: X,
    "tuple": lambda: (X, Y),
    "list": lambda: [X, Y],
    "named tuple": lambda: Pair(X, Y),
    "dict": lambda: {"x": X, "y": Y},
    "ordered dict": lambda: OrderedDict(x=X, y=Y),
    "mapping": lambda: UserDict(x=X, y=Y),
    "nested": lambda: {"inputs": (X, {"again": X}), "y": Y},
    "array": lambda: X.numpy(),
    "list of pairs": lambda: [(x, int(y)) for x, y in zip(X, Y, strict=True)],
    "list of dicts": lambda: [{"x": x, "y": y} for x, y in zip(X, Y, strict=True)],
    "tensor dataset": lambda: TensorDataset(X, Y),
    "dataset": Squares,
    "subset": lambda: Subset(Squares(), range(N)),
    "loader": lambda: NeverIterated(Squares(), batch_size=7, shuffle=True),
    "loader of pairs": lambda: NeverIterated([(x, int(y)) for x, y in zip(X, Y, strict=True)], batch_size=7),
    "loader of rows": lambda: NeverIterated(list(X), batch_size=7),
    "loader with its own collate": lambda: NeverIterated(Squares(), batch_size=7, collate_fn=pairs),
    "loader with workers": lambda: NeverIterated(Squares(), batch_size=7, num_workers=1),
    "function": lambda: on_the_fly,
}


def x_and_y(batch):
    """The inputs and the labels of a batch of any form; the rows' own numbers where there are no labels."""
    if isinstance(batch, dict) and "inputs" in batch:
        x, again = batch["inputs"]
        assert torch.equal(x, again["again"])
        return x, batch["y"]
    if isinstance(batch, dict):
        return batch["x"], batch["y"]
    if isinstance(batch, torch.Tensor):
        return batch, (batch[:, 0] / 3).long()
    return batch


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_holds_whole_samples_drawn_with_the_generator_alone(form):
    source = as_minibatches(FORMS[form](), 8)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    x, y = x_and_y(source(generator(5), 8))
    assert torch.equal(torch.get_rng_state(), before)
    assert x.shape == (8, 3)
    assert torch.equal(x, X[y])
    torch.manual_seed(2)
    again, _ = x_and_y(as_minibatches(FORMS[form](), 8)(generator(5), 8))
    assert torch.equal(x, again)
    other, _ = x_and_y(source(generator(6), 8))
    assert not torch.equal(x, other)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "function"])
def test_no_sample_comes_twice_and_all_forms_draw_the_same_ones(form):
    source, draws = as_minibatches(FORMS[form](), 40), generator(5)
    for _ in range(20):
        _, y = x_and_y(source(draws, 40))
        assert len(set(y.tolist())) == 40
    _, y = x_and_y(source(generator(5), 40))
    _, expected = as_minibatches((X, Y), 40)(generator(5), 40)
    assert torch.equal(y, expected)


def test_structures_keep_their_type():
    assert isinstance(as_minibatches((X, Y), 8)(generator(), 8), tuple)
    assert isinstance(as_minibatches([X, Y], 8)(generator(), 8), list)
    assert isinstance(as_minibatches(Pair(X, Y), 8)(generator(), 8), Pair)
    assert set(as_minibatches({"x": X, "y": Y}, 8)(generator(), 8)) == {"x", "y"}


def test_a_loader_keeps_its_place_in_the_epoch():
    loader = DataLoader(Squares(), batch_size=7, shuffle=True, generator=generator(3))
    place = iter(loader)
    next(place)
    state = loader.generator.get_state()
    source = as_minibatches(loader, 8)
    source(generator(), 8)
    assert torch.equal(loader.generator.get_state(), state)
    assert sum(len(y) for _, y in place) == N - 7


def test_of_a_loader_with_a_subset_the_subset_is_drawn_from():
    dataset = TensorDataset(torch.arange(20))
    source = as_minibatches(DataLoader(dataset, sampler=SubsetRandomSampler([3, 8, 11])), 3)
    (rows,) = source(Generator().manual_seed(0), 3)
    assert sorted(rows.tolist()) == [3, 8, 11]


def test_a_loader_that_draws_by_weight_is_told_of():
    loader = DataLoader(TensorDataset(torch.arange(20)), sampler=WeightedRandomSampler([1.0] * 20, 20))
    with pytest.warns(UserWarning, match="all samples alike.*Give a function"):
        as_minibatches(loader, 3)


def test_a_function_is_given_the_generator_and_the_batch_size():
    calls = []
    source = as_minibatches(lambda generator, batch_size: calls.append((generator, batch_size)), 8)
    own = generator()
    source(own, 8)
    assert calls == [(own, 8)]


# The indices


def test_indices_are_uniform_and_of_every_order():
    counts = torch.zeros(10, 4)
    draws = generator(1)
    for _ in range(4000):
        rows = draw_indices(10, 4, draws)
        counts[rows, torch.arange(4)] += 1
    expected = 4000 / 10
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 36 + 4 * (2 * 36) ** 0.5  # 36 degrees of freedom


def test_as_many_as_there_are_means_each_once_in_order():
    assert draw_indices(9, 9, generator()).tolist() == list(range(9))


@pytest.mark.parametrize("size", [2**16, 2**16 + 1])
def test_indices_of_large_data(size):
    rows = draw_indices(size, 1024, generator())
    assert rows.shape == (1024,)
    assert 0 <= rows.min() < size // 100
    assert size - size // 100 < rows.max() < size
    if size <= 2**16:
        assert max(Counter(rows.tolist()).values()) == 1


# What can't be used


class Stream(IterableDataset):
    def __iter__(self):
        return iter(X)


class CountedStream(Stream):
    def __len__(self):
        return N


class WithoutLength(Dataset):
    def __getitem__(self, row):
        return X[row]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (
            lambda: X[:7],
            r"Probe\(data=\.\.\.\) has 7 samples, fewer than Langevin\(batch_size=8\)\. Give more data or a s",
        ),
        (lambda: (X[:7], Y[:7]), r"has 7 samples, fewer"),
        (lambda: TensorDataset(X[:7], Y[:7]), r"has 7 samples, fewer"),
        (lambda: DataLoader(TensorDataset(X[:7]), batch_size=3), r"has 7 samples, fewer"),
        (lambda: X[:0], r"has 0 samples, fewer"),
        (lambda: torch.tensor(3.0), r"has 0 samples, fewer"),
        (lambda: (X, Y[:30]), r"tensors of Probe\(data=\.\.\.\) have \[30, 50\] samples; the first axis must be"),
        (lambda: {"x": X, "y": Y[:30]}, r"have \[30, 50\] samples"),
        (lambda: (X, torch.tensor(3.0)), r"have \[0, 50\] samples"),
        (lambda: (), r"takes a tensor, .*; a tuple with nothing in it came\."),
        (lambda: {}, r"a dict with nothing in it came\."),
        (lambda: (X, None), r"a tuple with NoneType in it came\."),
        (lambda: (X, Y.numpy()), r"a tuple with ndarray in it came\."),
        (lambda: [1.0] * 20, r"a list with float in it came\."),
        (lambda: ["a", "b"] * 20, r"a list with str in it came\."),
        (lambda: ("data.csv", X), r"a tuple with str in it came\."),
        (lambda: "data/train.csv", r"a function \(generator, batch_size\) -> batch; a str came\."),
        (lambda: b"0123456789", r"; a bytes came\."),
        (lambda: None, r"; a NoneType came\."),
        (lambda: 3, r"; a int came\."),
        (lambda: iter(X), r"; a generator came\.|; a \w*iterator came\."),
        (WithoutLength, r"a Dataset with a length, .*; a WithoutLength came\."),
        (lambda: DataLoader(WithoutLength(), sampler=range(N)), r"; a WithoutLength came\."),
        (
            Stream,
            r"Probe\(data=IterableDataset\(\.\.\.\)\) needs a dataset with a length, .*can only be iterated\. Give",
        ),
        (CountedStream, r"data=IterableDataset\(\.\.\.\)\) needs a dataset with a length"),
        (lambda: DataLoader(Stream()), r"data=DataLoader\(\.\.\.\)\) needs a dataset with a length"),
        (lambda: DataLoader(CountedStream()), r"data=DataLoader\(\.\.\.\)\) needs a dataset with a length"),
        (lambda: DataLoader(Squares(), batch_size=None), r"DataLoader\(batch_size=None\)\) has a dataset of whole b"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_sentence(data, sentence):
    with pytest.raises(PhasewatchError, match=sentence):
        as_minibatches(data(), 8)


def test_exactly_a_batch_is_enough():
    x, _ = as_minibatches((X[:8], Y[:8]), 8)(generator(), 8)
    assert torch.equal(x, X[:8])


# To a device


def test_move_takes_tensors_wherever_they_are_and_leaves_the_rest():
    meta = torch.device("meta")
    batch = {"x": X, "more": (Y, [X, "label", 3]), "pair": Pair(X, None)}
    moved = move(batch, meta)
    assert moved["x"].device == moved["more"][0].device == moved["more"][1][0].device == moved["pair"].x.device == meta
    assert moved["more"][1][1:] == ["label", 3]
    assert isinstance(moved["pair"], Pair)
    assert move("label", meta) == "label"


def test_move_turns_mappings_into_plain_dicts():
    moved = move(UserDict(x=X, inner=UserDict(y=Y)), torch.device("cpu"))
    assert type(moved) is dict
    assert type(moved["inner"]) is dict
    np.testing.assert_array_equal(moved["inner"]["y"], Y)
