import numpy as np
import pytest
from scipy.interpolate import CubicSpline, make_smoothing_spline

from phasewatch.monitor.segments import log_steps, smooth, stages, wanders


def anything_large(curve, least):
    return lambda start, end: bool(abs(curve.value[end] - curve.value[start]) > least)


def test_step_zero_lies_one_gap_before_the_first():
    np.testing.assert_allclose(log_steps(np.array([0, 10, 40, 50])), np.log([2.5, 10, 40, 50]))
    np.testing.assert_allclose(log_steps(np.array([10, 40])), np.log([10, 40]))
    np.testing.assert_allclose(log_steps(np.array([0, 10])), np.log([10, 10]) - [1, 0])
    np.testing.assert_allclose(log_steps(np.array([0])), [0.0])


def test_counting_steps_in_another_unit_shifts_all_positions_alike():
    steps = np.array([0, 3, 10, 70, 500])
    np.testing.assert_allclose(log_steps(steps * 128), log_steps(steps) + np.log(128))


def test_the_curve_is_the_smoothing_spline_of_its_own_stiffness():
    rng = np.random.default_rng(0)
    x = np.sort(rng.uniform(0, 10, 60))
    y = np.sin(x) + rng.normal(0, 0.3, 60)
    curve = smooth(x, y)
    stiffness = np.geomspace(1e-3, 10, 400)
    distance = [np.abs(make_smoothing_spline(x, y, lam=s)(x) - curve.value).max() for s in stiffness]
    assert min(distance) < 0.02
    spline = make_smoothing_spline(x, y, lam=stiffness[np.argmin(distance)])
    np.testing.assert_allclose(curve.slope, spline.derivative()(x), atol=0.1)


@pytest.mark.parametrize("n", [40, 300])
def test_noise_and_error_of_a_change_are_those_of_repeated_draws(n):
    x = np.linspace(0, 8, n)
    truth = 5 * np.tanh(x - 4)
    a, b = n // 5, 4 * n // 5
    changes, errors, noises = [], [], []
    for seed in range(200):
        curve = smooth(x, truth + np.random.default_rng(seed).normal(0, 0.7, n))
        changes.append(curve.value[b] - curve.value[a])
        errors.append(curve.change_error(a, b))
        noises.append(curve.noise)
    assert np.median(noises) == pytest.approx(0.7, rel=0.1)
    assert np.mean(changes) == pytest.approx(truth[b] - truth[a], abs=4 * np.std(changes) / np.sqrt(200))
    assert np.std(changes) < 0.6
    assert np.median(errors) == pytest.approx(np.std(changes), rel=0.3)


def test_covariances_are_those_of_the_spline_as_a_posterior_mean():
    rng = np.random.default_rng(1)
    x = np.sort(rng.uniform(0, 8, 60))
    y = 3 + np.sin(x) + rng.normal(0, 0.2, 60)
    curve = smooth(x, y)
    covariance = curve.value_root @ curve.value_root.T
    # With a Gaussian prior the posterior mean is (covariance / noise²) y, whatever the prior.
    np.testing.assert_allclose(covariance @ y / curve.noise**2, curve.value, atol=1e-7)
    derivative = CubicSpline(x, np.eye(60), bc_type="natural")(x, 1)
    np.testing.assert_allclose(
        curve.slope_root @ curve.slope_root.T, derivative @ covariance @ derivative.T, rtol=1e-6, atol=1e-9
    )
    contrast = np.eye(60)[40] - np.eye(60)[20]
    assert curve.change_error(20, 40) == pytest.approx(np.sqrt(contrast @ covariance @ contrast))
    assert curve.slope_change_error(20, 40) == pytest.approx(
        np.sqrt(contrast @ derivative @ covariance @ derivative.T @ contrast)
    )


def test_a_line_and_a_constant_are_left_as_they_are():
    x = np.linspace(-3, 4, 30)
    line = smooth(x, 2 - 3 * x)
    np.testing.assert_allclose(line.value, 2 - 3 * x, atol=1e-9)
    np.testing.assert_allclose(line.slope, -3, atol=1e-9)
    flat = smooth(x, np.full(30, 1e6))
    np.testing.assert_array_equal(flat.value, 1e6)
    assert flat.noise == 0
    assert flat.change_error(0, 29) == 0


