"""The update against hand and quadratic truths, where its mean, its step-size bias and its acceptance are known."""

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor
from torch.distributions import Normal

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.sgld import SGLD, chain_seed, metropolis_acceptance, run_chains, sgld_step


def doubles(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@dataclass
class Quadratic:
    """L(w) = ½ Σ h·(w − centre)² + what the minibatch adds: a shift of the loss and, if `tilt`, of its gradient."""

    curvatures: Tensor
    centre: Tensor
    tilt: float = 0.0
    calls: list[Tensor] = field(default_factory=list)

    def losses(self, weights: Tensor, batches: list[Any]) -> Tensor:
        away = weights - self.centre
        shift = torch.stack(batches).to(weights)
        return (self.curvatures * away.square()).sum(-1) / 2 + shift + self.tilt * shift * away.sum(-1)

    def losses_and_grads(self, weights: Tensor, batches: list[Any]) -> tuple[Tensor, Tensor]:
        self.calls.append(weights)
        shift = torch.stack(batches).to(weights).unsqueeze(-1)
        return self.losses(weights, batches), self.curvatures * (weights - self.centre) + self.tilt * shift


def full_batch(generator: Generator) -> Tensor:
    return torch.tensor(0.75)


def shifted(generator: Generator) -> Tensor:
    return torch.randn((), generator=generator, dtype=torch.float64)


# The step


def test_step_by_hand():
    stepped = sgld_step(
        doubles([1.5, -2.0], [4.0, 0.5]),
        doubles(0.5, 3.0),
        doubles([0.7, -1.3], [-2.0, 0.3]),
        doubles([0.4, -2.2], [1.5, -0.5]),
        nbeta=3.0,
        gamma=5.0,
        eps=0.16,
    )
    # 1.5 − 0.08·(3·0.7 + 5·1) + 0.4·0.4, and so on
    torch.testing.assert_close(stepped, doubles([1.092, -0.568], [3.68, 1.228]), rtol=1e-12, atol=0)


def test_step_takes_an_anchor_for_each_chain():
    w, grads, noise = doubles([1.5], [1.5]), doubles([0.7], [0.7]), doubles([0.4], [0.4])
    stepped = sgld_step(w, doubles([0.5], [-0.5]), grads, noise, nbeta=3.0, gamma=5.0, eps=0.16)
    torch.testing.assert_close(stepped, doubles([1.092], [0.692]), rtol=1e-12, atol=0)


# The stationary mean, with its step-size bias


@pytest.mark.parametrize("kappa", [0.3, 1.0, 2.0])
def test_stationary_excess_loss_of_a_quadratic(kappa):
    """E[nβ·(L − L*)] = ½ Σ nβ·h / (a·(1 − ε·a/4)) exactly, a = nβ·h + γ."""
    nbeta, gamma = 40.0, 5.0
    h = torch.logspace(math.log10(0.7), math.log10(5.0), 48, dtype=torch.float64)
    a = nbeta * h + gamma
    eps = kappa / a.max().item()
    truth = (nbeta * h / (a * (1 - eps * a / 4))).sum().item() / 2
    anchor = torch.linspace(-2, 3, 48, dtype=torch.float64)
    sampler = SGLD(
        step_size=eps,
        localization=gamma,
        nbeta=nbeta,
        chains=16,
        draws=round(1200 / math.sqrt(kappa)),
        burn_in=round(200 / kappa),
        batch_size=1,
    )
    chains = run_chains(Quadratic(h, anchor), anchor, full_batch, sampler, seed=3)
    per_chain = nbeta * (chains.losses - chains.reference).mean(axis=1)
    error = per_chain.std(ddof=1) / math.sqrt(sampler.chains)
    assert abs(per_chain.mean() - truth) < 4 * error
    assert error < 0.01 * truth
    unbiased = (nbeta * h / a).sum().item() / 2
    assert (truth - unbiased) / unbiased > 0.03  # so that a sampler without the bias would fail above
    assert truth - unbiased > 4 * error


def test_minibatch_noise_adds_its_known_share():
    """Gradient noise of variance s² makes the stationary variance (1 + ε·nβ²·s²/4) / (a·(1 − ε·a/4))."""
    nbeta, gamma, tilt, h = 30.0, 7.0, 0.5, 2.0
    a = nbeta * h + gamma
    eps = 0.5 / a
    truth = nbeta * h * (1 + eps * (nbeta * tilt) ** 2 / 4) / (a * (1 - eps * a / 4)) / 2
    anchor = doubles(-1.3)
    sampler = SGLD(step_size=eps, localization=gamma, nbeta=nbeta, chains=64, draws=1500, burn_in=100, batch_size=1)
    chains = run_chains(Quadratic(doubles(h), anchor, tilt), anchor, shifted, sampler, seed=5)
    per_chain = nbeta * (chains.losses - chains.reference).mean(axis=1)
    error = per_chain.std(ddof=1) / math.sqrt(sampler.chains)
    assert abs(per_chain.mean() - truth) < 4 * error
    assert error < 0.02 * truth
    assert truth > 1.2 * nbeta * h / (a * (1 - eps * a / 4)) / 2


# The chains against the obvious loop


SMALL = SGLD(step_size=0.01, localization=3.0, nbeta=20.0, chains=3, draws=20, burn_in=7, batch_size=1)


def test_chains_are_the_obvious_loop():
    h, anchor = doubles(0.5, 2.0, 6.0), doubles(1.0, -2.0, 0.3)
    chains = run_chains(Quadratic(h, anchor, tilt=0.4), anchor, shifted, SMALL, seed=11)
    for c in range(SMALL.chains):
        data, noise = (Generator().manual_seed(chain_seed(11, c, purpose)) for purpose in (0, 1))
        w = anchor.clone()
        for step in range(SMALL.burn_in + SMALL.draws):
            shift = torch.randn((), generator=data, dtype=torch.float64)
            away = w - anchor
            loss = (h * away**2).sum() / 2 + shift + 0.4 * shift * away.sum()
            if step >= SMALL.burn_in:
                assert chains.losses[c, step - SMALL.burn_in] == pytest.approx(loss.item(), rel=1e-12)
                assert chains.reference[c, step - SMALL.burn_in] == pytest.approx(shift.item(), rel=1e-12)
            grad = h * away + 0.4 * shift
            z = torch.randn(3, generator=noise, dtype=torch.float64)
            w = w - 0.005 * (20.0 * grad + 3.0 * away) + 0.1 * z


def test_results_are_float64_of_shape_chain_draw_whatever_the_weights():
    anchor = torch.tensor([1.0, -2.0])
    chains = run_chains(Quadratic(torch.tensor([0.5, 2.0]), anchor), anchor, full_batch, SMALL, seed=0)
    assert chains.losses.shape == chains.reference.shape == (3, 20)
    assert chains.losses.dtype == chains.reference.dtype == np.float64
    assert 0 < chains.acceptance <= 1


def test_the_anchor_is_left_as_it_is():
    anchor = doubles(1.0, -2.0)
    run_chains(Quadratic(doubles(0.5, 2.0), anchor.clone()), anchor, full_batch, SMALL, seed=0)
    assert torch.equal(anchor, doubles(1.0, -2.0))


def test_global_randomness_is_neither_used_nor_moved():
    anchor = doubles(1.0, -2.0)
    target = Quadratic(doubles(0.5, 2.0), anchor)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(run_chains(target, anchor, shifted, SMALL, seed=4))
        assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(found[0].losses, found[1].losses)
    assert found[0].acceptance == found[1].acceptance


def test_a_chain_is_the_same_however_many_there_are():
    anchor = doubles(1.0, -2.0)
    target = Quadratic(doubles(0.5, 2.0), anchor, tilt=0.4)
    few, many = (
        run_chains(target, anchor, shifted, SGLD(0.01, 3.0, 20.0, chains, 20, 7, 1), seed=4) for chains in (2, 9)
    )
    np.testing.assert_array_equal(few.losses, many.losses[:2])
    np.testing.assert_array_equal(few.reference, many.reference[:2])


def test_seeds_chains_and_purposes_have_streams_of_their_own():
    seeds = [chain_seed(*key) for key in itertools.product((0, 1, 2**31), range(20), range(3))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


# Common random numbers


def neighbours(seed: int, other_seed: int) -> tuple[np.ndarray, np.ndarray]:
    """λ̂ of each chain at two neighbouring anchors, shape (chain,) each."""
    sampler = SGLD(step_size=2e-3, localization=7.0, nbeta=30.0, chains=16, draws=100, burn_in=50, batch_size=1)
    h = torch.linspace(0.5, 6.0, 12, dtype=torch.float64)
    anchors = torch.zeros(12, dtype=torch.float64), torch.full((12,), 0.01, dtype=torch.float64)
    curvatures = h, 1.01 * h
    return tuple(
        30.0 * (chains.losses - chains.reference).mean(axis=1)
        for chains in (
            run_chains(Quadratic(k, anchor, tilt=0.2), anchor, shifted, sampler, seed=s)
            for k, anchor, s in zip(curvatures, anchors, (seed, other_seed), strict=True)
        )
    )


def test_neighbouring_snapshots_share_noise_and_minibatches():
    level, shared = neighbours(3, 3)
    difference = shared - level
    assert level.std(ddof=1) > 50 * difference.std(ddof=1)
    _, fresh = neighbours(3, 4)
    assert level.std(ddof=1) < 2 * (fresh - level).std(ddof=1)  # so that it is the sharing that does it


# Chains that leave


def test_unstable_steps_leave_nothing_but_nan():
    anchor = torch.tensor([1.0, -2.0])
    target = Quadratic(torch.tensor([0.5, 2.0]), anchor)
    sampler = SGLD(step_size=5.0, localization=0.5, nbeta=20.0, chains=2, draws=500, burn_in=100, batch_size=1)
    chains = run_chains(target, anchor, full_batch, sampler, seed=0)
    assert chains.losses.shape == chains.reference.shape == (2, 500)
    assert np.isnan(chains.losses).all()
    assert np.isnan(chains.reference).all()
    assert math.isnan(chains.acceptance)
    assert len(target.calls) < 100  # it doesn't go on with what can't come back


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("last", range(1, 18))
def test_one_loss_near_the_end_that_is_not_finite(bad, last):
    class Breaks(Quadratic):
        drawn = 0

        def losses_and_grads(self, weights, batches):
            losses, grads = super().losses_and_grads(weights, batches)
            if torch.stack(batches)[1] == bad or torch.stack(batches)[1].isnan():
                losses[1] = bad
            return losses, grads

    def draw(generator):
        return torch.tensor(bad if generator.initial_seed() == second and next(counts) == 27 - last else 0.5)

    second, counts = chain_seed(0, 1, 0), itertools.count()
    anchor = doubles(1.0, -2.0)
    chains = run_chains(Breaks(doubles(0.5, 2.0), anchor), anchor, draw, SMALL, seed=0)
    assert np.isnan(chains.losses).all()
    assert np.isnan(chains.reference).all()
    assert math.isnan(chains.acceptance)


# Acceptance


def by_distributions(w, proposal, anchor, loss, proposal_loss, grads, proposal_grads, *, nbeta, gamma, eps) -> Tensor:
    """Metropolis-Hastings from log densities, chain by chain."""
    found = []
    for c in range(len(w)):

        def log_posterior(at, loss):
            return -nbeta * loss + Normal(anchor, gamma**-0.5).log_prob(at).sum()

        def log_step(to, start, grads):
            force = -nbeta * grads - gamma * (start - anchor)
            return Normal(start + eps / 2 * force, math.sqrt(eps)).log_prob(to).sum()

        ratio = (
            log_posterior(proposal[c], proposal_loss[c])
            - log_posterior(w[c], loss[c])
            + log_step(w[c], proposal[c], proposal_grads[c])
            - log_step(proposal[c], w[c], grads[c])
        )
        found.append(min(1.0, math.exp(min(ratio.item(), 0.0))))
    return doubles(*found)


def mala_case(eps: float, *, chains: int = 200, dtype=torch.float64) -> tuple[list[Tensor], dict[str, float]]:
    """A step of each chain on L = Σ h·w⁴/4 + ½ Σ w²."""
    generator = Generator().manual_seed(2)
    h, anchor = doubles(0.3, 0.6, 0.2), doubles(0.4, -1.1, 1.3)
    steps = {"nbeta": 4.0, "gamma": 3.0, "eps": eps}

    def loss(at):
        return (h * at**4 / 4 + at**2 / 2).sum(-1)

    def grad(at):
        return h * at**3 + at

    w = anchor + 0.5 * torch.randn(chains, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(chains, 3, generator=generator, dtype=torch.float64)
    proposal = sgld_step(w, anchor, grad(w), noise, **steps)
    case = [w, proposal, anchor, loss(w), loss(proposal), grad(w), grad(proposal)]
    return [tensor.to(dtype) for tensor in case], steps


@pytest.mark.parametrize("eps", [0.03, 0.1, 0.2])
def test_acceptance_is_that_of_the_densities(eps):
    case, steps = mala_case(eps)
    found, expected = metropolis_acceptance(*case, **steps), by_distributions(*case, **steps)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-12)
    assert found.shape == (200,)
    assert ((expected > 0.01) & (expected < 0.999)).sum() >= 20  # so that the formula is seen off its limits


def test_acceptance_in_single_precision():
    case, steps = mala_case(0.1)
    single, _ = mala_case(0.1, dtype=torch.float32)
    torch.testing.assert_close(
        metropolis_acceptance(*single, **steps), metropolis_acceptance(*case, **steps), rtol=1e-2, atol=1e-3
    )


def test_acceptance_tends_to_one_for_small_steps_and_to_zero_for_large_ones():
    found = [metropolis_acceptance(*case, **steps).mean().item() for case, steps in map(mala_case, (1e-8, 0.1, 3.0))]
    assert found[0] > 0.999
    assert found[0] > found[1] > found[2]
    assert found[2] < 1e-3


def test_a_step_to_infinite_loss_is_never_accepted():
    case, steps = mala_case(0.1)
    case[4] = torch.full_like(case[4], math.inf)
    assert (metropolis_acceptance(*case, **steps) == 0).all()


def test_steps_accepted_with_that_probability_sample_without_bias():
    """MALA on a Gaussian has variance 1/a exactly, where the bare steps have 1/(a·(1 − ε·a/4))."""
    nbeta, gamma, h, chains = 20.0, 5.0, doubles(2.5), 20_000
    a = nbeta * h.item() + gamma
    steps = {"nbeta": nbeta, "gamma": gamma, "eps": 1.5 / a}
    generator = Generator().manual_seed(9)
    anchor = doubles(0.8)
    w = anchor + torch.randn(chains, 1, generator=generator, dtype=torch.float64) / math.sqrt(a)
    target, batches = Quadratic(h, anchor), [torch.tensor(0.0)] * chains
    for _ in range(20):
        noise = torch.randn(chains, 1, generator=generator, dtype=torch.float64)
        loss, grads = target.losses_and_grads(w, batches)
        proposal = sgld_step(w, anchor, grads, noise, **steps)
        new_loss, new_grads = target.losses_and_grads(proposal, batches)
        probability = metropolis_acceptance(w, proposal, anchor, loss, new_loss, grads, new_grads, **steps)
        accepted = torch.rand(chains, generator=generator, dtype=torch.float64) < probability
        w = torch.where(accepted.unsqueeze(-1), proposal, w)
    squares = a * (w - anchor).square()
    error = squares.std().item() / math.sqrt(chains)
    assert abs(squares.mean().item() - 1) < 4 * error
    assert error < 0.02  # the bare steps are off by 0.6


# Settings


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("step_size", v) for v in (0, 0.0, -1e-4, math.nan, math.inf, -math.inf, "3", None, True, [1e-4], 1j)),
        *(("nbeta", v) for v in (0, -3.0, math.nan, math.inf, "66.7", False)),
        *(("localization", v) for v in (-0.1, math.nan, math.inf, "1", True, None)),
        *(("chains", v) for v in (1, 0, -4, 4.0, 2.5, "4", True, math.nan, None)),
        *(("draws", v) for v in (0, 3, -1, 100.0, "100", True)),
        *(("burn_in", v) for v in (-1, 50.0, "50", False, None)),
        *(("batch_size", v) for v in (0, -64, 64.0, "64", True)),
    ],
)
def test_settings_that_make_no_sense(field, value):
    with pytest.raises(PhasewatchError) as caught:
        SGLD(**{field: value})
    assert str(caught.value).startswith(f"SGLD({field}={value!r}) must be a")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"step_size": math.nan}, r"SGLD\(step_size=nan\) must be a finite number above 0\.$"),
        ({"localization": -1}, r"SGLD\(localization=-1\) must be a finite number of at least 0\.$"),
        ({"draws": 0}, r"SGLD\(draws=0\) must be a whole number of at least 4\.$"),
        ({"chains": 1}, r"SGLD\(chains=1\) must be a whole number of at least 2\. One chain has no spread"),
        ({"chains": "3"}, r"SGLD\(chains='3'\) must be a whole number"),
    ],
)
def test_the_sentence_says_what_to_do(settings, sentence):
    with pytest.raises(PhasewatchError, match=sentence):
        SGLD(**settings)


