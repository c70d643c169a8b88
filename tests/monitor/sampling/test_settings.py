"""The update against hand and quadratic truths, where its mean, its step-size bias and its acceptance are known."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from quadratic import Quadratic
from torch import Generator, Tensor
from torch.distributions import Normal

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.sampling.settings import SGLD, metropolis_acceptance, sgld_step


def doubles(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


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
    target, batches = Quadratic(h, anchor), torch.zeros(chains, dtype=torch.int64)
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
        *(("step_size", v) for v in (0, 0.0, -1e-4, math.nan, math.inf, -math.inf, "3", True, [1e-4], 1j)),
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
        "method": "langevin", "kappa": None, "momentum": 0.0, "backend": "vectorised",
    }  # fmt: skip


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


def test_a_step_is_given_once():
    assert SGLD().resolved().step_size == 1e-4
    assert SGLD(kappa=0.5).resolved().step_size is None
    assert replace(SGLD(), kappa=0.5) == SGLD(kappa=0.5)
    with pytest.raises(PhasewatchError, match=r"SGLD\(step_size=0.001, kappa=0.5\) says twice"):
        SGLD(step_size=1e-3, kappa=0.5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "hmc"}, r"SGLD\(method='hmc'\) must be one of 'langevin', 'sgld', 'mala'\."),
        ({"backend": "jax"}, r"SGLD\(backend='jax'\) must be one of 'vectorised', 'devinterp'\."),
        ({"momentum": 1.0}, r"SGLD\(momentum=1, method='langevin'\) must be below 1, and 0 with any method but"),
        ({"momentum": 0.5, "method": "sgld"}, r"SGLD\(momentum=0.5, method='sgld'\) must be below 1, and 0 with"),
        ({"kappa": 4}, r"SGLD\(kappa=4\) must be below 4"),
        ({"kappa": 0}, r"SGLD\(kappa=0\) must be a finite number above 0\."),
        (
            {"method": "mala"},
            r"SGLD\(method='mala', batch_size=64\) would accept and reject by a minibatch's loss",
        ),
        ({"backend": "devinterp"}, r"SGLD\(backend='devinterp'\) samples by method='sgld'"),
    ],
)
def test_methods_that_cant_be(settings, words):
    with pytest.raises(PhasewatchError, match=words):
        SGLD(**settings)


def test_momentum_is_for_all_of_the_data():
    assert SGLD().resolved().momentum == 0
    assert SGLD(batch_size=None).resolved().momentum == 0.95
    assert SGLD(batch_size=None, method="sgld").resolved().momentum == 0
    assert replace(SGLD(batch_size=None), batch_size=64).resolved().momentum == 0
    assert SGLD().as_json() == SGLD(step_size=1e-4, momentum=0).as_json()
