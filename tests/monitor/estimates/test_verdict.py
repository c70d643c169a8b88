"""Series whose mean, correlation time and fate are known."""

import math
import warnings

import numpy as np
import pytest
from scipy.signal import lfilter

from phasewatch.monitor.estimates.checks import Checks
from phasewatch.monitor.estimates.estimate import Estimate, Health
from phasewatch.monitor.estimates.uncertainty import standard_error
from phasewatch.monitor.estimates.verdict import drift, estimate_from_losses, mixing, verdict

NBETA = 66.7


def ar1(seed: int, *, phi: float, chains: int = 4, draws: int = 400, mean: float = 0.0, sd: float = 1.0) -> np.ndarray:
    """Stationary AR(1) chains, shape (chain, draw)."""
    noise = np.random.default_rng(seed).standard_normal((chains, draws + 400)) * math.sqrt(1 - phi**2)
    return mean + sd * lfilter([1.0], [1.0, -phi], noise, axis=1)[:, 400:]


def estimate(paired: np.ndarray, parameters: int = 100) -> Estimate:
    """The estimate of chains whose paired losses, in units of λ̂, are given."""
    reference = np.random.default_rng(7).uniform(1.5, 2.5, paired.shape)
    return estimate_from_losses(reference + paired / NBETA, reference, nbeta=NBETA, parameters=parameters)


def test_value_and_chains_by_hand():
    losses = np.array([[2.0, 2.5, 2.25, 2.25], [3.0, 3.5, 3.25, 3.25]])
    reference = np.array([[1.5, 1.5, 2.0, 2.0], [2.0, 3.0, 3.0, 3.0]])
    found = estimate_from_losses(losses, reference, nbeta=8.0, parameters=10)
    assert found.per_chain == (4.0, 4.0)
    assert found.value == 4.0
    assert found.nbeta == 8.0


def test_value_and_error_of_many_draws():
    paired = ar1(0, phi=0.0, chains=200, draws=100, mean=10.0, sd=3.0)
    found = estimate(paired)
    assert found.error == pytest.approx(3.0 / math.sqrt(20_000), rel=0.15)  # the chains' own spread is known to 5 %
    assert found.value == pytest.approx(paired.mean(), rel=1e-12)
    assert found.per_chain == pytest.approx(paired.mean(axis=1), rel=1e-12)
    assert found.error == standard_error(found.per_chain)  # test_uncertainty.py has its coverage


@pytest.mark.parametrize("phi", [-0.3, 0.0, 0.5, 0.9])
def test_effective_draws_of_an_autoregression(phi):
    draws, seeds = 4000, 8
    found = np.array([mixing(ar1(seed, phi=phi, draws=draws)) for seed in range(seeds)])
    truth = 4 * draws * (1 - phi) / (1 + phi)
    error = found[:, 1].std(ddof=1) / math.sqrt(seeds)
    assert abs(found[:, 1].mean() - truth) < 4 * error + 0.02 * truth
    assert error < 0.05 * truth
    assert found[:, 0].max() < 1.05


def test_rhat_of_separated_chains_is_the_share_of_variance_between_them():
    levels = np.array([-3.0, -1.0, 1.0, 3.0])
    paired = ar1(1, phi=0.0, draws=20_000) + levels[:, None]
    rhat, ess = mixing(paired)
    between = np.var(np.repeat(levels, 2), ddof=1)  # of the eight halves
    assert rhat == pytest.approx(math.sqrt(1 + between), rel=0.01)
    assert ess < 20


def test_rhat_sees_a_trend_that_all_chains_share():
    paired = ar1(2, phi=0.0, draws=2000) + np.linspace(-6, 6, 2000)
    rhat, _ = mixing(paired)
    halves = np.var([-3.0, 3.0] * 4, ddof=1)
    within = 1 + 36 / 12  # noise, and a line of length 6
    assert rhat == pytest.approx(math.sqrt(1 + halves / within), rel=0.02)


@pytest.mark.parametrize("level", [0.0, 3.0])
def test_chains_that_do_not_move_carry_one_draw_each(level):
    assert mixing(np.full((3, 50), level)) == (1.0, 3.0)


def test_chains_that_do_not_move_agree_in_one_place_only():
    assert mixing(np.repeat([[0.0], [1.0], [2.0], [3.0]], 50, axis=1)) == (math.inf, 4.0)


