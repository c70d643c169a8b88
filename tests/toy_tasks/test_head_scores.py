"""Scores of attention heads: of patterns made by hand, of a model, and as TransformerLens reckons them."""

from types import SimpleNamespace

import pytest
import torch
from transformer_lens.head_detector import detect_head

from phasewatch.toy_tasks.attention_only import make_model
from phasewatch.toy_tasks.head_scores import (
    attention_patterns,
    attention_to_match,
    attention_to_previous,
    head_metrics,
    k_composition_scores,
    prefix_matching_scores,
    previous_token_scores,
    random_tokens,
    tokens_with_one_repeat,
)
from phasewatch.toy_tasks.induction import InductionData


@pytest.fixture(scope="module")
def model():
    return make_model(width=16)


def test_patterns_are_causal_and_of_every_head(model):
    tokens = random_tokens(32, 48)[:5]
    patterns = attention_patterns(model, tokens)
    assert patterns.shape == (2, 4, 5, 48, 48)
    torch.testing.assert_close(patterns.sum(-1), torch.ones(2, 4, 5, 48))
    assert (patterns.triu(1) == 0).all()
    one_head = attention_patterns(model, tokens[:1])[1, 2, 0]
    torch.testing.assert_close(one_head, patterns[1, 2, 0])


# The scores


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


def detected(model, name, tokens):
    """TransformerLens's score of every head: the attention that goes where it looks for it, of all the attention."""
    by_number = SimpleNamespace(
        cfg=model.cfg, run_with_cache=model.run_with_cache, to_tokens=lambda number: tokens[int(number)].unsqueeze(0)
    )
    return torch.stack([detect_head(by_number, str(i), name) for i in range(len(tokens))]).mean(0)


def test_previous_token_scores_are_those_of_the_head_detector(model):
    data = InductionData(context=40)
    theirs = detected(model, "previous_token_head", random_tokens(32, 40))
    # The first position has no other before it, but its attention counts in all there is
    torch.testing.assert_close(previous_token_scores(model, data), theirs * 40 / 39)


def test_prefix_matching_scores_are_those_of_the_head_detector(model):
    data = InductionData(context=40)
    tokens, _, _ = tokens_with_one_repeat(32, 40)
    theirs = detected(model, "induction_head", tokens)
    # One position of 32 has something to match
    torch.testing.assert_close(prefix_matching_scores(model, data), theirs * 32)


def test_each_heads_metric_is_its_score(model):
    data = InductionData()
    found = {name: metric(model, None) for name, metric in head_metrics(data).items()}
    assert len(found) == 16
    for name, scores in (("previous_token", previous_token_scores), ("prefix_matching", prefix_matching_scores)):
        for layer in range(2):
            for head in range(4):
                assert found[f"{name}/L{layer}H{head}"] == scores(model, data)[layer, head].item()


# K-composition


def test_k_composition_is_that_of_transformer_lens(model):
    found = k_composition_scores(model)
    assert found.shape == (2, 4, 2, 4)
    torch.testing.assert_close(found, model.all_composition_scores("K").scores.detach())
    assert (found[0, :, 1] > 0).all()
    assert found[1].abs().max() == found[:, :, 0].abs().max() == 0


def test_a_gain_is_part_of_the_weights_that_read_through_it():
    gained, scaled = make_model(width=16), make_model(width=16)
    with torch.no_grad():
        for layer in range(2):
            gain = 0.5 + torch.rand(16, generator=torch.Generator().manual_seed(layer))
            gained.blocks[layer].ln1.weight.copy_(gain)
            for part in "qkv":
                getattr(scaled.blocks[layer].attn, part).weight.mul_(gain)
    torch.testing.assert_close(k_composition_scores(gained), k_composition_scores(scaled))
    assert not torch.allclose(k_composition_scores(gained), k_composition_scores(make_model(width=16)), rtol=1e-2)


def test_keys_that_read_what_a_head_writes_compose_and_others_do_not():
    model = make_model(heads=2, width=8)
    earlier, later = (block.attn for block in model.blocks)
    with torch.no_grad():
        for part in (earlier.v, earlier.o, later.q, later.k):
            part.weight.zero_()
        earlier.v.weight[0, 5] = 2.0  # head 0 reads axis 5 of the residual stream
        earlier.o.weight[3, 0] = 0.5  # ... and writes axis 3
        earlier.v.weight[4, 5] = earlier.o.weight[2, 4] = 1.0  # head 1 writes axis 2
        later.q.weight[0, 7] = later.q.weight[4, 7] = 1.0
        later.k.weight[0, 3] = 3.0  # the keys of head 0 read axis 3, those of head 1 axis 3 and 2 in equal parts
        later.k.weight[4, 3] = later.k.weight[4, 2] = 1.0
    half = 0.5**0.5
    torch.testing.assert_close(k_composition_scores(model)[0, :, 1], torch.tensor([[1.0, half], [0.0, half]]))


def test_of_two_heads_at_random_it_is_one_over_the_root_of_the_width():
    found = k_composition_scores(make_model(width=64))[0, :, 1]
    assert found.mean().item() == pytest.approx(1 / 8, rel=0.1)


def test_one_layer_has_nothing_to_compose():
    assert k_composition_scores(make_model(layers=1, width=16)).abs().max() == 0
