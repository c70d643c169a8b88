"""The figures of the cost table, where they are known."""

import numpy as np
import pytest
from scipy.signal import lfilter


@pytest.fixture
def cost(script):
    return script("cost_of_a_point")


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.8])
def test_draws_that_are_worth_an_independent_one(cost, phi):
    noise = np.random.default_rng(0).standard_normal((8, 4000))
    draws = np.asarray(lfilter([1.0], [1.0, -phi], noise, axis=1))
    assert cost.correlated(draws) == pytest.approx((1 + phi) / (1 - phi), rel=0.15)


def test_gradients_of_independent_draws(cost):
    """A deviation of a tenth of λ̂ needs 25 draws for an error of 2 %, and Student's factor more; settled at once."""
    trace = np.random.default_rng(0).normal(50, 5, (64, 400))
    found = cost.row("independent", cost.Way("independent", 64), trace, 1.0)
    assert found["heat / λ̂"] == "2.0%"
    assert found["settled"] == 5
    assert 25 + 2 * 5 < found["gradients for 2 %"] < 3 * 25 + 10 * 5
