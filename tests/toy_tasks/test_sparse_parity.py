"""Sparse parity: its data, the loss at chance, the measures of hidden progress, and that it learns."""

import math
from itertools import islice

import pytest
import torch
from torch import Generator, nn
from toy_models import assert_chains_are_vectorised

from phasewatch.toy_tasks.sparse_parity import (
    ParityMLP,
    SparseParityData,
    accuracy,
    loss,
    metrics,
    relevant_movement,
    training,
    weight_movement,
)


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def seeded_model(bits: int = 50, hidden: int = 100) -> ParityMLP:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ParityMLP(bits, hidden)


class Says(nn.Module):
    """An output that is a function of the bits."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output(x)


# The data and the model


def test_labels_are_the_product_of_the_relevant_bits_and_of_nothing_less():
    size = 40_000
    x, y = SparseParityData(6, 3)(generator(), size)
    assert x.shape == (size, 6)
    assert set(x.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(y, x[:, 0] * x[:, 1] * x[:, 2])
    bound = 4 / math.sqrt(size)
    assert (x.mean(0).abs() < bound).all()
    assert ((x.mT @ x / size).fill_diagonal_(0).abs() < bound).all()
    assert ((y[:, None] * x).mean(0).abs() < bound).all()
    assert (torch.einsum("s,si,sj->ij", y, x, x) / size).fill_diagonal_(0).abs().max() < bound


def test_the_generator_decides():
    data = SparseParityData()
    assert torch.equal(data(generator(1), 8)[0], data(generator(1), 8)[0])
    assert not torch.equal(data(generator(1), 8)[0], data(generator(2), 8)[0])


def test_the_size_and_the_shape():
    assert sum(p.numel() for p in ParityMLP().parameters()) == 5201
    x, _ = SparseParityData()(generator(), 7)
    assert seeded_model()(x).shape == (7,)


def test_chains_are_vectorised():
    data = SparseParityData()
    assert_chains_are_vectorised(lambda: seeded_model(hidden=8), loss, [data(generator(seed), 16) for seed in range(3)])


# The scores


def test_the_loss_at_chance_and_of_a_model_that_knows():
    batch = SparseParityData()(generator(), 10_000)
    assert loss(Says(lambda x: torch.zeros(len(x))), batch).item() == 1
    assert loss(Says(lambda x: x[:, :3].prod(-1)), batch).item() == 0
    assert loss(Says(lambda x: 0.3 * x[:, :3].prod(-1)), batch).item() == pytest.approx(0.7)
    # Without the third bit the best that can be said is nothing: ±c costs max(0, 1 − c)/2 + (1 + c)/2
    assert loss(Says(lambda x: 2 * x[:, :2].prod(-1)), batch).item() == pytest.approx(1.5, abs=0.06)
    assert accuracy(Says(lambda x: 0.3 * x[:, :3].prod(-1)), batch) == 1
    assert accuracy(Says(lambda x: x[:, :2].prod(-1)), batch) == pytest.approx(0.5, abs=0.02)


def test_movement_by_hand():
    data, model = SparseParityData(4, 2), seeded_model(4, 3)
    farthest, share = weight_movement(model), relevant_movement(data, model)
    assert (farthest(model, None), share(model, None)) == (0, 0)
    with torch.no_grad():
        model.hidden.weight[0, 1] += 0.3
        model.hidden.weight[2, 0] -= 0.4
        model.hidden.weight[1, 3] += 0.5
        model.output.weight += 9.0
    assert farthest(model, None) == pytest.approx(0.5)
    assert share(model, None) == pytest.approx(0.25 / 0.5)


# Training


def test_a_training_step_is_sgd_on_a_batch_of_its_seed():
    data, model, by_hand = SparseParityData(), seeded_model(), seeded_model()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    draws = generator(3)
    for step in islice(training(model, data, seed=3), 3):
        optimizer.zero_grad()
        loss(by_hand, data(draws, 256)).backward()
        optimizer.step()
        for one, other in zip(model.parameters(), by_hand.parameters(), strict=True):
            assert torch.equal(one, other), step


def test_progress_is_hidden_until_the_loss_falls():
    data, model = SparseParityData(bits=20), seeded_model(20)
    batch, scores = data(generator(99), 4096), metrics(data, model)
    seen = {}
    for step in islice(training(model, data, seed=1), 1500):
        if step % 50 == 0:
            with torch.no_grad():
                seen[step] = loss(model, batch).item(), scores["relevant_movement"](model, batch)
    flat = [movement for value, movement in seen.values() if value > 0.97]
    assert len(flat) > 2
    assert flat[-1] > 1.5 * flat[0]
    assert min(value for value, _ in seen.values()) < 0.3
    with torch.no_grad():
        assert scores["accuracy"](model, batch) > 0.95
    assert scores.keys() == {"accuracy", "weight_movement", "relevant_movement"}
