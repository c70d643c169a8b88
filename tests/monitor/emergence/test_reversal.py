import numpy as np
import pytest

from phasewatch import PhasewatchError, emergence
from phasewatch.monitor.emergence.reversal import EARLY, RELEASE, rings_since, turned

STEP = np.arange(1, 31) * 5000.0


def rising(seed, noise=0.03):
    return -5 + np.log(STEP / 5000) + noise * np.random.default_rng(seed).normal(size=30)


@pytest.mark.parametrize("seed", range(5))
def test_a_fall_is_found_soon_after_its_peak(seed):
    found = emergence.reversal(STEP, rising(seed) - 0.08 * np.maximum(np.arange(30) - 17, 0))
    assert 80_000 <= found.peak <= 105_000
    assert found.peak < found.alarm <= 125_000
    assert found.fall == pytest.approx(0.5, abs=0.35)
    assert "The alarm rang at" in str(found)


def test_a_series_that_rises_rings_no_alarm():
    assert sum(emergence.reversal(STEP, rising(seed)) is not None for seed in range(40)) <= 1


def test_the_alarm_does_not_look_ahead():
    score = rising(0) - 0.08 * np.maximum(np.arange(30) - 17, 0)
    whole = emergence.reversal(STEP, score)
    known = STEP <= whole.alarm
    so_far = emergence.reversal(STEP[known], score[known])
    assert so_far.alarm == whole.alarm
    assert emergence.reversal(STEP[known][:-1], score[known][:-1]) is None


def test_an_alarm_stays_until_it_is_clearly_taken_back():
    between, low = (EARLY + RELEASE) / 2, RELEASE - 0.01
    assert rings_since(np.array([0.0, EARLY, between, between])) == 1
    assert rings_since(np.array([EARLY, low, between, between])) is None
    assert rings_since(np.array([EARLY, low, between, EARLY, 1.2])) == 3
    assert rings_since(np.array([])) is None


def test_units_change_nothing():
    score = rising(0) - 0.08 * np.maximum(np.arange(30) - 17, 0)
    assert turned(STEP, score) == pytest.approx(turned(STEP * 1e6, 7 * score + 3))


def test_bad_input_is_a_sentence():
    with pytest.raises(PhasewatchError, match="has 5000 twice"):
        emergence.reversal([5000, 5000, 6000], [0, 1, 2])
    with pytest.raises(PhasewatchError, match="1 values that are NaN"):
        emergence.reversal(STEP, np.where(STEP == 5000, np.nan, 0.0))
    with pytest.raises(PhasewatchError, match="has 1 point, and this takes at least 2"):
        emergence.reversal([1], [0.0])


def test_a_spike_rings_no_sure_alarm():
    for seed in range(20):
        score = rising(seed)
        score[20] += 1.0
        score[-1] -= 1.0
        found = emergence.reversal(STEP, score)
        assert found is None or not found.is_sure


def test_a_slow_rise_in_noise_rarely_rings_at_any_time():
    rng = np.random.default_rng(0)
    rise = np.log2(STEP / 5000) - 100 * np.exp(-np.arange(30))
    rang = [
        max(turned(np.log(STEP[:points]), score[:points]) for points in range(12, 31)) > 1
        for score in rise + rng.normal(size=(60, 30))
    ]
    assert np.mean(rang) <= 0.3


def test_a_fall_without_noise_rings_at_its_third_point_and_a_flat_end_does_not():
    rise = np.minimum(np.arange(30.0), 20)
    assert emergence.reversal(STEP, rise) is None
    found = emergence.reversal(STEP, rise - np.maximum(np.arange(30) - 20, 0))
    assert found.peak == STEP[20]
    assert STEP[22] <= found.alarm <= STEP[24]
