"""In-context Markov chains: the law of the data, the strategies against the exact posterior, and that it learns."""

import math
from itertools import islice, product

import pytest
import torch
from torch import Generator, nn

from phasewatch.toy_tasks.markov_chains import (
    MarkovData,
    bigrams,
    divergence,
    loss,
    make_model,
    published_metrics,
    training,
    unigrams,
)


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


class Follows(nn.Module):
    """Predicts as a strategy does."""

    def __init__(self, strategy, vocabulary):
        super().__init__()
        self.strategy = strategy
        self.vocabulary = vocabulary

    def forward(self, tokens):
        return self.strategy(tokens, self.vocabulary).log()


def all_sequences(vocabulary, length):
    return torch.tensor(list(product(range(vocabulary), repeat=length)))


def log_probabilities(sequences, vocabulary):
    """Of whole sequences, the chain integrated out: ∏ over symbols of (V − 1)! ∏ⱼ nⱼ! / (V − 1 + Σⱼ nⱼ)!"""
    total = torch.full((len(sequences),), -math.log(vocabulary), dtype=torch.float64)
    for symbol in range(vocabulary):
        after = [
            ((sequences[:, :-1] == symbol) & (sequences[:, 1:] == other)).sum(1).double() for other in range(vocabulary)
        ]
        total += math.lgamma(vocabulary) + sum(torch.lgamma(n + 1) for n in after)
        total -= torch.lgamma(sum(after) + vocabulary)
    return total


# The data


@pytest.mark.parametrize(("vocabulary", "length"), [(2, 5), (3, 4)])
def test_sequences_come_as_often_as_the_chains_say(vocabulary, length):
    sequences = all_sequences(vocabulary, length)
    chance = log_probabilities(sequences, vocabulary).exp()
    assert chance.sum().item() == pytest.approx(1)
    size = 200_000
    tokens = MarkovData(vocabulary, length)(generator(), size)
    assert tokens.shape == (size, length)
    code = (tokens * vocabulary ** torch.arange(length - 1, -1, -1)).sum(1)
    share = code.bincount(minlength=len(sequences)) / size
    error = (chance * (1 - chance) / size).sqrt()
    assert ((share - chance).abs() < 4 * error).all()
    assert (error < 0.001).all()


def test_the_generator_decides():
    data, before = MarkovData(), torch.get_rng_state()
    assert torch.equal(data(generator(3), 16), data(generator(3), 16))
    assert not torch.equal(data(generator(3), 16), data(generator(4), 16))
    assert torch.equal(torch.get_rng_state(), before)


# The strategies


def test_strategies_by_hand():
    tokens = torch.tensor([[0, 2, 0, 2, 1]])
    torch.testing.assert_close(
        unigrams(tokens, 3)[0], torch.tensor([[2, 1, 1], [2, 1, 2], [3, 1, 2], [3, 1, 3], [3, 2, 3]])
        / torch.tensor([[4.0], [5], [6], [7], [8]]),
    )  # fmt: skip
    torch.testing.assert_close(
        bigrams(tokens, 3)[0], torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 2], [2, 1, 1], [1, 1, 1]])
        / torch.tensor([[3.0], [3], [4], [4], [3]]),
    )  # fmt: skip


@pytest.mark.parametrize(("vocabulary", "length"), [(2, 9), (3, 6)])
def test_the_loss_of_bigrams_is_the_entropy_of_the_data(vocabulary, length):
    """The chain rule: −log p of a whole sequence is what its tokens cost one by one, the least there is."""
    sequences = all_sequences(vocabulary, length)
    exact = log_probabilities(sequences, vocabulary)
    for strategy, best in ((bigrams, True), (unigrams, False)):
        chosen = strategy(sequences, vocabulary)[:, :-1].gather(-1, sequences[:, 1:, None]).squeeze(-1)
        costs = math.log(vocabulary) - chosen.double().log().sum(1)
        if best:
            torch.testing.assert_close(costs, -exact, rtol=1e-5, atol=1e-5)
        else:
            assert (exact.exp() * (costs + exact)).sum() > 0.01


def test_divergence_by_hand():
    tokens = torch.tensor([[0, 1], [1, 1]])
    uniform = Follows(lambda tokens, v: torch.full((*tokens.shape, v), 1 / v), 2)
    # unigrams: (2/3, 1/3) after the first token, then (1/2, 1/2) and (1/4, 3/4)
    first = math.log(2) + (2 * math.log(2 / 3) + math.log(1 / 3)) / 3
    last = math.log(2) + (math.log(1 / 4) + 3 * math.log(3 / 4)) / 4
    assert divergence(unigrams)(uniform, tokens) == pytest.approx((2 * first + last) / 4, rel=1e-5)
    assert divergence(unigrams)(Follows(unigrams, 2), tokens) == pytest.approx(0, abs=1e-6)


def test_metrics_tell_the_strategies_apart():
    data = MarkovData(vocabulary=3)
    batch, metrics = data(generator(), 256), published_metrics(data)
    assert metrics.keys() == {"icl_score", "unigrams", "bigrams", "previous_token"}
    by_unigrams, by_bigrams = (
        {name: metrics[name](Follows(strategy, 3), batch) for name in ("icl_score", "unigrams", "bigrams")}
        for strategy in (unigrams, bigrams)
    )
    assert by_unigrams["unigrams"] == pytest.approx(0, abs=1e-6)
    assert by_bigrams["bigrams"] == pytest.approx(0, abs=1e-6)
    assert by_unigrams["bigrams"] > 0.1
    assert by_bigrams["unigrams"] > 0.1
    assert by_bigrams["icl_score"] < by_unigrams["icl_score"] < 0
    assert 0 < metrics["previous_token"](make_model(heads=1, width=8, vocabulary=3, context=100), batch) < 0.2


# Training


def test_training_learns_the_unigrams_first():
    data = MarkovData(vocabulary=2, context=40)
    model = make_model(heads=1, width=16, vocabulary=2, context=40)
    batch, metrics = data(generator(99), 256), published_metrics(data)
    with torch.no_grad():
        before = loss(model, batch).item(), metrics["unigrams"](model, batch)
    for _ in islice(training(model, data, seed=1), 100):
        pass
    with torch.no_grad():
        after = loss(model, batch).item(), metrics["unigrams"](model, batch)
        assert after[1] < metrics["bigrams"](model, batch)
    assert after[0] < before[0] - 0.1
    assert after[1] < before[1] / 2
