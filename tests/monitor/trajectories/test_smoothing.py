import numpy as np
import pytest
from scenarios import correlated
from scipy.interpolate import CubicSpline

from phasewatch.monitor.trajectories.noise import noise_of_rounding
from phasewatch.monitor.trajectories.smoothing import (
    ALONE,
    UNKNOWN,
    WITNESSED,
    _Spline,
    log_steps,
    smooth,
    smooth_with_each,
)


def test_step_zero_lies_one_gap_before_the_first():
    np.testing.assert_allclose(log_steps(np.array([0, 10, 40, 50])), np.log([2.5, 10, 40, 50]))
    np.testing.assert_allclose(log_steps(np.array([10, 40])), np.log([10, 40]))
    np.testing.assert_allclose(log_steps(np.array([0, 10])), np.log([10, 10]) - [1, 0])
    np.testing.assert_allclose(log_steps(np.array([0])), [0.0])


def test_counting_steps_in_another_unit_shifts_all_positions_alike():
    steps = np.array([0, 3, 10, 70, 500])
    np.testing.assert_allclose(log_steps(steps * 128), log_steps(steps) + np.log(128))


@pytest.mark.parametrize("n", [40, 300])
def test_noise_and_error_of_a_change_are_those_of_repeated_draws(n):
    x = np.linspace(0, 8, n)
    truth = 5 * np.tanh(x - 4)
    a, b = n // 5, 4 * n // 5
    changes, errors, noises = [], [], []
    for seed in range(200):
        curve = smooth(x, truth + np.random.default_rng(seed).normal(0, 0.7, n), WITNESSED.shape)
        changes.append(curve.value[b] - curve.value[a])
        errors.append(curve.change_error(a, b))
        noises.append(np.median(curve.noise))
    assert np.median(noises) == pytest.approx(0.7, rel=0.1)
    assert np.mean(changes) == pytest.approx(truth[b] - truth[a], abs=0.5 * np.std(changes))
    assert np.std(changes) < 0.6
    assert 0.9 < np.median(errors) / np.std(changes) < 1.7  # rather too large than too small: `UNKNOWN`


def test_covariances_are_those_of_the_spline_as_a_posterior_mean():
    rng = np.random.default_rng(1)
    x = np.sort(rng.uniform(0, 8, 60))
    y = 3 + np.sin(x) + rng.normal(0, 0.2, 60)
    y[1:] += 0.2 * rng.normal(size=60).cumsum()[:-1]
    curve = smooth(x, y)
    assert curve.correlation > 0
    assert np.ptp(curve.noise) > 0
    covariance = curve.value_root @ curve.value_root.T
    apart = np.abs(np.subtract.outer(np.arange(60), np.arange(60)))
    noise = np.outer(curve.noise, curve.noise) * curve.correlation**apart
    # With a Gaussian prior the posterior mean is its covariance times noise⁻¹ y, whatever the prior.
    np.testing.assert_allclose(covariance @ np.linalg.solve(noise, y), curve.value, atol=1e-6)
    derivative = CubicSpline(x, np.eye(60), bc_type="natural")(x, 1)
    np.testing.assert_allclose(
        curve.slope_root @ curve.slope_root.T, derivative @ covariance @ derivative.T, rtol=1e-6, atol=1e-9
    )
    contrast = np.eye(60)[40] - np.eye(60)[20]
    assert curve.change_error(20, 40) == pytest.approx(UNKNOWN * np.sqrt(contrast @ covariance @ contrast))


def test_a_line_and_a_constant_are_left_as_they_are():
    x = np.linspace(-3, 4, 30)
    line = smooth(x, 2 - 3 * x)
    np.testing.assert_allclose(line.value, 2 - 3 * x, atol=1e-9)
    np.testing.assert_allclose(line.slope, -3, atol=1e-9)
    flat = smooth(x, np.full(30, 1e6))
    np.testing.assert_array_equal(flat.value, 1e6)
    assert not flat.noise.any()
    assert flat.change_error(0, 29) == 0


@pytest.mark.parametrize(
    ("values", "distance"),
    [
        ([0.25, 0.25, 0.5, 0.25, 0.25, 0.75, 0.75, 0.25], 0.25),
        ([1, 1, 2, 1, 2, 2, 1, 1], 1),  # of two values
        ([0.1 + 0.2, 0.3, 0.4, 0.4, 0.3, 0.3], 0.1),  # rounding errors of floats are no grid
        ([0, 0, 0, 0, 5, 5, 5, 5], 0),  # once, by as much as it happened to be
        ([0, 0, 0, 3, 3, 10, 10, 10], 0),  # on no grid
        ([1, 2, 3, 4, 5, 6], 0),  # all different
        ([1, 1, 1, 1, 1, 1], 0),
        ([1, 1 + 1e-12, 1, 1, 1 + 1e-12, 1], 0),
    ],
)
def test_the_noise_of_rounding(values, distance):
    assert noise_of_rounding(np.array(values, dtype=float)) == pytest.approx(distance / 12**0.5, abs=1e-9)


def test_it_is_less_where_a_series_seldom_leaves_a_value():
    """Twice the variance is the mean square of neighbours' differences."""
    once, stairs = np.zeros(60), np.repeat([0.0, 1.0, 2.0], 20)
    once[30] = 1
    assert noise_of_rounding(once) == pytest.approx((2 / 59 / 2) ** 0.5)
    assert noise_of_rounding(stairs) == pytest.approx((2 / 59 / 2) ** 0.5)


