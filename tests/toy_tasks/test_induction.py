"""The induction task: the law of its data, its scores on patterns made by hand, and that it learns."""

import math
import pickle

import pytest
import torch
from torch import Generator
from torch.nn import functional as F

from phasewatch.toy_tasks.head_scores import k_composition_scores, prefix_matching_scores, previous_token_scores
from phasewatch.toy_tasks.induction import InductionData, icl_score, loss, make_model, published_metrics


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model():
    return make_model(width=16)


# The data


def followers(sequence):
    """What follows each token of a sequence."""
    found = {}
    for token, after in zip(sequence[:-1].tolist(), sequence[1:].tolist(), strict=True):
        found.setdefault(token, []).append(after)
    return found


def test_every_sequence_has_its_triggers_and_they_never_change_their_mind():
    # No row of this table has a probability above 0.6, so that 41 equal followers in a row are a trigger's.
    tokens = InductionData(vocabulary=6, context=3000, triggers=2, table_seed=25)(generator(), 200)
    assert tokens.shape == (200, 3000)
    assert (tokens.min(), tokens.max()) == (0, 5)
    seen = [followers(sequence) for sequence in tokens]
    everywhere = [found for found in seen if len(found) == 6 and min(map(len, found.values())) > 40]
    assert len(everywhere) > 20
    for found in everywhere:
        assert sum(len(set(after)) == 1 for after in found.values()) == 2


def test_other_tokens_follow_the_table():
    data = InductionData(vocabulary=5, context=50, triggers=0, table_seed=3)
    tokens = data(generator(), 4000)
    for token in range(5):
        after = tokens[:, 1:][tokens[:, :-1] == token]
        share = F.one_hot(after, 5).double().mean(0)
        error = (data.table[token] * (1 - data.table[token]) / len(after)).sqrt()
        assert ((share - data.table[token]).abs() < 4 * error).all()
        assert (error < 0.01).all()


def test_triggers_and_their_followers_are_uniform():
    data = InductionData(vocabulary=5, context=60, triggers=5)
    tokens = data(generator(), 5000)
    first = tokens[:, :2]
    error = math.sqrt(0.04 * 0.96 / 5000)
    pairs = torch.zeros(5, 5).index_put_((first[:, 0], first[:, 1]), torch.tensor(1.0), accumulate=True) / 5000
    assert ((pairs - 0.04).abs() < 4 * error).all()
    few = InductionData(vocabulary=5, context=60, triggers=1)
    assert abs(table_of_first_steps(few).diagonal().mean() - 0.2 * 0.2 - 0.8 * few.table.diagonal().mean()) < 0.02


def table_of_first_steps(data):
    """How often each token follows each other one at the start of a sequence, a row for each token."""
    first = data(generator(1), 20_000)[:, :2]
    counts = torch.zeros(data.vocabulary, data.vocabulary)
    counts.index_put_((first[:, 0], first[:, 1]), torch.tensor(1.0), accumulate=True)
    return counts / counts.sum(-1, keepdim=True)


def test_the_table_is_a_softmax_of_wide_normals_and_its_seed_decides():
    table = InductionData(vocabulary=200).table
    torch.testing.assert_close(table.sum(-1), torch.ones(200))
    centred = table.log() - table.log().mean(-1, keepdim=True)
    assert abs(centred.std() - 2) < 4 * 2 / math.sqrt(2 * 200 * 200)
    assert torch.equal(InductionData(table_seed=5).table, InductionData(table_seed=5).table)
    assert not torch.equal(InductionData(table_seed=5).table, InductionData(table_seed=6).table)


def test_the_generator_decides():
    data = InductionData()
    before = torch.get_rng_state()
    assert torch.equal(data(generator(3), 16), pickle.loads(pickle.dumps(data))(generator(3), 16))
    assert not torch.equal(data(generator(3), 16), data(generator(4), 16))
    assert torch.equal(torch.get_rng_state(), before)


def test_frequencies_are_those_of_the_data():
    data = InductionData(vocabulary=6, context=30, triggers=2)
    tokens = data(generator(7), 20_000)
    share = F.one_hot(tokens, 6).double().mean(1)
    error = share.std(0) / math.sqrt(20_000)
    assert data.frequencies.sum().item() == pytest.approx(1)
    # The frequencies themselves are of 4,096 sequences
    assert ((share.mean(0) - data.frequencies).abs() < 4 * error * math.sqrt(1 + 20_000 / 4096)).all()
    assert (error < 0.002).all()


# The scores


def test_metrics_by_name(model):
    data = InductionData()
    batch = data(generator(), 8)
    found = {name: metric(model, batch) for name, metric in published_metrics(data).items()}
    assert found.keys() == {"icl_score", "bigram", "unigram", "previous_token", "prefix_matching", "k_composition"}
    for name, scores in (("previous_token", previous_token_scores), ("prefix_matching", prefix_matching_scores)):
        assert found[name] == max(scores(model, data).flatten().tolist())
    assert found["k_composition"] == k_composition_scores(model).max().item()
    assert abs(found["bigram"] - math.log(32)) < 1  # an untrained model knows nothing
    assert abs(found["unigram"] - math.log(32)) < 1
    assert found["icl_score"] == icl_score(model, batch)


# Training


def test_training_learns_the_bigrams_first():
    data, model = InductionData(), make_model(width=32)
    batch = data(generator(99), 256)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    draws = generator(1)
    metrics = published_metrics(data)
    with torch.no_grad():
        before = loss(model, batch).item(), metrics["bigram"](model, batch)
    for _ in range(150):
        optimizer.zero_grad()
        loss(model, data(draws, 32)).backward()
        optimizer.step()
    with torch.no_grad():
        after = loss(model, batch).item(), metrics["bigram"](model, batch)
        assert metrics["prefix_matching"](model, batch) < 0.1
    assert after[0] < before[0] - 0.8
    assert after[1] < before[1] - 0.8
