from dataclasses import replace

import numpy as np

from phasewatch.monitor.trajectories.smoothing import smooth
from phasewatch.monitor.trajectories.stages import stages


def anything_large(curve, least):
    return lambda start, end: bool(abs(curve.value[end] - curve.value[start]) > least)


def found(curve, least):
    """The stages whose change is large, cut at slow-downs of three standard errors."""

    def surely(weights):
        return abs(weights @ curve.value) > 3 * np.linalg.norm(weights @ curve.value_root)

    return stages(curve, anything_large(curve, least), surely)


def test_rise_plateau_fall_leaves_the_plateau_to_neither():
    x = np.linspace(0, 20, 201)
    y = 100 * np.clip(x - 2, 0, 3) / 3 - 60 * np.clip(x - 14, 0, 2) / 2
    curve = smooth(x, y + np.random.default_rng(0).normal(0, 0.5, 201))
    up, down = found(curve, 5)
    np.testing.assert_allclose(x[[up.start, up.end, down.start, down.end]], [2, 5, 14, 16], atol=0.8)


def test_a_slow_down_between_two_rises_is_a_milestone():
    x = np.linspace(0, 20, 120)
    y = 40 / (1 + np.exp(-2 * (x - 5))) + 60 / (1 + np.exp(-2 * (x - 13)))
    curve = smooth(x, y + np.random.default_rng(0).normal(0, 0.4, 120))
    first, second = found(curve, 5)
    assert x[first.start] < 4 < 6 < x[first.end] <= x[second.start] < 12 < 14 < x[second.end]


def test_one_smooth_rise_is_not_split():
    x = np.linspace(0, 20, 60)
    for seed in range(30):
        y = 100 / (1 + np.exp(-(x - 10))) + np.random.default_rng(seed).normal(0, 1, 60)
        curve = smooth(x, y)
        assert len(found(curve, 5)) == 1


def test_small_wiggles_are_absorbed_by_the_stage_around_them():
    x = np.linspace(0, 10, 101)
    curve = smooth(x, 10 * x + 8 * np.sin(4 * x))
    assert len(found(curve, 8)) > 1
    (only,) = found(curve, 60)
    assert only.start < 5
    assert only.end > 95


def test_a_weak_stage_at_either_end_is_dropped_not_joined():
    x = np.linspace(0, 10, 101)
    y = 1.5 * np.clip(2 - x, 0, 2) + 10 * np.clip(x - 2, 0, 6) - 1.5 * np.clip(x - 8, 0, 2)
    curve = smooth(x, y)
    (only,) = found(curve, 10)
    np.testing.assert_allclose(x[[only.start, only.end]], [2, 8], atol=0.3)


def test_an_interval_is_as_wide_as_the_milestone_moves_when_drawn_again():
    x = np.linspace(0, 10, 80)
    truth = 20 - (x - 5) ** 2
    tops, covered, widths = [], [], []
    for seed in range(60):
        curve = smooth(x, truth + np.random.default_rng(seed).normal(0, 1, 80))
        up, down = found(curve, 5)
        tops.append(x[up.end])
        low, high = x[list(up.end_interval)]
        covered.append(low <= 5 <= high)
        widths.append(high - low)
        assert up.end_interval[0] <= up.end <= up.end_interval[1]
        assert down.start_interval[0] <= down.start <= down.start_interval[1]
    assert np.mean(covered) > 0.85
    assert np.median(widths) < 8 * np.std(tops)


def test_a_stage_that_may_be_two_has_an_interval_that_reaches_to_where_its_larger_part_would_begin_or_end():
    x = np.linspace(0, 20, 120)
    for first, second in [(40, 60), (60, 40)]:
        y = first / (1 + np.exp(-1.2 * (x - 6))) + second / (1 + np.exp(-1.2 * (x - 13)))
        curve = smooth(x, y + np.random.default_rng(0).normal(0, 0.4, 120))
        slowest = 40 + int(np.argmin(curve.slope[40:70]))
        (only,) = stages(curve, anything_large(curve, 5), surely=lambda weights: False)
        assert only.start_interval[0] <= only.start < 30
        assert 90 < only.end <= only.end_interval[1]
        assert (only.start_interval[1] >= slowest) == (first < second)
        assert (only.end_interval[0] <= slowest) == (first > second)


def test_the_boundary_of_two_stages_that_may_be_one_has_intervals_that_reach_over_both():
    x = np.linspace(0, 20, 120)
    y = 40 / (1 + np.exp(-1.5 * (x - 5))) + 60 / (1 + np.exp(-1.5 * (x - 12)))
    known = smooth(x, y + np.random.default_rng(0).normal(0, 0.4, 120))
    barely = replace(known, slope_root=30 * known.slope_root)  # the same curve, but a slow-down may be chance
    for curve, is_certain in [(known, True), (barely, False)]:
        first, second = stages(curve, anything_large(curve, 5), surely=lambda weights: True)
        assert (first.end_interval[1] < second.end_interval[0]) == is_certain
        assert (first.start_interval[1] < second.start_interval[0]) == is_certain
        assert (first.end_interval[1] == second.end_interval[1]) == (not is_certain)
        assert (second.start_interval[0] == first.start_interval[0]) == (not is_certain)
