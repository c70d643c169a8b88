"""Long trajectories are searched in means of neighbours."""

import numpy as np
import pytest

from phasewatch import Trajectory, find_transitions
from phasewatch.monitor.errors import LARGEST_STEP, PhasewatchError
from phasewatch.monitor.trajectories import transitions
from phasewatch.monitor.trajectories.columns import MOST_POINTS, Columns
from phasewatch.monitor.trajectories.points import Point, estimate_without_diagnostics


def trajectory(count, chains=3):
    rng = np.random.default_rng(count)
    values = rng.normal(size=(count, chains)) if chains else np.empty((count, 0))
    return Trajectory(
        Point(10 * i, float(i), estimate_without_diagnostics(float(i), None, row), {"a": float(-i)})
        for i, row in enumerate(values.tolist())
    )


def test_up_to_a_thousand_points_stay_as_they_are():
    columns = Columns.of(trajectory(MOST_POINTS), "llc")
    assert columns.shortened() is columns


@pytest.mark.parametrize("count", [1001, 2000, 2999])
def test_more_are_means_of_neighbours(count):
    whole = trajectory(count)
    columns = Columns.of(whole, "a")
    short, size = columns.shortened(), -(-count // MOST_POINTS)
    assert MOST_POINTS / 2 <= len(short) <= MOST_POINTS
    groups = [slice(i, i + size) for i in range(0, count, size)]
    np.testing.assert_allclose(short.values, [columns.values[group].mean() for group in groups])
    np.testing.assert_allclose(short.chains, [columns.chains[group].mean(axis=0) for group in groups], atol=1e-12)
    assert all(step in columns.steps[group] for step, group in zip(short.steps, groups, strict=True))


def test_numbers_near_the_end_of_a_float_have_means():
    big = np.full(5000, 1.5e308)
    columns = Columns.of(Trajectory.from_values(np.arange(5000), loss=big, llc=-big), "llc").shortened()
    np.testing.assert_allclose(columns.values, -big[: len(columns)])


def test_chains_end_where_a_point_has_another_number_of_them():
    points = [*trajectory(10, 3), *(p for p in trajectory(20, 2) if p.step >= 100)]
    columns = Columns.of(Trajectory(points), "llc")
    assert columns.usable_chains is None
    assert columns.first(10).usable_chains.shape == (10, 3)
    assert Columns.of(trajectory(10, 0), "llc").usable_chains is None


def test_a_long_run_has_the_stages_of_a_short_one_in_fits_of_bounded_size(monkeypatch):
    sizes = []
    real = transitions.log_steps
    monkeypatch.setattr(transitions, "log_steps", lambda steps: sizes.append(len(steps)) or real(steps))
    x = np.linspace(0, 1, 6000)
    llc = 100 / (1 + np.exp(-60 * (x - 0.3))) - 40 / (1 + np.exp(-80 * (x - 0.7)))
    llc += np.random.default_rng(0).normal(size=6000)
    run = Trajectory.from_values(np.exp(12 * x).round().cumsum().astype(int), loss=3 - x, llc=llc)
    up, down = find_transitions(run)
    assert max(sizes) <= MOST_POINTS
    assert up.llc_change == pytest.approx(100, abs=5)
    assert down.llc_change == pytest.approx(-40, abs=5)
    assert up.points == np.count_nonzero((run.steps >= up.start) & (run.steps <= up.end))


@pytest.mark.parametrize("step", [2**63, 2**63 + 1, 10**30, 1_700_000_000_000_000_000_000])
def test_a_step_beyond_64_bits_is_refused_in_a_sentence(step):
    with pytest.raises(PhasewatchError, match="a step is a whole number from 0 to"):
        Trajectory([Point(step, 1.0, estimate_without_diagnostics(1.0, None))])


def test_nanoseconds_since_1970_are_steps():
    start = 1_700_000_000_000_000_000
    steps = start + 60_000_000_000 * np.arange(40)
    assert steps[-1] < LARGEST_STEP
    rise = 50 / (1 + np.exp(-(np.arange(40) - 15.0)))
    noise = 0.1 * np.random.default_rng(0).normal(size=40)
    (found,) = find_transitions(Trajectory.from_values(steps.tolist(), loss=60 - rise, llc=rise + noise))
    assert start <= found.start < found.end <= steps[-1]
