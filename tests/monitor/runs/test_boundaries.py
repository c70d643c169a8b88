import math
from dataclasses import replace

import numpy as np
import pytest

from phasewatch.monitor.estimates.estimate import Estimate, Health
from phasewatch.monitor.runs.boundaries import how_well_known, share_of_chains
from phasewatch.monitor.runs.coarse_to_fine import Aim
from phasewatch.monitor.trajectories.changes import Change, Transition
from phasewatch.monitor.trajectories.kinds import Kind
from phasewatch.monitor.trajectories.points import Point
from phasewatch.monitor.trajectories.trajectory import Trajectory

STEPS = list(range(100, 1100, 100))


def a_trajectory(chains, steps=STEPS):
    return Trajectory(
        Point(step, 2.0, Estimate(float(np.mean(row)), 1.0, tuple(map(float, row)), 1.0, 1.0, 100.0, Health.OK))
        for step, row in zip(steps, chains, strict=True)
    )


def a_transition(start_interval=(200, 400), end_interval=(700, 800), confidence=0.9999, error=1.0):
    changes = {"llc": Change(10.0, 50.0, error, "up"), "loss": Change(3.0, 2.0, 0.1, "down")}
    return Transition(Kind.A, "llc", 300, 800, start_interval, end_interval, confidence, False, changes)


def test_each_boundary_has_a_sentence_that_says_what_would_help():
    points = a_trajectory(np.ones((7, 4)), [100, 200, 400, 600, 700, 800, 1000])
    lines = how_well_known(points, [a_transition()], STEPS, Aim(within=1.2))
    assert lines == [
        "7 of 10 snapshots are measured.",
        "A starts at step 300, between 200 and 400 (a factor of 2): 1 of the snapshots there is not measured, "
        "and would help.",
        "A ends at step 800, between 700 and 800 (a factor of 1.1): as well known as asked.",
    ]


@pytest.mark.parametrize(
    ("start_interval", "end_interval", "starts", "ends"),
    [
        ((200, 400), (700, 800), "only snapshots saved more often", "only snapshots saved more often"),
        ((0, 400), (700, 1000), "earlier ones would help", "a longer training would tell"),
    ],
)
def test_where_all_is_measured_other_snapshots_would_help(start_interval, end_interval, starts, ends):
    points = a_trajectory(np.ones((10, 4)))
    lines = how_well_known(points, [a_transition(start_interval, end_interval)], STEPS, Aim())
    assert starts in lines[1]
    assert ends in lines[2]
    assert "inf" not in lines[1]


@pytest.mark.parametrize(
    ("wander", "measured", "help_"),
    [
        (3.0, STEPS, "longer chains would help"),
        (0.0, STEPS, "snapshots saved more often would help"),
        (0.0, STEPS[::3], "more of its snapshots would help"),
    ],
)
def test_a_doubtful_sign_is_helped_by_what_limits_it(wander, measured, help_):
    directions = np.array([-1.0, 1.0, -1.0, 1.0])
    chains = np.outer(measured, wander * directions / 500) + 10
    points = a_trajectory(chains, measured)
    lines = how_well_known(points, [a_transition(confidence=0.97, error=2.0)], STEPS, Aim())
    assert lines[-1].startswith("A from step 300 has its sign with 97.0 %: ")
    assert help_ in lines[-1]


def test_the_share_of_the_chains_is_that_of_their_variance():
    rng = np.random.default_rng(0)
    chains = rng.normal(size=(10, 5))
    ends = [chains[1:4].mean(axis=0), chains[6:9].mean(axis=0)]
    variance = np.var(ends[1] - ends[0], ddof=1) / 5
    for error in (1.0, 3.0):
        share = share_of_chains(a_trajectory(chains), a_transition(error=error))
        assert share == pytest.approx(min(1.0, variance / error**2))
    alone = Trajectory(replace(p, llc=replace(p.llc, per_chain=())) for p in a_trajectory(chains))
    assert share_of_chains(alone, a_transition()) == 0
    assert share_of_chains(a_trajectory(chains), a_transition(error=math.nan)) == 0
