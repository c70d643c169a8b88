"""How long chains are for an error, against the error that such chains have."""

from dataclasses import replace

import numpy as np
import pytest

from phasewatch.monitor.estimates.estimate import Estimate, Health
from phasewatch.monitor.estimates.uncertainty import standard_error
from phasewatch.monitor.probing.calibration import Trial
from phasewatch.monitor.probing.lengths import FEWEST_DRAWS, cheapest, of_chains, of_length, student
from phasewatch.monitor.sampling.chains import gradients_of_a_point
from phasewatch.monitor.sampling.settings import Langevin
from phasewatch.monitor.trajectories.points import Point

COUNTS = 4, 6, 8, 12


def means(chains, draws, seed=0):
    """Of independent draws of variance 4 around 50."""
    return np.random.default_rng(seed).normal(50, 2 / np.sqrt(draws), chains)


def test_the_error_that_is_asked_for_comes_out():
    chains, draws = cheapest(means(200, 100).var(ddof=1), draws=100, burn_in=30, error=0.1, counts=COUNTS)
    errors = [standard_error(means(chains, draws, seed)) for seed in range(1, 400)]
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(0.1, rel=0.1)


def test_no_other_number_of_chains_is_cheaper():
    seen, variance = means(200, 100).var(ddof=1), 4.0
    for burn_in in (0, 20, 500):
        chains, draws = cheapest(seen, draws=100, burn_in=burn_in, error=0.05, counts=COUNTS)
        costs = {c: c * (burn_in + variance * student(c) ** 2 / (c * 0.05**2)) for c in COUNTS}
        assert chains * (burn_in + draws) == pytest.approx(min(costs.values()), rel=0.15)
        assert chains == min(costs, key=costs.__getitem__)


def test_there_are_draws_enough_to_judge_by():
    assert cheapest(0.0, draws=100, burn_in=5, error=0.1, counts=COUNTS) == (4, FEWEST_DRAWS)


def trial(chains=6, draws=50, burn_in=20, deviation=2.0):
    """A setting whose chains' means are so far apart, around 50."""
    per_chain = 50 + deviation * np.random.default_rng(1).standard_normal(chains)
    estimate = Estimate(50.0, 1.0, tuple(per_chain), 100.0, 1.0, 50.0, Health.OK)
    sampler = Langevin(step_size=1e-3, chains=chains, draws=draws, burn_in=burn_in)
    return Trial("first", sampler, (Point(100, 1.0, estimate),), 0)


def cost(sampler):
    return gradients_of_a_point(sampler, sampler.chains * (sampler.burn_in + sampler.draws))


def test_a_smaller_error_takes_more_gradients_until_the_room_is_full():
    costs = [cost(of_length(trial(), room=1500, error=error)) for error in (0.1, 0.03, 0.02, 0.001)]
    assert costs[0] < costs[1] < costs[2] < costs[3]
    assert 0.95 * 1500 < costs[3] <= 1500


def test_a_full_room_is_spent_on_the_number_of_chains_with_the_smallest_error():
    chosen = of_length(trial(), room=1500, error=0.001)
    errors = {}
    for chains in (4, 6, 8, 10, 12, 16):
        draws = max(d for d in range(1, 400) if cost(replace(chosen, chains=chains, draws=max(d, 4))) <= 1500)
        errors[chains] = student(chains) / np.sqrt(chains * draws)
    assert chosen.chains == min(errors, key=errors.__getitem__)


def test_chains_are_added_until_the_error_or_the_room_is_reached():
    given = trial(chains=4, deviation=10.0)
    assert of_chains(given, room=10**6, error=0.5).chains == 4
    assert of_chains(given, room=10**6, error=0.0).chains == 16
    room = cost(replace(given.sampler, chains=8))
    assert of_chains(given, room=room, error=0.0) == replace(given.sampler, chains=8)
