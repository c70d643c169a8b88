import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from phasewatch import Kind, Trajectory


@pytest.fixture
def cheap(script):
    return script("cheap_monitor")


def test_points_are_a_tenth_of_the_step_apart_or_nine_thousand(cheap, script):
    every = script("regression_stages").published_steps()
    taken = sorted(cheap.thinned(every))
    assert set(taken) < every
    assert taken[0] == 0
    for before, after in pairwise(taken):
        assert after >= 1.1 * before or after - before >= 9_000
        assert all(step < 1.1 * before and step - before < 9_000 for step in every if before < step < after)


def test_it_stays_within_a_tenth_of_training(cheap):
    given = cheap.options("", cheap.EXPERIMENT, seeds=1, arguments=[])
    (run,) = cheap.runs(given)
    own = cheap.SAMPLER.chains * (cheap.SAMPLER.burn_in + cheap.SAMPLER.draws) * cheap.SAMPLER.batch_size
    least = len(run.at.steps) * own / (500_000 * 256)
    assert least < cheap.share_of_training(run) < 0.1


def test_equal_neighbours_are_one(cheap):
    stages = [(Kind.A, 1, 10), (Kind.A, 10, 100), (Kind.B, 120, 200), (Kind.A, 200, 300)]
    found = [SimpleNamespace(kind=kind, start=start, end=end) for kind, start, end in stages]
    assert cheap.as_one(found) == [("A", 1, 100), ("B", 120, 200), ("A", 200, 300)]


def test_how_far_boundaries_are_apart(cheap):
    expected = [("A", 1, 100), ("B", 120, 200)]
    assert cheap.factor_apart([("A", 50, 110), ("B", 60, 900)], expected) == pytest.approx(2)
    assert cheap.factor_apart(expected, expected) == 1
    assert math.isnan(cheap.factor_apart([("B", 1, 100), ("A", 120, 200)], expected))
    assert math.isnan(cheap.factor_apart(expected[:1], expected))


def test_fewer_chains_of_the_full_measurement_are_less_sure(cheap, script):
    points = Trajectory.read(script("campaign").RESULTS / "points" / cheap.FULL / "seed-0.jsonl")
    some = cheap.of_chains(points, 3)
    assert [point.llc.per_chain for point in some] == [point.llc.per_chain[:3] for point in points]
    last = some[-1].llc
    assert last.value == pytest.approx(sum(last.per_chain) / 3)
    rows = cheap.rows_of_fewer({"seed-0": points})
    assert [row["seed-0"] for row in rows if row["chains"] == 5] == ["A A B B A"] * 3
    assert all(row["seed-0"] != "A A B B A" for row in rows if row["chains"] == 2)


def test_noise_is_added_to_each_chain_of_each_point(cheap, script):
    points = list(Trajectory.read(script("campaign").RESULTS / "points" / cheap.FULL / "seed-0.jsonl"))[-40:]
    added = np.subtract(
        [point.llc.per_chain for point in cheap.noisier(points, 0.5, seed=3)], [point.llc.per_chain for point in points]
    )
    assert added.std() == pytest.approx(0.5, rel=0.2)
    assert abs(np.corrcoef(added.T)[np.triu_indices(5, 1)]).max() < 0.6
    assert [point.llc for point in cheap.noisier(points, 0.0, seed=3)] == [point.llc for point in points]
