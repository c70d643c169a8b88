"""Whether chains agree, against chains whose wander is known."""

import numpy as np
import pytest
from scipy import stats

from phasewatch.monitor.trajectories.chain_tests import p_value_of_a_rise, variance_of_a_change


def walks(seed, chains, places=5, scale=3.0):
    """Chains that take independent steps, and start anywhere: the variance of their change is (places − 1) · scale²."""
    rng = np.random.default_rng(seed)
    return 50 * rng.normal(size=chains) + np.cumsum(scale * rng.normal(size=(places, chains)), axis=0)


def test_two_places_give_the_variance_of_the_differences():
    along = walks(0, 6, places=2)
    variance, freedom = variance_of_a_change(along)
    assert variance == pytest.approx(np.var(along[1] - along[0], ddof=1))
    assert freedom == pytest.approx(5)


@pytest.mark.parametrize("places", [2, 3, 5])
@pytest.mark.parametrize("chains", [2, 4, 10])
def test_the_variance_of_chains_that_take_independent_steps(places, chains):
    found = np.array([variance_of_a_change(walks(seed, chains, places))[0] for seed in range(2000)]) / (
        (places - 1) * 9.0
    )
    error = found.std() / np.sqrt(len(found))
    assert error < 0.04
    assert abs(found.mean() - 1) < 4 * error + 0.05  # weighing by degrees of freedom that depend on the data costs this


def test_more_places_know_it_better():
    spread = [
        np.std([variance_of_a_change(walks(seed, 4, places))[0] / (places - 1) for seed in range(500)])
        for places in (2, 3, 5)
    ]
    assert spread[2] < spread[1] < spread[0]


def test_what_all_chains_share_is_no_variance_of_a_change():
    along = walks(1, 5) + 100 * np.random.default_rng(2).normal(size=(5, 1))
    assert variance_of_a_change(along)[0] == pytest.approx(variance_of_a_change(walks(1, 5))[0])
    assert variance_of_a_change(np.ones((5, 3)))[0] == 0


def test_by_default_it_is_student_s_t_or_the_ranks_whichever_is_surer():
    differences = np.array([1.0, 2.0, 0.5, 1.5, 3.0, 0.7])
    expected = min(
        stats.ttest_1samp(differences, 0, alternative="greater").pvalue,
        stats.wilcoxon(differences, alternative="greater", method="exact").pvalue,
    )
    assert p_value_of_a_rise(differences) == pytest.approx(expected)


def test_a_known_variance_takes_the_place_of_the_differences_own():
    differences = np.array([1.0, 2.0, 0.5, 1.5])
    found = p_value_of_a_rise(differences, variance=0.25, freedom=11.0)
    assert found == pytest.approx(stats.t.sf(differences.mean() / np.sqrt(0.25 / 4), 11))
    assert p_value_of_a_rise(differences, variance=1e9, freedom=11.0) == 1 / 16  # the ranks': all four rose