def test_a_score_that_leaves_its_grid_s_value_now_and_then_is_flat():
    """The noise around a quiet stretch is never less than rounding hides."""
    y = np.zeros(60)
    y[[9, 23, 24, 41]] = 1.0
    curve = smooth(np.arange(60.0), y)
    assert curve.freedom < 3
    assert not curve.jumps
    assert (curve.noise > 0.99 * (6 / 59 / 2) ** 0.5).all()


def test_white_noise_is_smoothed_to_nearly_a_line():
    x = np.linspace(0, 1, 50)
    freedom = [smooth(x, np.random.default_rng(seed).normal(size=50)).freedom for seed in range(100)]
    assert np.median(freedom) < 3.5


@pytest.mark.parametrize("n", [3, 4, 60, 500])
def test_splines_are_those_of_scipy(n):
    x = np.sort(np.random.default_rng(n).uniform(-2, 8, n))
    ours = _Spline(x)
    natural = CubicSpline(ours.knots, np.eye(len(ours.knots)), bc_type="natural")
    for found, derivative, at in ((ours.value, 0, x), (ours.slope, 1, x), (ours.bend, 2, ours.knots)):
        np.testing.assert_allclose(found, natural(at, derivative), rtol=1e-12, atol=1e-12 * np.abs(found).max())


def test_two_snapshots_a_step_apart_late_in_a_run_do_not_disturb_the_curve():
    rng = np.random.default_rng(0)
    steps = np.unique(np.geomspace(1, 1e7, 60).round())
    llc = 50 * np.tanh(log_steps(steps) - 8) + rng.normal(0, 0.5, len(steps))
    alone = smooth(log_steps(steps), llc)
    doubled = smooth(log_steps(np.append(steps, steps[-1] + 1)), np.append(llc, llc[-1] + 0.4))
    np.testing.assert_allclose(doubled.value[:-1], alone.value, atol=0.5)
    assert np.median(doubled.noise) == pytest.approx(np.median(alone.noise), rel=0.5)


def test_points_bunched_far_from_the_first():
    curve = smooth(log_steps(np.array([1, 10**15, 10**15 + 1, 10**15 + 2, 10**15 + 3])), np.array([0.0, 5, 5, 5, 5]))
    assert np.isfinite(curve.value).all()
    np.testing.assert_allclose(curve.value, [0, 5, 5, 5, 5], atol=1e-6)


def test_noise_that_grows_along_the_series_is_seen_to():
    x = np.linspace(0, 8, 200)
    sizes = np.where(x < 4, 0.1, 1.0)
    ratios = []
    for seed in range(20):
        curve = smooth(x, np.sin(x) * 5 + sizes * np.random.default_rng(seed).normal(size=200))
        ratios.append(np.median(curve.noise[120:]) / np.median(curve.noise[:80]))
    assert 3 < np.median(ratios) < 15


def test_an_outlier_hardly_moves_the_curve():
    x = np.linspace(0, 8, 60)
    y = 5 * np.tanh(x - 4) + np.random.default_rng(0).normal(0, 0.2, 60)
    off = y.copy()
    off[40] += 6
    assert abs(smooth(x, off).value[40] - smooth(x, y).value[40]) < 0.3


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_the_noise_of_neighbours_is_told_from_the_curve(correlation):
    x = np.linspace(0, 8, 200)
    seen = []
    for seed in range(20):
        noise = np.random.default_rng(seed).normal(size=200)
        for i in range(1, 200):
            noise[i] = correlation * noise[i - 1] + np.sqrt(1 - correlation**2) * noise[i]
        seen.append(smooth(x, 30 * np.tanh(3 * (x - 4)) + noise, WITNESSED.shape).correlation)
    assert np.median(seen) == pytest.approx(correlation, abs=0.2)


def test_the_curve_of_each_doubt_is_the_one_that_it_has_by_itself():
    x = np.linspace(0, 8, 60)
    noise = correlated(np.random.default_rng(3), 60, 0.6)[:, 0]
    doubts = [*ALONE, *WITNESSED]
    for curve, doubt in zip(smooth_with_each(x, 5 * np.tanh(x - 4) + noise, doubts), doubts, strict=True):
        alone = smooth(x, 5 * np.tanh(x - 4) + noise, doubt)
        np.testing.assert_array_equal(curve.value, alone.value)
        np.testing.assert_array_equal(curve.value_root, alone.value_root)


def test_more_doubt_takes_more_for_noise_that_neighbours_share():
    x = np.linspace(0, 8, 60)
    changes = []
    for seed in range(40):
        wander = correlated(np.random.default_rng(seed), 60, 0.9)[:, 0]
        changes.append([np.ptp(curve.value) for curve in smooth_with_each(x, wander, WITNESSED)])
    by_shape, by_signs = np.mean(changes, axis=0)
    assert by_signs < 0.9 * by_shape


@pytest.mark.parametrize("start", [[10**16], [0, 10**16], [1], [0], [10**16, 10**18]])
def test_time_stamps_that_a_float_cannot_tell_apart_are_in_order(start):
    steps = np.array([*start, *(1_700_000_000_000_000_000 + 10 * np.arange(12))])
    x = log_steps(steps)
    assert (np.diff(x) >= 0).all()
    curve = smooth(x, np.linspace(0, 1, len(x)))
    assert np.isfinite(curve.value).all()
    assert np.isfinite(curve.noise).all()
