import numpy as np
import pytest
from scipy.special import expit

from phasewatch import PhasewatchError, emergence

COMPUTE = np.geomspace(1e18, 1e21, 20)
LATER = np.geomspace(3e21, 1e23, 5)


def ladder(compute, seed=0):
    """Bits by a power law, and an accuracy that follows them, with a run's noise on both."""
    rng = np.random.default_rng(seed)
    bits = 0.5 + 1.3 * (compute / 1e18) ** -0.17
    accuracy = 0.25 + 0.75 * np.exp(-0.9 * bits**2.2)
    return accuracy + 0.005 * rng.normal(size=len(compute)), bits + 0.005 * rng.normal(size=len(compute)), accuracy


def test_the_forecast_of_a_ladder_is_near_and_its_intervals_grow_and_cover():
    errors, inside, widths = [], [], []
    _, _, truth = ladder(LATER)
    for seed in range(6):
        sharp, smooth, _ = ladder(COMPUTE, seed)
        found = emergence.forecast(COMPUTE, sharp, smooth, at=LATER, chance=0.25)
        errors.append(np.abs(found.mean - truth).mean())
        inside.append((found.low <= truth) & (truth <= found.high))
        widths.append(found.high - found.low)
    assert np.mean(errors) < 0.025
    assert 0.8 <= np.mean(inside)
    assert (np.diff(np.mean(widths, axis=0)) > 0).all()
    assert np.mean(widths) / 2 < 0.1


def test_a_loss_that_falls_is_an_axis_too():
    sharp, smooth, _ = ladder(COMPUTE)
    loss = 2 + 2 * (COMPUTE / 1e18) ** -0.1
    found = emergence.forecast(loss, sharp, smooth, at=[2 + 2 * 1e5**-0.1], chance=0.25)
    assert 0.3 < found.mean[0] < 1


def test_the_same_points_are_less_sure_along_a_loss():
    loss = np.linspace(4, 3, 12)
    sharp, smooth = 0.25 + 0.2 * (4 - loss) ** 2, loss / 3
    along_loss, along_steps = (
        emergence.forecast(x, sharp, smooth, at=at, chance=0.25)
        for x, at in ((loss, [2.5, 1.5]), (5 - loss, [2.5, 3.5]))
    )
    np.testing.assert_allclose(along_loss.mean, along_steps.mean, rtol=1e-9)
    more = ((along_loss.high - along_loss.low) / 2 / 1.645) ** 2 - (
        (along_steps.high - along_steps.low) / 2 / 1.645
    ) ** 2
    np.testing.assert_allclose(more, (0.06**2 - 0.03**2) * np.array([0.5, 1.5]) ** 2, rtol=1e-6)


def test_several_runs_at_one_x_need_their_names():
    sharp, smooth, _ = ladder(np.repeat(COMPUTE[:10], 2))
    x = np.repeat(COMPUTE[:10], 2)
    with pytest.raises(PhasewatchError, match=r"has 1e\+18 twice.*pass series="):
        emergence.forecast(x, sharp, smooth, at=[1e22], chance=0.25)
    shuffled = np.random.default_rng(0).permutation(20)
    names = [f"run {i % 2}" for i in range(20)]
    one = emergence.forecast(x, sharp, smooth, at=[1e22], chance=0.25, series=names)
    other = emergence.forecast(
        x[shuffled], sharp[shuffled], smooth[shuffled], at=[1e22], chance=0.25, series=[names[i] for i in shuffled]
    )
    assert one.mean[0] == pytest.approx(other.mean[0], abs=0.02)


def test_between_the_points_it_follows_them():
    step = np.geomspace(100, 100_000, 60)
    jump = 0.25 + 0.6 * expit((np.log(step) - np.log(8000)) / 0.1)
    found = emergence.forecast(step, jump, -np.log(step), at=[1000, 8000, 60_000], chance=0.25)
    np.testing.assert_allclose(found.mean, [0.25, 0.55, 0.85], atol=0.05)
    leaves = np.exp(np.log(8000) + 0.1 * np.log(0.125 / (1 - 0.125)))  # 0.25 + 0.6 q = 0.325 at q = 0.125
    assert found.onset.low <= leaves <= found.onset.high
    assert found.onset.median == pytest.approx(leaves, rel=0.1)


