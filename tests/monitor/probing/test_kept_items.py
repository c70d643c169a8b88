import numpy as np
import pytest
import torch
from safetensors.numpy import save
from torch import nn

from phasewatch import SGLD, ItemScores, PhasewatchError, PhasewatchWarning, Probe, Question, Snapshot, emergence
from phasewatch.monitor.probing import kept_items
from phasewatch.monitor.probing.kept_items import read_items, read_step

QUESTIONS = [Question([0, 1], [[3], [4], [2, 1]], right=1), Question([2], [[1, 1], [0]]), Question([3], [[2, 3, 1]])]


class Causal(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 5)

    def forward(self, tokens):
        return self.table(tokens)


def loss(model, batch):
    return model(batch).square().mean()


def measured(run, steps=(10, 20, 30)):
    """A probe's points at some steps, and the models' questions scored by hand."""
    scores = ItemScores(QUESTIONS, name="quiz", keep=run, watch={"x": ([1], [2])})
    sampler = SGLD(step_size=1e-3, nbeta=10.0, chains=2, draws=5, burn_in=2, batch_size=8)
    data = torch.randint(5, (32, 3), generator=torch.Generator().manual_seed(0))
    probe = Probe(Causal, loss, data, sampler=sampler, metrics=scores.metrics)
    points, by_hand = [], []
    for step in steps:
        torch.manual_seed(step)
        model = Causal()
        points.append(probe(Snapshot.of(model, step)))
        by_hand.append(ItemScores(QUESTIONS).measure(model))
    return points, by_hand


def test_each_step_of_a_run_is_kept_by_item_and_token(tmp_path):
    points, by_hand = measured(tmp_path)
    for point, truth in zip(points, by_hand, strict=True):
        kept = read_step(tmp_path, "quiz", point.step)
        for name in ("log_p", "token_log_p", "greedy", "right"):
            np.testing.assert_array_equal(kept[name], getattr(truth, name))
    assert sorted(file.name for file in (tmp_path / "items").iterdir()) == [
        f"quiz-{step}.safetensors" for step in (10, 20, 30)
    ]


def test_what_is_kept_gives_the_runs_scores_again(tmp_path):
    points, _ = measured(tmp_path)
    items = read_items(tmp_path, "quiz")
    assert items.x.tolist() == [10, 20, 30]
    curves = emergence.scores(items).curves()
    for score in ("log_p", "p", "accuracy"):
        assert curves[score].value == pytest.approx([point.metrics[f"quiz_{score}"] for point in points])


def test_the_same_weights_at_a_later_step_are_kept_too(tmp_path):
    scores, model = ItemScores(QUESTIONS, keep=tmp_path), Causal()
    for step in (1, 2):
        scores.score("items_log_p", model, step)
    assert read_items(tmp_path).x.tolist() == [1, 2]


def test_a_disk_that_refuses_costs_one_warning_and_no_metric(tmp_path):
    (tmp_path / "items").write_text("a file where the folder should be")
    scores, model = ItemScores(QUESTIONS, keep=tmp_path), Causal()
    with pytest.warns(PhasewatchWarning, match="can't keep the questions' values") as warned:
        values = [scores.score("items_log_p", model, step) for step in (1, 2)]
    assert len(warned) == 1
    assert np.isfinite(values).all()


def test_a_damaged_strange_or_huge_file_is_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(PhasewatchError, match="has no values of questions called 'quiz'"):
        read_items(tmp_path, "quiz")
    measured(tmp_path, (10, 20))
    file = tmp_path / "items" / "quiz-20.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    with pytest.raises(PhasewatchError, match="is damaged"):
        read_items(tmp_path, "quiz")
    file.write_bytes(save({"log_p": np.zeros((2, 2))}))
    with pytest.raises(PhasewatchError, match="doesn't hold the values of questions"):
        read_items(tmp_path, "quiz")
    other = {"log_p": np.zeros((1, 2)), "token_log_p": np.zeros((1, 1)), "greedy": np.zeros(1, dtype=bool)}
    file.write_bytes(save(other | {"right": np.zeros(1, dtype=np.int64)}))
    with pytest.raises(PhasewatchError, match="step 20 is of other questions than step 10"):
        read_items(tmp_path, "quiz")
    file.write_bytes(whole)
    monkeypatch.setattr(kept_items, "MOST_BYTES", 100)
    with pytest.raises(PhasewatchError, match="has more than 100 bytes"):
        read_items(tmp_path, "quiz")


def test_a_link_out_of_the_run_is_refused(tmp_path):
    run = tmp_path / "run"
    measured(run, (10,))
    (run / "items" / "quiz-10.safetensors").rename(tmp_path / "elsewhere")
    (run / "items" / "quiz-10.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PhasewatchError, match="leads out of"):
        read_items(run, "quiz")
