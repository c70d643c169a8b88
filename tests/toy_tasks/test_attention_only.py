"""The attention-only transformer: its size, what it sees, its loss, the scores of its predictions, its training."""

import math

import pytest
import torch
from torch import Generator, nn
from toy_models import assert_chains_are_vectorised

from phasewatch.toy_tasks.attention_only import (
    bigram_cross_entropy,
    icl_score,
    loss,
    make_model,
    training,
    unigram_cross_entropy,
)
from phasewatch.toy_tasks.induction import InductionData


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


def test_chains_are_vectorised():
    data = InductionData()
    assert_chains_are_vectorised(lambda: make_model(width=16), loss, [data(generator(seed), 4) for seed in range(3)])


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


def test_unigram_cross_entropy_is_least_for_the_frequencies_themselves():
    frequencies = torch.tensor([0.5, 0.2, 0.3])
    tokens = torch.randint(3, (8, 20), generator=generator())
    metric = unigram_cross_entropy(frequencies)
    entropy = -(0.5 * math.log(0.5) + 0.2 * math.log(0.2) + 0.3 * math.log(0.3))
    assert metric(Fixed(frequencies.log().expand(3, 3)), tokens) == pytest.approx(entropy, rel=1e-5)
    assert metric(Fixed(torch.zeros(3, 3)), tokens) == pytest.approx(math.log(3), rel=1e-5)
    by_token = torch.tensor([[0.1, 0.2, 0.7], [0.3, 0.3, 0.4], [0.6, 0.2, 0.2]])
    expected = torch.tensor([-(frequencies * row.log()).sum().item() for row in by_token])[tokens].mean().item()
    assert metric(Fixed(by_token.log()), tokens) == pytest.approx(expected, rel=1e-5)


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