def test_white_noise_is_smoothed_to_nearly_a_line():
    x = np.linspace(0, 1, 50)
    freedom = [smooth(x, np.random.default_rng(seed).normal(size=50)).freedom for seed in range(100)]
    assert np.median(freedom) < 3.5


@pytest.mark.parametrize("n", [5, 15, 200])
def test_noise_seldom_wanders_and_trends_do(n):
    series = np.random.default_rng(n).normal(size=(2000, n))
    assert np.mean([wanders(y) for y in series]) < 0.07
    assert wanders(np.arange(n) * 0.1 + 7)
    assert not wanders(np.full(n, 3.0))


def test_rise_plateau_fall_leaves_the_plateau_to_neither():
    x = np.linspace(0, 20, 201)
    y = 100 * np.clip(x - 2, 0, 3) / 3 - 60 * np.clip(x - 14, 0, 2) / 2
    curve = smooth(x, y + np.random.default_rng(0).normal(0, 0.5, 201))
    (up_start, up_end), (down_start, down_end) = stages(curve, anything_large(curve, 5))
    np.testing.assert_allclose(x[[up_start, up_end, down_start, down_end]], [2, 5, 14, 16], atol=0.6)


def test_a_slow_down_between_two_rises_is_a_milestone():
    x = np.linspace(0, 20, 120)
    y = 40 / (1 + np.exp(-2 * (x - 5))) + 60 / (1 + np.exp(-2 * (x - 13)))
    curve = smooth(x, y + np.random.default_rng(0).normal(0, 0.4, 120))
    (first, first_end), (second, second_end) = stages(curve, anything_large(curve, 5))
    assert x[first] < 4 < 6 < x[first_end] <= x[second] < 12 < 14 < x[second_end]


def test_one_smooth_rise_is_not_split():
    x = np.linspace(0, 20, 60)
    for seed in range(30):
        y = 100 / (1 + np.exp(-(x - 10))) + np.random.default_rng(seed).normal(0, 1, 60)
        curve = smooth(x, y)
        assert len(stages(curve, anything_large(curve, 5))) == 1


def test_small_wiggles_are_absorbed_by_the_stage_around_them():
    x = np.linspace(0, 10, 101)
    curve = smooth(x, 10 * x + 8 * np.sin(4 * x))
    assert len(stages(curve, anything_large(curve, 8))) > 1
    ((start, end),) = stages(curve, anything_large(curve, 60))
    assert start < 5
    assert end > 95


def test_a_weak_stage_at_either_end_is_dropped_not_joined():
    x = np.linspace(0, 10, 101)
    y = 1.5 * np.clip(2 - x, 0, 2) + 10 * np.clip(x - 2, 0, 6) - 1.5 * np.clip(x - 8, 0, 2)
    curve = smooth(x, y)
    ((start, end),) = stages(curve, anything_large(curve, 10))
    np.testing.assert_allclose(x[[start, end]], [2, 8], atol=0.3)


def test_two_snapshots_a_step_apart_late_in_a_run_do_not_disturb_the_curve():
    rng = np.random.default_rng(0)
    steps = np.unique(np.geomspace(1, 1e7, 60).round())
    llc = 50 * np.tanh(log_steps(steps) - 8) + rng.normal(0, 0.5, len(steps))
    alone = smooth(log_steps(steps), llc)
    doubled = smooth(log_steps(np.append(steps, steps[-1] + 1)), np.append(llc, llc[-1] + 0.4))
    np.testing.assert_allclose(doubled.value[:-1], alone.value, atol=0.5)
    assert doubled.noise == pytest.approx(alone.noise, rel=0.5)


def test_points_bunched_far_from_the_first():
    curve = smooth(log_steps(np.array([1, 10**15, 10**15 + 1, 10**15 + 2, 10**15 + 3])), np.array([0.0, 5, 5, 5, 5]))
    assert np.isfinite(curve.value).all()
    np.testing.assert_allclose(curve.value, [0, 5, 5, 5, 5], atol=1e-6)
