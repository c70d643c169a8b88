import numpy as np
import pytest

from phasewatch.monitor.trajectories.jumps import (
    MOST_GAPS,
    MOST_ROUND,
    Jump,
    Place,
    likeliest,
    near,
    rise_slopes,
    rises,
    stands_on_plateaus,
    suspects,
)
from phasewatch.monitor.trajectories.smoothing import smooth


def test_rises_by_hand():
    x = np.array([0.0, 1, 2, 4, 8, 9])
    straight, rounded = Place(1, 3, False), Place(1, 4, True)
    at = np.array([-1.0, 1, 1.75, 4, 8, 20])
    by_hand = [
        [0, 0],
        [0, 0],
        [0.25, 3 * (0.75 / 7) ** 2 - 2 * (0.75 / 7) ** 3],
        [1, 3 * (3 / 7) ** 2 - 2 * (3 / 7) ** 3],
    ]
    np.testing.assert_allclose(rises(at, x, [straight, rounded]), [*by_hand, [1, 1], [1, 1]])


def test_their_slopes_are_those_of_small_differences():
    x = np.array([0.0, 1, 2, 4, 8, 9])
    places = [Place(1, 3, False), Place(1, 2, False), Place(1, 4, True)]
    differences = (rises(x + 1e-6, x, places) - rises(x - 1e-6, x, places)) / 2e-6
    np.testing.assert_allclose(rise_slopes(x, places), differences, atol=1e-5)


@pytest.mark.parametrize("gaps", [1, 3, 5])
def test_a_jump_is_suspected_and_a_smooth_rise_is_not(gaps):
    i, rng = np.arange(100), np.random.default_rng(0)
    noise = 0.03 * rng.normal(size=100)
    found = suspects(np.clip((i - 40) / gaps, 0, 1) + noise)
    assert any(abs(place.start - 40) <= gaps and abs(place.end - 40 - gaps) <= gaps for place in found)
    assert suspects(np.clip((i - 20) / 60, 0, 1) + noise / 10) == []
    assert suspects(noise) == []
    assert suspects(np.zeros(100)) == []


def test_an_interval_holds_95_percent_of_the_places():
    places = [Place(start, 9, False) for start in (3, 4, 5, 6)]
    jump = likeliest(places, np.log([0.02, 0.13, 0.8, 0.05]) - 7)
    assert (jump.place, jump.start_interval, jump.end_interval) == (places[2], (4, 6), (9, 9))
    soft = likeliest([Place(10, 18, True)], np.zeros(1))
    assert (soft.start_interval, soft.end_interval) == ((8, 10), (18, 20))


def test_places_near_another_lie_within_the_series_and_hold_longer_ones_which_are_none():
    places = near(Place(6, 7, False), 16)
    assert all(1 <= place.start < place.end <= 14 for place in places)
    assert Place(6, 7, False) in places
    assert max(place.end - place.start for place in places if not place.is_round) == MOST_GAPS
    longest = max(places, key=lambda place: place.end - place.start)
    assert longest.end - longest.start > MOST_ROUND
    assert not Jump(longest, (0, 0), (0, 0)).is_abrupt


def test_a_steep_part_of_a_rise_is_no_jump():
    x = np.arange(10.0)
    jump = Jump(Place(4, 6, False), (4, 4), (6, 6))
    assert stands_on_plateaus(x, 10 * np.clip((x - 4) / 2, 0, 1) + 0.1 * x, jump)
    assert not stands_on_plateaus(x, 10 * np.clip((x - 4) / 2, 0, 1) + 0.1 * x + np.clip(x - 6, 0, None), jump)


@pytest.mark.parametrize("points", [60, 200])
@pytest.mark.parametrize("gaps", [1, 3])
def test_a_curve_with_two_jumps_is_smooth_beside_them_and_as_noisy_as_its_points(points, gaps):
    i = np.arange(points)
    x = np.linspace(0, 8, points)
    first, second = points // 3, 2 * points // 3
    truth = 0.3 * np.sin(x / 3) + 9 * np.clip((i - first) / gaps, 0, 1) - 6 * np.clip((i - second) / gaps, 0, 1)
    curve = smooth(x, truth + np.random.default_rng(3).normal(0, 0.2, points))
    assert [(jump.start, jump.end) for jump in curve.jumps] == [(first, first + gaps), (second, second + gaps)]
    assert np.abs(curve.value - truth).max() < 0.35
    assert np.median(curve.noise) == pytest.approx(0.2, rel=0.25)
    assert curve.freedom < 10


def test_covariances_with_a_jump_are_those_of_a_posterior_mean():
    x = np.linspace(0, 8, 100)
    y = np.sin(x) + 9 * (x > 5) + np.random.default_rng(1).normal(0, 0.2, 100)
    curve = smooth(x, y)
    assert len(curve.jumps) == 1
    covariance = curve.value_root @ curve.value_root.T
    apart = np.abs(np.subtract.outer(np.arange(100), np.arange(100)))
    noise = np.outer(curve.noise, curve.noise) * curve.correlation**apart
    np.testing.assert_allclose(covariance @ np.linalg.solve(noise, y), curve.value, atol=1e-6)
    weights = np.random.default_rng(2).normal(size=100)
    assert curve.weights_of_observations(weights) @ y == pytest.approx(weights @ curve.slope)
