"""Addition mod p: the split, the rule's part of the logits, and that training memorises before it generalises."""

import math
from itertools import islice

import pytest
import torch
from torch import Generator, nn
from torch.func import functional_call
from toy_models import assert_chains_are_vectorised

from phasewatch.toy_tasks.grokking import (
    AdditionData,
    AdditionMLP,
    accuracy,
    loss,
    metrics,
    rule_logits,
    rule_share,
    training,
)


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def seeded_model(modulus: int, **size) -> AdditionMLP:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AdditionMLP(modulus, **size)


class Table(nn.Module):
    """Looks its logits up."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, pairs):
        return self.logits[pairs[..., 0] * self.logits.shape[-1] + pairs[..., 1]]


def waves(modulus, *terms):
    """The sum of amplitude · cos(2πk(a + b − c)/p + phase) for terms (k, amplitude, phase), as a table of logits."""
    a, b = torch.cartesian_prod(torch.arange(modulus), torch.arange(modulus)).mT
    angle = 2 * math.pi * (a[:, None] + b[:, None] - torch.arange(modulus)).double() / modulus
    return sum(amplitude * torch.cos(k * angle + phase) for k, amplitude, phase in terms)


# The data and the model


@pytest.mark.parametrize(("modulus", "share"), [(7, 0.4), (10, 0.25), (53, 0.4)])
def test_the_split_is_of_all_pairs(modulus, share):
    data = AdditionData(modulus, share)
    parts = [part for part, _ in (data.train, data.test)]
    assert len(parts[0]) == round(share * modulus**2)
    assert sorted(torch.cat(parts).tolist()) == [[a, b] for a in range(modulus) for b in range(modulus)]
    for x, y in (data.train, data.test, data.table):
        assert [(a + b) % modulus for a, b in x.tolist()] == y.tolist()
    assert AdditionData(modulus, share).train[0].tolist() == parts[0].tolist()
    assert AdditionData(modulus, share, split_seed=1).train[0].tolist() != parts[0].tolist()


def test_batches_are_of_training_pairs_all_as_often():
    data, size = AdditionData(7), 20_000
    x, y = data(generator(), size)
    assert x.shape == (size, 2)
    assert torch.equal(x.sum(1) % 7, y)
    code, known = x[:, 0] * 7 + x[:, 1], data.train[0][:, 0] * 7 + data.train[0][:, 1]
    share = code.bincount(minlength=49)[known] / size
    assert share.sum().item() == pytest.approx(1)
    expected = 1 / len(known)
    assert (abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / size)).all()
    assert torch.equal(data(generator(1), 8)[0], data(generator(1), 8)[0])


def test_the_size_and_that_both_numbers_count():
    model = seeded_model(53)
    assert sum(p.numel() for p in model.parameters()) == 16_928
    before = model(torch.tensor([[3, 5]]))
    assert before.shape == (1, 53)
    for other in ([4, 5], [3, 6], [5, 3]):
        assert not torch.allclose(model(torch.tensor([other])), before, atol=1e-3)


def test_chains_are_vectorised():
    data = AdditionData(7)
    assert_chains_are_vectorised(
        lambda: seeded_model(7, hidden=8), loss, [data(generator(seed), 16) for seed in range(3)]
    )


def test_an_untrained_model_is_at_chance():
    model, data = seeded_model(53), AdditionData()
    nothing = functional_call(model, {"unembed.weight": torch.zeros(53, 128)}, (data.table[0],))
    assert nn.functional.cross_entropy(nothing, data.table[1]).item() == pytest.approx(math.log(53), rel=1e-5)
    assert loss(model, data.table).item() == pytest.approx(math.log(53), abs=0.2)
    assert accuracy(model, data.table) == pytest.approx(1 / 53, abs=0.02)


# The rule


def test_the_rule_is_what_depends_on_the_difference_alone():
    rule = waves(7, (1, 2.0, 0.3), (3, 0.5, -1.0))
    torch.testing.assert_close(rule_logits(rule), rule)
    a, b = torch.cartesian_prod(torch.arange(7), torch.arange(7)).mT
    other = torch.cos(2 * math.pi * (a[:, None] - 2 * b[:, None] + torch.arange(7)).double() / 7)
    torch.testing.assert_close(rule_logits(rule + other), rule)


def test_the_rules_part_is_a_projection():
    logits = torch.randn(49, 7, generator=generator(), dtype=torch.float64)
    rule = rule_logits(logits)
    torch.testing.assert_close(rule_logits(rule), rule)
    assert abs((rule * (logits - rule)).sum()) < 1e-10


def test_the_share_of_the_rule():
    data = AdditionData(7)
    rule = waves(7, (1, 2.0, 0.3), (3, 0.5, -1.0))
    assert rule_share(data)(Table(rule), None) == pytest.approx(1)
    assert rule_share(data)(Table(3 * rule + torch.randn(49, 1, generator=generator())), None) == pytest.approx(1)
    noise = torch.randn(49, 7, generator=generator(), dtype=torch.float64)
    noise -= noise.mean(-1, keepdim=True)
    noise -= rule_logits(noise)
    share = rule.square().sum() / (rule.square().sum() + 4 * noise.square().sum())
    assert rule_share(data)(Table(rule + 2 * noise), None) == pytest.approx(share.item())


def test_the_share_of_logits_at_random():
    data = AdditionData(23)
    shares = [rule_share(data)(Table(torch.randn(529, 23, generator=generator(i))), None) for i in range(200)]
    found = torch.tensor(shares)
    error = found.std() / math.sqrt(200)
    assert abs(found.mean() - 1 / 529) < 4 * error
    assert error < 0.1 / 529


def test_metrics_of_a_model_that_only_remembers():
    data = AdditionData(7)
    logits = torch.zeros(49, 7)
    for (a, b), y in zip(data.train[0].tolist(), data.train[1].tolist(), strict=True):
        logits[a * 7 + b, y] = 20.0
    for (a, b), y in zip(data.test[0].tolist(), data.test[1].tolist(), strict=True):
        logits[a * 7 + b, (y + 1) % 7] = 20.0
    found = {name: metric(Table(logits), None) for name, metric in metrics(data).items()}
    assert found.keys() == {"train_loss", "test_loss", "train_accuracy", "test_accuracy", "rule_share"}
    assert (found["train_accuracy"], found["test_accuracy"]) == (1, 0)
    assert found["train_loss"] == pytest.approx(0, abs=1e-6)
    assert found["test_loss"] == pytest.approx(20, rel=1e-3)
    assert 0 < found["rule_share"] < 0.6


# Training


def test_a_training_step_is_adamw_on_a_batch_of_its_seed():
    data, model, by_hand = AdditionData(7), seeded_model(7), seeded_model(7)
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=5e-3, weight_decay=0.5)
    draws = generator(3)
    for step in islice(training(model, data, seed=3), 3):
        optimizer.zero_grad()
        loss(by_hand, data(draws, 128)).backward()
        optimizer.step()
        for one, other in zip(model.parameters(), by_hand.parameters(), strict=True):
            assert torch.equal(one, other), step


def test_training_remembers_first():
    data, model = AdditionData(23), seeded_model(23)
    for _ in islice(training(model, data), 300):
        pass
    found = {name: metric(model, None) for name, metric in metrics(data).items()}
    assert found["train_accuracy"] > 0.9
    assert found["test_accuracy"] < 0.3
    assert found["train_loss"] < 1 < math.log(23) < found["test_loss"]