def test_settings_at_their_limits():
    sampler = SGLD(step_size=1, localization=0, nbeta=1, chains=2, draws=4, burn_in=0, batch_size=1)
    assert sampler.as_json() == {
        "step_size": 1, "localization": 0, "nbeta": 1, "chains": 2, "draws": 4, "burn_in": 0, "batch_size": 1,
    }  # fmt: skip


def test_a_loss_that_refuses_what_the_chains_do_is_a_divergence():
    class Refuses(Quadratic):
        def losses_and_grads(self, weights, batches):
            if weights.abs().max() > 10:
                raise ValueError("these are no probabilities")
            return super().losses_and_grads(weights, batches)

    anchor = torch.tensor([1.0, -2.0])
    target = Refuses(torch.tensor([0.5, 2.0]), anchor)
    sampler = SGLD(step_size=0.5, localization=0.0, nbeta=20.0, chains=2, draws=40, burn_in=0, batch_size=1)
    assert np.isnan(run_chains(target, anchor, full_batch, sampler, seed=0).losses).all()


def test_a_loss_that_fails_at_the_anchor_too_is_no_divergence():
    class Broken(Quadratic):
        def losses(self, weights, batches):
            raise ValueError("no such column")

        losses_and_grads = losses

    anchor = torch.tensor([1.0, -2.0])
    with pytest.raises(ValueError, match="no such column"):
        run_chains(Broken(torch.tensor([0.5, 2.0]), anchor), anchor, full_batch, SGLD(), seed=0)


def test_a_pull_that_overshoots_is_refused():
    with pytest.raises(
        PhasewatchError, match=r"SGLD\(step_size=0.05, localization=100\): their product must be below 4"
    ):
        SGLD(step_size=0.05, localization=100)


def test_numbers_of_other_libraries_are_numbers():
    sampler = SGLD(step_size=np.float32(0.5), localization=1, chains=np.int64(3))
    assert (sampler.step_size, sampler.chains) == (0.5, 3)
    assert type(sampler.chains) is int
    assert type(sampler.step_size) is type(sampler.localization) is float
