from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from phasewatch import PhasewatchError
from phasewatch.monitor.emergence.links import exact_match
from phasewatch.monitor.probing.item_scores import ItemScores, Question

QUESTIONS = [
    Question([0, 1, 2], [[3], [4], [5, 6]], right=1),
    Question([2], [[1, 1], [0]], right=0),
    Question([4, 4], [[2, 3, 1]]),
]


class Causal(nn.Module):
    """Logits of the running sum of embeddings; counts its calls. As Hugging Face returns them, or as a tensor."""

    def __init__(self, wrapped: bool):
        super().__init__()
        self.table = nn.Embedding(7, 8)
        self.head = nn.Linear(8, 7)
        self.wrapped = wrapped
        self.calls = 0

    def forward(self, tokens):
        self.calls += 1
        logits = self.head(self.table(tokens).cumsum(dim=1))
        return SimpleNamespace(logits=logits) if self.wrapped else logits


@pytest.fixture(params=[False, True], ids=["tensor", "logits"])
def model(request):
    torch.manual_seed(0)
    return Causal(request.param)


def one_by_one(model, prompt, answer):
    """Token by token, without padding or batches."""
    total, tokens = [], list(prompt)
    for token in answer:
        out = model(torch.tensor([tokens]))
        logits = getattr(out, "logits", out)[0, -1].detach().double()
        total.append(float(torch.log_softmax(logits, 0)[token]))
        tokens.append(token)
    return total


def test_each_answer_is_scored_as_one_by_one(model):
    found = ItemScores(QUESTIONS, batch_size=2).measure(model)
    for i, question in enumerate(QUESTIONS):
        for c, choice in enumerate(question.choices):
            assert found.log_p[i, c] == pytest.approx(sum(one_by_one(model, question.prompt, choice)), abs=1e-5)
        own = one_by_one(model, question.prompt, question.choices[question.right])
        np.testing.assert_allclose(found.token_log_p[i, : len(own)], own, atol=1e-5)
        assert np.isnan(found.token_log_p[i, len(own) :]).all()
    assert np.isnan(found.log_p[2, 1:]).all()


def test_the_metrics_are_the_chain(model):
    scores = ItemScores(QUESTIONS, name="quiz")
    found = scores.measure(model)
    values = {name: metric(model, None) for name, metric in scores.metrics.items()}
    right = found.log_p[[0, 1, 2], [1, 0, 0]]
    assert values["quiz_log_p"] == pytest.approx(right.mean())
    assert values["quiz_p"] == pytest.approx(np.exp(right).mean())
    per_token = [right[0], right[1] / 2, right[2] / 3]
    assert values["quiz_log_p_per_token"] == pytest.approx(np.mean(per_token), abs=1e-6)
    among = [np.exp(found.log_p[i]) / np.nansum(np.exp(found.log_p[i])) for i in (0, 1)]
    assert values["quiz_p_among_choices"] == pytest.approx((among[0][1] + among[1][0]) / 2)
    brier = [np.nansum((among[i] - np.eye(3)[QUESTIONS[i].right]) ** 2) for i in (0, 1)]
    assert values["quiz_brier"] == pytest.approx(np.mean(brier))
    correct = [np.nanargmax(found.log_p[0]) == 1, np.nanargmax(found.log_p[1]) == 0, found.greedy[2]]
    assert values["quiz_accuracy"] == pytest.approx(np.mean(correct))


def test_a_snapshot_is_scored_once_and_the_next_one_again(model):
    scores = ItemScores(QUESTIONS)
    for metric in scores.metrics.values():
        metric(model, None)
    assert model.calls == 1
    before = scores.metrics["items_log_p"](model, None)
    with torch.no_grad():
        model.head.bias[3] += 0.5
    assert scores.metrics["items_log_p"](model, None) != before
    assert model.calls == 2


def test_watched_behaviours_are_metrics_of_their_own(model):
    scores = ItemScores([], watch={"refusal": ("ab", "cd")}, encode=lambda text: [ord(letter) - 97 for letter in text])
    assert list(scores.metrics) == ["watch_refusal"]
    assert scores.metrics["watch_refusal"](model, None) == pytest.approx(
        sum(one_by_one(model, [0, 1], [2, 3])), abs=1e-5
    )


def test_greedy_is_what_the_tokens_thresholds_say_when_they_are_clear(model):
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([0.0, 9.0, 0, 0, 0, 0, 0]))
    found = ItemScores([Question([0], [[1, 1]]), Question([0], [[1, 2]])]).measure(model)
    assert found.greedy.tolist() == [True, False]
    assert exact_match(found.token_log_p) == pytest.approx(0.5, abs=0.01)


def test_bad_questions_are_refused_in_a_sentence():
    with pytest.raises(PhasewatchError, match="no questions and nothing to watch"):
        ItemScores([])
    with pytest.raises(PhasewatchError, match="question 0 is text; pass encode="):
        ItemScores([Question("a", ["b"])])
    with pytest.raises(PhasewatchError, match="question 0 has 2 choices, and 2 as the index"):
        ItemScores([Question([0], [[1], [2]], right=2)])
    with pytest.raises(PhasewatchError, match="has an empty prompt or answer"):
        ItemScores([Question([0], [[]])])