def test_an_onset_on_a_falling_axis_lies_at_a_loss():
    loss = np.linspace(4, 2, 50)
    sharp = np.where(loss < 2.5, 0.25 + 1.2 * (2.5 - loss), 0.25)
    found = emergence.forecast(loss, sharp, -loss, at=[1.9], chance=0.25)
    assert found.onset.median == pytest.approx(2.5 - 0.075 / 1.2, abs=0.05)
    assert found.onset.high <= found.onset.median <= found.onset.low
    assert "leaves chance (0.25)" in str(found)


def test_a_score_that_stays_at_chance_has_no_onset_within_reach():
    rng = np.random.default_rng(0)
    flat = 0.25 + 0.005 * rng.normal(size=30)
    found = emergence.forecast(
        np.geomspace(1, 1000, 30), flat, -3 + 0.001 * rng.normal(size=30), at=[2000], chance=0.25
    )
    assert found.onset is None or found.onset.median > 1000
    assert found.low[0] <= 0.25 <= found.high[0]


def test_what_other_benchmarks_tell_is_used_where_x_has_columns():
    rng = np.random.default_rng(0)
    ability = np.sort(rng.uniform(-2, 3, 60))
    columns = 0.4 + 0.1 * ability[:, None] * [0.8, 1.0, 1.2] + 0.01 * rng.normal(size=(60, 3))
    columns[5, 1] = np.nan
    truth = expit(1.5 * ability - 3)
    found = emergence.forecast(columns[:40], truth[:40], at=columns[40:], chance=0.0)
    assert np.abs(found.mean - truth[40:]).mean() < 0.5 * (truth[40:] - truth[39]).mean()
    assert np.mean((found.low <= truth[40:]) & (truth[40:] <= found.high)) > 0.6


def test_a_retrodiction_compares_with_naive_rules():
    compute = np.concatenate([COMPUTE, LATER])
    sharp, smooth, _ = ladder(compute)
    found = emergence.retrodict(compute, sharp, smooth, cut=COMPUTE[-1], chance=0.25)
    assert found.error < 0.03 < found.naive_error
    assert found.coverage >= 0.6
    assert found.error == pytest.approx(np.abs(found.forecast.mean - sharp[20:]).mean())
    assert "off by" in str(found)


def test_bad_input_is_a_sentence():
    sharp, smooth, _ = ladder(COMPUTE)

    def ask(x=COMPUTE, sharp=sharp, smooth=smooth, at=LATER, chance=0.25, **other):
        return emergence.forecast(x, sharp, smooth, at=at, chance=chance, **other)

    with pytest.raises(PhasewatchError, match="chance isn't given"):
        ask(chance=None)
    with pytest.raises(PhasewatchError, match="has 1 point, and this takes at least 6"):
        ask(COMPUTE[:1], sharp[:1], smooth[:1])
    with pytest.raises(PhasewatchError, match=r"first rises and then goes from .* Sort the points"):
        ask(np.concatenate([COMPUTE[:10], COMPUTE[:9:-1]]))
    with pytest.raises(PhasewatchError, match="all items are right from the start"):
        ask(sharp=np.ones(20))
    with pytest.raises(PhasewatchError, match=r"forecast\(smooth=...\) must have the shape \(20,\)"):
        ask(smooth=smooth[:5])
    with pytest.raises(PhasewatchError, match=r"chance=1.5\) must be a finite number"):
        ask(chance=1.5)
    with pytest.raises(PhasewatchError, match="leaves 2 points up to the cut"):
        emergence.retrodict(COMPUTE, sharp, smooth, cut=COMPUTE[1], chance=0.25)


def test_a_negative_place_on_an_axis_of_steps_is_a_sentence():
    step = np.geomspace(100, 10_000, 12)
    with pytest.raises(PhasewatchError, match="has -5, and x is never negative"):
        emergence.forecast(step, np.linspace(0.3, 0.6, 12), at=[-5], chance=0.25)


def test_few_points_on_one_curve_are_not_sure_of_what_is_far():
    loss = np.linspace(3.2, 2.8, 8)
    bits = 0.4 + 0.8 * (loss - 2)
    accuracy = 0.25 + 0.75 * np.exp(-2 * bits)
    found = emergence.forecast(loss, accuracy, bits, at=[2.6, 2.4], chance=0.25)  # half a span on, and a whole one
    half = (found.high - found.low) / 2
    assert half[1] > 1.645 * 0.03
    assert half[0] < half[1] < 0.12
    truth = 0.25 + 0.75 * np.exp(-2 * (0.4 + 0.8 * (np.array([2.6, 2.4]) - 2)))
    assert ((found.low < truth) & (truth < found.high)).all()
