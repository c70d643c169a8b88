"""How long chains are for an error, against the error that such chains have."""

import numpy as np
import pytest

from phasewatch.monitor.estimates.uncertainty import standard_error
from phasewatch.monitor.probing.lengths import FEWEST_DRAWS, cheapest, student

COUNTS = 4, 6, 8, 12


def means(chains, draws, seed=0):
    """Of independent draws of variance 4 around 50."""
    return np.random.default_rng(seed).normal(50, 2 / np.sqrt(draws), chains)


def test_the_error_that_is_asked_for_comes_out():
    chains, draws = cheapest(means(200, 100), draws=100, burn_in=30, error=0.1, counts=COUNTS)
    errors = [standard_error(means(chains, draws, seed)) for seed in range(1, 400)]
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(0.1, rel=0.1)


def test_no_other_number_of_chains_is_cheaper():
    seen, variance = means(200, 100), 4.0
    for burn_in in (0, 20, 500):
        chains, draws = cheapest(seen, draws=100, burn_in=burn_in, error=0.05, counts=COUNTS)
        costs = {c: c * (burn_in + variance * student(c) ** 2 / (c * 0.05**2)) for c in COUNTS}
        assert chains * (burn_in + draws) == pytest.approx(min(costs.values()), rel=0.15)
        assert chains == min(costs, key=costs.__getitem__)


def test_there_are_draws_enough_to_judge_by():
    assert cheapest((1.0, 1.0, 1.0, 1.0), draws=100, burn_in=5, error=0.1, counts=COUNTS) == (4, FEWEST_DRAWS)
