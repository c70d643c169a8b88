import numpy as np
import pytest
from scipy.special import log_softmax

from phasewatch import PhasewatchError, emergence
from phasewatch.monitor.emergence.items import Items

STEPS = np.array([100.0, 1000.0, 10_000.0, 100_000.0])


def items(seed=0, count=300):
    rng = np.random.default_rng(seed)
    odds = rng.normal(0.0, 0.4, (4, count, 3)) + rng.normal(size=(count, 3))
    odds[:, :, 1] += np.arange(4)[:, None]
    return Items(STEPS, log_softmax(np.concatenate([odds, np.zeros((4, count, 1))], axis=2), axis=2)[:, :, :3],
                 target=np.ones(count, dtype=int))  # fmt: skip


def test_scores_are_what_their_formulas_say():
    made = items(count=7)
    found = emergence.scores(made)
    p = np.exp(made.log_p)
    among = p / p.sum(axis=2, keepdims=True)
    brier = ((among - np.eye(3)[1]) ** 2).sum(axis=2)
    np.testing.assert_allclose(found.log_p.value, made.log_p[:, :, 1].mean(axis=1))
    np.testing.assert_allclose(found.p.value, p[:, :, 1].mean(axis=1))
    np.testing.assert_allclose(found.p_among_choices.value, among[:, :, 1].mean(axis=1))
    np.testing.assert_allclose(found.brier.value, brier.mean(axis=1))
    np.testing.assert_allclose(found.brier.error, brier.std(axis=1, ddof=1) / np.sqrt(7))
    np.testing.assert_allclose(found.accuracy.value, (p.argmax(axis=2) == 1).mean(axis=1))
    assert found.chance == pytest.approx(1 / 3)


def test_items_with_fewer_choices_are_padded():
    log_p = np.log([[[0.5, 0.2, 0.1], [0.4, 0.3, np.nan]]])
    made = Items(np.array([1.0]), log_p)
    assert made.chance == pytest.approx((1 / 3 + 1 / 2) / 2)
    np.testing.assert_allclose(made.per_item["p_among_choices"], [[0.5 / 0.8, 0.4 / 0.7]])


def test_predictability_is_lost_where_the_wrong_choices_come_in():
    rng = np.random.default_rng(0)
    right = -8 + 1.5 * np.arange(4)[:, None] + rng.normal(0, 0.1, (4, 200))
    wrong = -9 + 1.5 * np.arange(4)[:, None] + rng.normal(0, 1.0, (4, 200))
    found = emergence.attribute(Items(STEPS, np.stack([right, np.minimum(wrong, -1.5)], axis=2)))
    assert found.mean["log_p"] > 0.99
    assert found.lost_at == "p_among_choices"
    assert found.lost > 5 * found.error
    assert "Most is lost on the way to p_among_choices" in str(found)


def test_a_constant_score_has_no_correlation_and_the_share_is_reported():
    made = items()
    made.correct[:, :75] = 1.0
    made.correct[:, 75:] = np.array([0, 0, 1, 1])[:, None]
    found = emergence.attribute(made)
    assert found.undefined["accuracy"] == pytest.approx(0.25)
    assert np.isnan(found.correlation["accuracy"][:75]).all()
    u = np.log(STEPS)
    assert found.correlation["accuracy"][80] == pytest.approx(np.corrcoef(u, [0, 0, 1, 1])[0, 1])


def test_bad_items_are_refused_in_a_sentence():
    good = items(count=5)
    with pytest.raises(PhasewatchError, match=r"has the value 0\.3; a log probability is at most 0"):
        Items(STEPS, np.where(good.log_p == good.log_p.max(), 0.3, good.log_p))
    with pytest.raises(PhasewatchError, match=r"item 0's choices sum to 1\.\d+ at 100"):
        Items(STEPS, np.log(np.full((4, 5, 3), 0.5)))
    missing = good.log_p.copy()
    missing[2, 3, 2] = np.nan
    with pytest.raises(PhasewatchError, match="item 3 has choice 2 at some steps and lacks it at 10000"):
        Items(STEPS, missing)
    with pytest.raises(PhasewatchError, match="has 100 twice"):
        Items(np.array([100, 100, 200, 300]), good.log_p)
    with pytest.raises(PhasewatchError, match="index of a choice that it has"):
        Items(STEPS, good.log_p, target=np.full(5, 3))
    with pytest.raises(PhasewatchError, match="has 1 place along the axis"):
        emergence.attribute(Items(STEPS[:1], good.log_p[:1]))
    with pytest.raises(PhasewatchError, match="all items are right from the start"):
        emergence.attribute(Items(STEPS, good.log_p, correct=np.ones((4, 5))))
