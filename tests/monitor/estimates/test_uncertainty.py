"""The error of an estimate and of a difference: by hand, by how often it covers, and in real sampling."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from regression import half_squared_error
from scipy.signal import lfilter
from torch import nn

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.estimates.difference import Difference, difference
from phasewatch.monitor.estimates.estimate import Estimate, Health
from phasewatch.monitor.estimates.uncertainty import standard_error
from phasewatch.monitor.probing.llc import estimate_llc
from phasewatch.monitor.sampling.settings import Langevin


def estimate(*per_chain: float, nbeta: float = 66.7) -> Estimate:
    value = float(np.mean(per_chain))
    return Estimate(value, standard_error(per_chain), per_chain, nbeta, 1.0, 400.0, Health.OK)


def ar1(noise: np.ndarray, phi: float) -> np.ndarray:
    """Stationary AR(1) of unit variance along the last axis, driven by standard normal noise."""
    noise = np.concatenate([noise[..., :1], noise[..., 1:] * math.sqrt(1 - phi**2)], axis=-1)
    return lfilter([1.0], [1.0, -phi], noise, axis=-1)


# By hand


def test_the_error_of_three_chains_by_hand():
    assert standard_error([4.0, 6.0, 11.0]) == pytest.approx(math.sqrt(13 / 3) * 4.302653 / 2, rel=1e-6)


def test_the_error_of_two_chains_is_wide():
    assert standard_error([1.0, 2.0]) == pytest.approx(12.7062 / 4, rel=1e-5)


def test_one_chain_has_no_error():
    assert math.isnan(standard_error([3.0]))
    assert math.isnan(standard_error([]))


def test_the_difference_is_taken_chain_by_chain():
    found = difference(estimate(5.0, 17.0, 12.0), estimate(1.0, 12.0, 9.0))
    assert found.value == pytest.approx(4.0)
    assert found.error == pytest.approx(1 / math.sqrt(3) * 4.302653 / 2, rel=1e-6)  # of 4, 5 and 3


def test_what_all_chains_share_is_known_exactly():
    later, earlier = estimate(11.0, 32.0), estimate(1.0, 22.0)
    assert difference(later, earlier) == Difference(10.0, 0.0)
    assert difference(earlier, later) == Difference(-10.0, 0.0)
    assert later.error > 60


def test_a_failed_estimate_has_a_difference_of_nan():
    failed = replace(estimate(1.0, 2.0), value=math.nan, per_chain=(math.nan, math.nan))
    found = difference(failed, estimate(1.0, 2.0))
    assert math.isnan(found.value)
    assert math.isnan(found.error)


def test_estimates_from_a_csv_know_no_nbeta_and_compare():
    assert difference(estimate(3.0, 4.0, nbeta=math.nan), estimate(1.0, 2.0)).value == 2.0


@pytest.mark.parametrize(
    ("later", "earlier", "complaint"),
    [
        (
            estimate(1.0, 2.0),
            estimate(1.0, 2.0, nbeta=100.0),
            r"at nβ 66\.7 and 100, .* measure both with one sampler\.",
        ),
        (estimate(1.0, 2.0), estimate(1.0, 2.0, 3.0), "of 2 and 3 chains"),
        (estimate(1.0), estimate(2.0), "of 1 and 1 chains; .* two or more in per_chain"),
        (replace(estimate(1.0, 2.0), per_chain=()), estimate(1.0, 2.0), "of 0 and 2 chains"),
    ],
)
def test_what_cannot_be_compared_is_refused(later, earlier, complaint):
    with pytest.raises(PhasewatchError, match=rf"difference\(later, earlier\) got estimates {complaint}"):
        difference(later, earlier)


# How often it covers


@pytest.mark.parametrize("chains", [2, 3, 4, 10])
@pytest.mark.parametrize("phi", [0.0, 0.9, 0.99, 0.999])
def test_level_and_difference_cover_whatever_the_correlation(chains, phi):
    seeds, draws = 2000, 60
    noise, own = np.random.default_rng(chains).standard_normal((2, seeds, chains, draws))
    transient = 30 * np.exp(-np.arange(draws) / 20)
    earlier = ar1(noise, phi) + transient
    later = 1.2 * ar1(noise, 1 - 1.1 * (1 - phi)) + 0.1 * own + 2 * transient
    coverage_error = math.sqrt(0.95 * 0.05 / seeds)
    assert coverage_error < 0.005
    levels = [estimate(*means) for means in earlier.mean(axis=2)]
    changes = [difference(estimate(*means), level) for means, level in zip(later.mean(axis=2), levels, strict=True)]
    for found, truth in ((levels, transient.mean()), (changes, transient.mean())):
        covered = np.mean([abs(e.value - truth) <= 2 * e.error for e in found])
        assert abs(covered - 0.95) < 4 * coverage_error
    assert np.mean([e.error for e in changes]) < 0.7 * np.mean([e.error for e in levels])


# Real sampling


D, N, GROUPS, CHAINS = 20, 256, 200, 4


def test_level_and_difference_of_two_checkpoints_cover():
    """Chains depend on the seed and their own number alone, so 200 groups of four stand for 200 seeds."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator) * torch.logspace(0, -1, D)
    y = x @ torch.randn(D, 1, generator=generator) + 0.5 * torch.randn(N, 1, generator=generator)
    best = torch.linalg.lstsq(x, y).solution.T
    sampler = Langevin(
        step_size=0.02, localization=1, nbeta=30, chains=GROUPS * CHAINS, draws=24, burn_in=8, batch_size=16
    )

    def at(weights: torch.Tensor) -> np.ndarray:
        model = nn.Linear(D, 1, bias=False)
        with torch.no_grad():
            model.weight.copy_(weights)
        found = estimate_llc(model, half_squared_error, (x, y), sampler=sampler, seed=3)
        return np.reshape(found.per_chain, (GROUPS, CHAINS))

    later = [estimate(*chains) for chains in at(best)]
    earlier = [estimate(*chains) for chains in at(0.97 * best)]
    changes = [difference(*pair) for pair in zip(later, earlier, strict=True)]
    for found in (later, earlier, changes):
        mean = np.mean([e.value for e in found])
        covered = np.mean([abs(e.value - mean) <= 2 * e.error for e in found])
        assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / GROUPS)
    assert np.mean([e.error for e in changes]) < 0.3 * np.mean([e.error for e in later])