def test_chains_that_stand_at_different_places_have_the_error_of_their_places():
    found = estimate_from_losses(
        np.repeat([[1.0], [2.0], [3.0]], 50, axis=1), np.zeros((3, 50)), nbeta=1.0, parameters=10
    )
    assert found.value == 2.0
    assert found.error == pytest.approx(1.0 / math.sqrt(3) * 4.302653 / 2)  # Student's t for 2 degrees of freedom


def test_the_fewest_draws_that_a_sampler_may_take_have_numbers():
    paired = ar1(3, phi=0.0, chains=2, draws=4, mean=5.0)
    found = estimate(paired)
    assert math.isfinite(found.error)
    assert math.isfinite(found.rhat)
    assert found.ess >= 1


def test_drift_by_hand():
    paired = np.array([[1.0, 3.0, 4.0, 6.0], [2.0, 4.0, 7.0, 9.0]])
    change, error = drift(paired)
    assert change == 4.0  # 3 and 5
    assert error == pytest.approx(math.sqrt(2) / math.sqrt(2))


def test_drift_of_an_odd_number_of_draws_uses_all_of_them():
    assert drift(np.array([[0.0, 3.0, 6.0], [0.0, 3.0, 6.0]]))[0] == 4.5


# Planted cases


def planted(case: str) -> np.ndarray:
    if case == "flat":
        return ar1(4, phi=0.0, draws=100, mean=10.0, sd=2.0)
    if case == "correlated":
        return ar1(4, phi=0.8, draws=200, mean=10.0, sd=2.0)
    if case == "trend":
        return ar1(4, phi=0.3, draws=100, sd=2.0) + np.linspace(0, 20, 100)
    if case == "falling":
        return ar1(4, phi=0.3, draws=100, sd=2.0) + np.linspace(20, 5, 100)
    if case == "burning in":
        return ar1(4, phi=0.3, draws=100, sd=1.0) + 20 * (1 - np.exp(-np.arange(100) / 50))
    if case == "separated":
        return ar1(4, phi=0.0, draws=100) + np.array([[5.0], [10.0], [15.0], [20.0]])
    if case == "one apart":
        return ar1(4, phi=0.0, draws=100, mean=10.0) + np.array([[0.0], [0.0], [0.0], [8.0]])
    return ar1(4, phi=0.0, draws=100, mean=-5.0, sd=2.0)


@pytest.mark.parametrize(
    ("case", "health"),
    [
        ("flat", Health.OK),
        ("correlated", Health.OK),
        ("trend", Health.DRIFTING),
        ("falling", Health.DRIFTING),
        ("burning in", Health.DRIFTING),
        ("separated", Health.UNMIXED),
        ("one apart", Health.UNMIXED),
        ("below zero", Health.NEGATIVE),
    ],
)
@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_planted_cases_are_called_by_their_name(case, health, scale):
    found = estimate(scale * planted(case), parameters=1000)
    assert found.health is health
    assert bool(found.trace) is (health is not Health.OK)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e34])
@pytest.mark.parametrize("where", ["losses", "reference", "both"])
def test_one_value_out_of_this_world_is_a_divergence(bad, where):
    losses, reference = planted("flat") / NBETA, np.zeros((4, 100))
    if where in {"losses", "both"}:
        losses[2, 60] = bad
    if where in {"reference", "both"}:
        reference[2, 60] = -bad if abs(bad) == 1e34 else bad
    if where == "both" and abs(bad) == 1e34:
        reference[2, 60] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = estimate_from_losses(losses, reference, nbeta=NBETA, parameters=100)
    assert found.health is Health.DIVERGED
    assert math.isnan(found.value)
    assert math.isnan(found.error)
    assert len(found.per_chain) == 4
    assert all(math.isnan(chain) for chain in found.per_chain)
    assert found.trace == ()


def test_more_than_there_can_be_at_a_minimum_is_a_divergence():
    paired = ar1(5, phi=0.0, draws=100, sd=0.1)
    assert estimate(paired + 9.0, parameters=10).health is Health.OK
    assert estimate(paired + 11.0, parameters=10).health is Health.DIVERGED


def test_the_trace_of_a_doubtful_estimate_is_the_chains_thinned():
    paired = np.arange(4)[:, None] * 10.0 + np.sin(np.arange(250.0))
    found = estimate(paired)
    assert found.health is Health.UNMIXED
    assert len(found.trace) == 4
    assert {len(chain) for chain in found.trace} == {84}  # every third
    np.testing.assert_allclose(found.trace, paired[:, ::3], rtol=1e-9, atol=1e-9)


# How often the verdict is wrong


