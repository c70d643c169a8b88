import numpy as np
import pytest
from scipy.special import expit

from phasewatch.monitor.emergence import shape
from phasewatch.monitor.emergence.shape import transition_speed

Z = np.linspace(0, 1, 60)


def noisy(score, seed):
    return score + 0.01 * np.random.default_rng(seed).normal(size=len(score))


@pytest.mark.parametrize("seed", range(3))
def test_a_jump_is_faster_than_a_gradual_rise_and_that_as_fast_as_a_line(seed):
    jump, gradual = expit((Z - 0.5) / 0.02), 2 * Z
    assert transition_speed(Z, noisy(jump, seed)) > 0.5
    assert transition_speed(Z, noisy(gradual, seed)) == pytest.approx(0, abs=0.25)


def test_noise_has_no_transition_and_a_fall_counts_as_a_rise_does():
    assert transition_speed(Z, np.zeros(60)) == 0
    jump = expit((Z - 0.5) / 0.02)
    assert transition_speed(Z, -jump) == pytest.approx(transition_speed(Z, jump), abs=0.05)


def test_units_of_the_axis_and_of_the_score_change_nothing():
    jump = noisy(expit((Z - 0.4) / 0.02), 0)
    assert transition_speed(1e6 * Z - 7, 100 * jump) == pytest.approx(transition_speed(Z, jump), abs=0.02)


def test_points_too_close_to_tell_apart_are_one():
    close = np.sort(np.concatenate([Z, Z + 1e-9]))
    score = noisy(expit((close - 0.4) / 0.02), 0)
    assert np.isfinite(transition_speed(close, score))


def test_the_two_speeds_are_the_last_features():
    sharp, smooth = noisy(expit((Z - 0.5) / 0.01), 0), noisy(-3 + 2 * Z, 1)
    found = shape.features(Z, sharp, smooth, 0.0)
    assert found.shape == (11,)
    assert found[-2:].tolist() == [transition_speed(Z, sharp), transition_speed(Z, smooth)]
