import numpy as np
import pytest

from phasewatch import PhasewatchError
from phasewatch.monitor.emergence.law import EmergenceLaw

AMOUNTS = np.geomspace(250, 60_000, 5)


def finetuned(seed, *, nearest=0.1, alpha=1.1, checkpoints=8):
    """Scores whose few-shot elbow, at ten examples, lies at a loss of 2."""
    rng = np.random.default_rng(seed)
    k = 0.3 / (np.log(AMOUNTS[-1]) ** alpha - np.log(AMOUNTS[0]) ** alpha)
    base = 2 - k * np.log(10) ** alpha
    loss, amount = (a.ravel() for a in np.meshgrid(2 + nearest + np.linspace(0, 0.7, checkpoints), AMOUNTS))
    rise = np.maximum(k * np.log(amount) ** alpha + base - loss, 0)
    return loss, amount, np.clip(0.25 + 0.5 * rise + 0.015 * rng.normal(size=len(loss)), 0, 1)


def test_the_elbow_of_the_untuned_model_is_found_and_covered():
    found = [EmergenceLaw.fit(*finetuned(seed), chance=0.25).onset(amount=10) for seed in range(6)]
    assert np.mean([abs(one.median - 2) <= 0.1 for one in found]) >= 5 / 6
    assert np.mean([one.high <= 2 <= one.low for one in found]) >= 4 / 6


def test_further_from_the_elbow_it_is_less_sure():
    near, far = (EmergenceLaw.fit(*finetuned(0, nearest=n), chance=0.25).onset(amount=10) for n in (0.02, 0.2))
    assert far.low - far.high > near.low - near.high


def test_the_fit_is_the_same_each_time_and_says_what_it_found():
    data = finetuned(1)
    one, other = (EmergenceLaw.fit(*data, chance=0.25) for _ in range(2))
    np.testing.assert_array_equal(one.C, other.C)
    assert "The elbow lies at a loss of" in str(one)
    assert np.quantile(one.slope, 0.05) < 0.5 < np.quantile(one.slope, 0.95)


def test_data_that_cannot_tell_are_refused_with_the_reason():
    loss, amount, score = finetuned(0)
    few = np.isin(loss, np.unique(loss)[:4])
    with pytest.raises(PhasewatchError, match="has 4 checkpoints and takes 5"):
        EmergenceLaw.fit(loss[few], amount[few], score[few], chance=0.25)
    two = amount < 1000
    with pytest.raises(PhasewatchError, match="has 2 amounts of finetuning data and takes 3"):
        EmergenceLaw.fit(loss[two], amount[two], score[two], chance=0.25)
    with pytest.raises(PhasewatchError, match=r"scores of 0 of 5 amounts leave chance.*out of reach"):
        EmergenceLaw.fit(loss, amount, np.full(len(loss), 0.25), chance=0.25)
    with pytest.raises(PhasewatchError, match="chance isn't given"):
        EmergenceLaw.fit(loss, amount, score)
    with pytest.raises(PhasewatchError, match="so above 1"):
        EmergenceLaw.fit(loss, np.zeros(len(loss)), score, chance=0.25)


def test_scores_that_reach_1_do_not_move_the_elbow():
    loss, amount = (a.ravel() for a in np.meshgrid(np.linspace(3.0, 2.1, 8), [250, 1000, 4000, 16_000, 60_000]))
    rise = 2.5 * np.maximum(1.9 + 0.06 * np.log(amount) - loss, 0)
    score = np.clip(0.25 + rise + 0.01 * np.random.default_rng(0).normal(size=40), 0, 1)
    assert (score == 1).any()
    onset = EmergenceLaw.fit(loss, amount, score, chance=0.25).onset(amount=10)
    assert onset.median == pytest.approx(1.9 + 0.06 * np.log(10), abs=0.1)
    assert onset.low - onset.high < 0.6
