"""The scores of the language model: against models whose heads are known, and by hand."""

import math

import numpy as np
import pytest
import torch

from phasewatch import Langevin, Probe, Snapshot
from phasewatch.toy_tasks import language
from phasewatch.toy_tasks.english import EnglishData
from phasewatch.toy_tasks.language import LanguageModel, Shape
from phasewatch.toy_tasks.language_scores import LanguageScores, around, k_composition

SHAPE = Shape(layers=2, heads=2, width=16, vocabulary=30, context=24)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "tokens.bin"
    file.write_bytes(np.random.default_rng(0).integers(30, size=20_000).astype("<u2").tobytes())
    return EnglishData(file, vocabulary=30, context=24)


@pytest.fixture
def scores(data):
    return LanguageScores(data, data.held_out(12), sequences=10)


def test_a_previous_token_head_is_found_where_it_is(scores):
    model = LanguageModel(SHAPE)
    attention = model.blocks[1].attention
    with torch.no_grad():
        for parameter in model.positions.weight, attention.q_proj.weight, attention.k_proj.weight:
            parameter.zero_()
        # Head 1 of layer 1 turns positions by one: angles of position p at q, of p + 1 at k.
        angle = torch.arange(24) * 0.2
        model.positions.weight[:, 0], model.positions.weight[:, 1] = 300 * angle.cos(), 300 * angle.sin()
        turn = torch.tensor([[math.cos(0.2), math.sin(0.2)], [-math.sin(0.2), math.cos(0.2)]])
        attention.q_proj.weight[8:10, :2] = 4 * turn
        attention.k_proj.weight[8:10, :2] = 4 * torch.eye(2)
    found = scores.measure(model)
    assert found["previous_token_head"] == 3
    assert found["previous_token"] > 0.8
    assert found["prefix_matching"] < 0.4


def test_the_compositions_are_those_of_the_published_formula():
    model = LanguageModel(SHAPE, seed=1)
    with torch.no_grad():
        model.blocks[0].norm.weight.uniform_(0.5, 2)
        model.blocks[1].norm.weight.uniform_(0.5, 2)
    first, second = model.blocks[0].attention, model.blocks[1].attention
    gain = [block.norm.weight.diag() for block in model.blocks]
    ov = first.o_proj.weight[:, 8:] @ first.v_proj.weight[8:] @ gain[0]  # of head 1
    qk = gain[1] @ second.q_proj.weight[:8].T @ second.k_proj.weight[:8] @ gain[1]  # of head 0
    expected = (qk @ ov).norm() / (qk.norm() * ov.norm())
    found = k_composition(model)
    assert found.shape == (2, 2, 2, 2)
    torch.testing.assert_close(found[0, 1, 1, 0], expected)
    assert found[1].abs().max() == found[0, :, 0].abs().max() == 0


def test_a_model_of_the_bigrams_has_their_entropy(scores, data):
    table = data.bigrams(torch.device("cpu"))
    model = LanguageModel(Shape(layers=1, heads=2, width=32, vocabulary=30, context=24))
    with torch.no_grad():
        for block in model.blocks:
            block.attention.o_proj.weight.zero_()
        model.embed.weight.zero_()
        model.embed.weight[:, :30] = 100 * torch.eye(30)
        model.norm.weight.fill_(1.0)
        centred = torch.nn.functional.layer_norm(model.embed.weight, (32,))
        model.unembed.weight.copy_(torch.linalg.lstsq(centred, table.clamp(min=1e-9).log()).solution.T)
    rows = scores.tokens[:10].flatten()
    entropy = -(table[rows] * table[rows].clamp(min=1e-9).log()).sum(-1).mean().item()
    assert scores.measure(model)["bigram"] == pytest.approx(entropy, abs=0.02)


def test_the_in_context_score_is_late_minus_early():
    by_position = torch.arange(1023.0)
    assert around(by_position, 500) - around(by_position, 50) == 450
    assert around(torch.arange(511.0), 500) - around(torch.arange(511.0), 50) == 225


def test_they_are_taken_once_for_each_snapshot_and_kept_by_head(scores, data, monkeypatch):
    measured = []
    measure = LanguageScores.measure
    monkeypatch.setattr(LanguageScores, "measure", lambda self, model: measured.append(1) or measure(self, model))
    make_model = lambda: LanguageModel(SHAPE)  # noqa: E731
    sampler = Langevin(chains=2, draws=4, burn_in=0, batch_size=2)
    metrics = scores.metrics
    probe = Probe(make_model, language.loss, data, eval_batch=data.held_out(4), sampler=sampler, metrics=metrics)
    points = [probe(Snapshot.of(LanguageModel(SHAPE, seed=seed), seed)) for seed in (1, 2)]
    assert len(measured) == 2
    assert set(scores.by_head) == {1, 2}
    for point in points:
        of_heads = scores.by_head[point.step]["previous_token"]
        assert np.shape(of_heads) == (2, 2)
        assert point.metrics["previous_token"] == np.max(of_heads)
        assert point.metrics["previous_token_head"] == np.argmax(of_heads)
