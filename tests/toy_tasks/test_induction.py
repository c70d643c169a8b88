"""The induction task: the law of its data, its scores on patterns made by hand, and that it learns."""

import math
import pickle

import pytest
import torch
from torch import Generator, nn
from torch.nn import functional as F

from phasewatch.monitor.batches import Batches
from phasewatch.monitor.flat_model import FlatModel
from phasewatch.toy_tasks.induction import (
    InductionData,
    attention_patterns,
    attention_to_match,
    attention_to_previous,
    bigram_cross_entropy,
    icl_score,
    loss,
    make_model,
    prefix_matching_scores,
    previous_token_scores,
    published_metrics,
    random_tokens,
    tokens_with_one_repeat,
    training,
)


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


class Fixed(nn.Module):
    """Predicts what it is given."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, tokens):
        return self.logits[: len(tokens)] if self.logits.ndim == 3 else self.logits[tokens]


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


# The model


def test_the_size_and_the_seed():
    before = torch.get_rng_state()
    one = make_model(1)
    assert sum(p.numel() for p in one.parameters()) == 40_832
    assert torch.equal(torch.get_rng_state(), before)
    for same, other in ((make_model(1), True), (make_model(2), False)):
        assert torch.equal(next(one.parameters()), next(same.parameters())) is other
    assert make_model(layers=1)(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, 32)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match=r"make_model\(width=30, heads=4\): the heads must divide"):
        make_model(width=30)


def test_a_prediction_depends_on_the_tokens_so_far_alone(model):
    tokens = InductionData()(generator(), 4)
    other = tokens.clone()
    other[:, 20] = (other[:, 20] + 1) % 32
    changed = (model(tokens) - model(other)).abs().amax((0, 2))
    assert (changed[:20] == 0).all()
    assert (changed[20:] > 0).all()


def test_chains_are_vectorised(model):
    data = InductionData()
    flat = FlatModel(make_model(width=16), loss)
    batches = [data(generator(seed), 4) for seed in range(3)]
    flat.choose_path(Batches(batches))
    assert flat.vectorised
    torch.testing.assert_close(
        flat.losses(flat.weights().expand(3, -1), Batches(batches)),
        torch.stack([loss(model, batch) for batch in batches]),
    )


def test_patterns_are_causal_and_of_every_head(model):
    tokens = InductionData()(generator(), 5)
    patterns = attention_patterns(model, tokens)
    assert patterns.shape == (2, 4, 5, 48, 48)
    torch.testing.assert_close(patterns.sum(-1), torch.ones(2, 4, 5, 48))
    assert (patterns.triu(1) == 0).all()
    one_head = attention_patterns(model, tokens[:1])[1, 2, 0]
    torch.testing.assert_close(one_head, patterns[1, 2, 0])


# The scores


def test_loss_and_icl_score_by_hand():
    tokens = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 0, 0]])
    right = torch.tensor([[0.9, 0.5, 0.5, 0.8], [0.3, 0.5, 0.5, 0.6]])  # of the next token
    chances = torch.zeros(2, 5, 2)
    chances[:, :4].scatter_(-1, tokens[:, 1:, None], right[..., None])
    chances[:, :4].scatter_(-1, 1 - tokens[:, 1:, None], 1 - right[..., None])
    model = Fixed(chances.log())
    assert loss(model, tokens).item() == pytest.approx(-right.log().mean().item())
    expected = -(math.log(0.8) + math.log(0.6)) / 2 + (math.log(0.9) + math.log(0.3)) / 2
    assert icl_score(model, tokens) == pytest.approx(expected)


def test_bigram_cross_entropy_is_least_for_the_table_itself():
    data = InductionData()
    tokens = data(generator(), 64)
    metric = bigram_cross_entropy(data.table)
    entropy = -(data.table * data.table.log()).sum(-1)[tokens].mean().item()
    assert metric(Fixed(data.table.log()), tokens) == pytest.approx(entropy, rel=1e-5)
    assert metric(Fixed(torch.zeros(32, 32)), tokens) == pytest.approx(math.log(32), rel=1e-5)
    assert metric(Fixed(2 * data.table.log()), tokens) > entropy + 0.1


def test_attention_scores_of_patterns_made_by_hand():
    uniform = torch.ones(8, 8).tril() / torch.arange(1, 9)[:, None]
    to_previous = torch.zeros(8, 8)
    to_previous[1:, :-1] = torch.eye(7)
    stay = torch.eye(8)
    patterns = torch.stack([uniform, to_previous, stay, 0.25 * to_previous + 0.75 * stay])[:, None].repeat(1, 3, 1, 1)
    expected = [sum(1 / n for n in range(2, 9)) / 7, 1.0, 0.0, 0.25]
    assert attention_to_previous(patterns).tolist() == pytest.approx(expected)

    first, second = torch.tensor([1, 2, 4]), torch.tensor([5, 4, 7])
    matching = torch.zeros(3, 8, 8)
    matching[0, 5, 2], matching[1, 4, 3], matching[2, 7, 5] = 0.9, 0.6, 0.3
    off = torch.zeros(3, 8, 8)
    off[0, 5, 1], off[1, 4, 2], off[2, 7, 4] = 1.0, 1.0, 1.0  # to the first occurrence itself
    assert attention_to_match(torch.stack([matching, off]), first, second).tolist() == pytest.approx([0.6, 0.0])


@pytest.mark.parametrize(("vocabulary", "context", "length"), [(32, 48, 32), (32, 20, 20), (4, 9, 4)])
def test_one_token_comes_twice_and_every_other_once(vocabulary, context, length):
    tokens, first, second = tokens_with_one_repeat(vocabulary, context)
    assert tokens.shape == (64, length)
    for sequence, a, b in zip(tokens, first.tolist(), second.tolist(), strict=True):
        assert 1 <= a < b - 1 < length - 1
        assert sequence[a] == sequence[b]
        assert len(set(sequence.tolist())) == length - 1
    if length > 4:
        assert (first.min(), first.max(), second.max()) == (1, first.max(), length - 1)
        assert first.max() > length / 2


def test_scores_of_a_model_are_those_of_its_patterns(model):
    data = InductionData()
    previous, matching = previous_token_scores(model, data), prefix_matching_scores(model, data)
    assert previous.shape == matching.shape == (2, 4)
    tokens, first, second = tokens_with_one_repeat(32, 48)
    patterns = attention_patterns(model, tokens)
    assert matching[1, 3].item() == pytest.approx(
        sum(patterns[1, 3, i, b, a + 1].item() for i, (a, b) in enumerate(zip(first, second, strict=True))) / 64
    )
    patterns = attention_patterns(model, random_tokens(32, 48))
    assert previous[0, 2].item() == pytest.approx(
        sum(patterns[0, 2, :, t, t - 1].mean().item() for t in range(1, 48)) / 47, rel=1e-5
    )


def test_metrics_by_name(model):
    data = InductionData()
    batch = data(generator(), 8)
    found = {name: metric(model, batch) for name, metric in published_metrics(data).items()}
    assert found.keys() == {"icl_score", "bigram", "previous_token", "prefix_matching"}
    for name, scores in (("previous_token", previous_token_scores), ("prefix_matching", prefix_matching_scores)):
        assert found[name] == max(scores(model, data).flatten().tolist())
    assert abs(found["bigram"] - math.log(32)) < 1  # an untrained model knows nothing
    assert found["icl_score"] == icl_score(model, batch)


# Training


def test_a_training_step_is_adamw_on_a_batch_of_its_seed():
    data, model, by_hand = InductionData(), make_model(width=16), make_model(width=16)
    steps = training(model, data, seed=3)
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=1e-3, weight_decay=0.01)
    draws = generator(3)
    for step in (1, 2, 3):
        assert next(steps) == step
        optimizer.zero_grad()
        loss(by_hand, data(draws, 64)).backward()
        optimizer.step()
        for one, other in zip(model.parameters(), by_hand.parameters(), strict=True):
            assert torch.equal(one, other)


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