def test_directions_on_their_way_from_the_snapshot_are_seen():
    """54 of 60 directions go a third of their relaxation time: λ̂ has a fifth of its level, with a small error."""
    phi, missed = 1 - 0.3 / 500 / 2, 0
    for seed in range(100):
        noise = np.random.default_rng(seed).standard_normal((4, 60, 500))
        noise[:, :54] = lfilter([1.0], [1.0, -phi], noise[:, :54] * math.sqrt(1 - phi**2), axis=2)
        paired = (noise**2).sum(axis=1) / 2
        missed += verdict(paired, 0.1, mixing(paired)[0]) is Health.OK
    assert missed <= 2


@pytest.mark.parametrize(("phi", "draws"), [(0.0, 60), (0.0, 200), (0.9, 100), (0.9, 400)])
@pytest.mark.parametrize("mean", [0.0, 1.0, 30.0])
def test_stationary_chains_are_seldom_accused(phi, draws, mean):
    seeds = 200
    accused = {health: 0 for health in Health}
    for seed in range(seeds):
        paired = ar1(1000 + seed, phi=phi, draws=draws, mean=mean, sd=5.0)
        rhat, ess = mixing(paired)
        accused[verdict(paired, paired.std(ddof=1) / math.sqrt(ess), rhat)] += 1
    assert accused[Health.DRIFTING] <= 0.02 * seeds
    assert accused[Health.UNMIXED] <= 0.04 * seeds
    assert accused[Health.NEGATIVE] <= 0.06 * seeds


@pytest.mark.parametrize("chains", [2, 3, 10])
def test_a_drift_is_seldom_found_by_few_chains_that_have_none(chains):
    seeds = 300
    series = [ar1(5000 + seed, phi=0.5, chains=chains, draws=60, sd=5.0) for seed in range(seeds)]
    verdicts = [verdict(paired, error=math.inf, rhat=1.0) for paired in series]
    assert verdicts.count(Health.DRIFTING) <= 0.02 * seeds


# Each verdict from its check, and from nothing less


@pytest.mark.parametrize(
    ("checks", "health"),
    [
        (Checks(), Health.OK),
        (Checks(below=0.03), Health.NEGATIVE),
        (Checks(below=0.01), Health.OK),
        (Checks(descent=1.5, descent_error=0.1), Health.OFF_MINIMUM),
        (Checks(descent=1.5, descent_error=0.3), Health.OK),
        (Checks(drop=1.2, drop_error=0.05), Health.OFF_MINIMUM),
        (Checks(drop=1.2, drop_error=0.2), Health.OK),
        (Checks(drop=-5.0, drop_error=0.1), Health.OK),
        (Checks(kappa=2.6), Health.OVERSTEPPING),
        (Checks(kappa=2.4), Health.OK),
        (Checks(overshoot=0.7, overshoot_error=0.1), Health.OVERSTEPPING),
        (Checks(overshoot=0.7, overshoot_error=0.3), Health.OK),
        (Checks(noise=0.7, noise_error=0.1), Health.NOISY),
        (Checks(noise=0.7, noise_error=0.3), Health.OK),
        (Checks(unsettled=0.06, kappa=0.01), Health.CREEPING),
        (Checks(unsettled=0.06, kappa=0.5), Health.DRIFTING),
        (Checks(unsettled=0.04), Health.OK),
        (Checks(held=0.1, held_error=0.01), Health.LOCALIZED),
        (Checks(held=0.1, held_error=0.08), Health.OK),
        (Checks(held=0.04, held_error=0.0), Health.OK),
        (Checks(short=0.07), Health.SHORT),
        (Checks(short=0.04), Health.OK),
        (Checks(short=0.07, held=0.1, held_error=0.01), Health.LOCALIZED),
        (Checks(kappa=0.01), Health.OK),
    ],
)
def test_each_check_has_its_verdict(checks, health):
    paired = ar1(6, phi=0.0, mean=10.0, sd=2.0)
    assert verdict(paired, error=0.1, rhat=1.0, checks=checks) is health


@pytest.mark.parametrize("case", ["trend", "separated"])
def test_chains_of_tiny_steps_that_have_not_settled_are_called_creeping(case):
    paired = planted(case)
    rhat, _ = mixing(paired)
    assert verdict(paired, 1.0, rhat, checks=Checks(kappa=0.01)) is Health.CREEPING
    assert verdict(paired, 1.0, rhat, checks=Checks(kappa=0.5)) in {Health.DRIFTING, Health.UNMIXED}
