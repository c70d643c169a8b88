"""The published language model: its size, its attention, its positions, and that it learns."""

import pytest
import torch
from torch import Generator

from phasewatch import heads
from phasewatch.toy_tasks.language import LanguageModel, Shape, loss, published_optimizer, targets, token_losses

SMALL = Shape(layers=2, heads=2, width=16, vocabulary=20, context=12)


def tokens(shape=SMALL, count=5):
    return torch.randint(shape.vocabulary, (count, shape.context), generator=Generator().manual_seed(1))


@pytest.fixture
def model():
    return LanguageModel(SMALL, seed=3)


def test_the_published_size_has_3_million_parameters_of_which_a_head_has_32_864():
    model = LanguageModel()
    assert sum(p.numel() for p in model.parameters()) == 3_355_016
    parts = heads(model)
    assert len(parts) == 16
    assert {sum(int(mask.sum()) for mask in masks.values()) for masks in parts.values()} == {32_864}


def test_a_seed_decides_the_weights_and_leaves_torch_alone(model):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    same, other = LanguageModel(SMALL, seed=3), LanguageModel(SMALL, seed=4)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(model.embed.weight, same.embed.weight)
    assert not torch.equal(model.embed.weight, other.embed.weight)
    assert model.embed.weight.std().item() == pytest.approx(0.2, rel=0.1)  # 0.8 / sqrt(16)


def test_the_patterns_are_what_attention_mixes_values_by(model):
    given = tokens()
    x = model.embed(given)
    positions = model.positions.weight
    block = model.blocks[0]
    normed = block.norm(x)
    v = block.attention.v_proj(normed).unflatten(-1, (2, -1)).transpose(1, 2)
    pattern = block.attention.pattern(normed, positions)
    by_hand = block.attention.o_proj((pattern @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(block.attention(normed, positions), by_hand)
    patterns = model.patterns(given)
    assert patterns.shape == (2, 2, 5, 12, 12)
    torch.testing.assert_close(patterns[0], pattern.transpose(0, 1))
    torch.testing.assert_close(patterns.sum(-1), torch.ones(2, 2, 5, 12))
    assert patterns.triu(1).max() == 0


def test_a_token_is_predicted_from_those_before_it_alone(model):
    given = tokens()
    changed = given.clone()
    changed[:, 7] = (changed[:, 7] + 1) % SMALL.vocabulary
    before, after = model(given), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().amax() > 1e-3


def test_positions_reach_the_patterns_and_not_the_residual_stream(model):
    given = torch.full((1, 12), 4)
    with torch.no_grad():
        model.positions.weight *= 10
    assert model.patterns(given)[0, 0, 0, -1].std() > 1e-3
    torch.testing.assert_close(model(given)[0, 0], model(given)[0, -1])  # all values are alike


def test_the_loss_is_the_mean_over_the_next_tokens(model):
    given = tokens()
    assert targets(given)[0].tolist() == [*given[0, 1:].tolist(), -100]
    assert token_losses(model, given).shape == (5, 11)
    torch.testing.assert_close(loss(model, given), token_losses(model, given).mean())


def test_it_learns(model):
    given = torch.arange(12).repeat(4, 1)
    optimizer = published_optimizer(model)
    before = loss(model, given).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss(model, given).backward()
        optimizer.step()
    assert loss(model, given).item() < 0.5 * before
    assert optimizer.defaults["lr"] == 1e-3
    assert optimizer.defaults["weight_decay"] == 0.05


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match=r"Shape\(width=16, heads=3\): the heads must divide the width"):
        LanguageModel(Shape(width=16, heads=3))
