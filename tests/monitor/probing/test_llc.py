"""λ̂ of models whose answer is known: in closed form, or by quadrature of the tempered local posterior."""

import math
import random

import numpy as np
import pytest
import torch
from regression import D, N, half_squared_error, regression
from torch import nn

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.estimates.estimate import Health
from phasewatch.monitor.probing.llc import estimate_llc
from phasewatch.monitor.sampling.settings import Langevin


def test_regular_model_has_half_its_parameters():
    model, data = regression()
    h = torch.linalg.eigvalsh(data[0].T @ data[0] / N)
    nbeta, gamma = 2000.0, 1.0
    sampler = Langevin(kappa=0.6, localization=gamma, nbeta=nbeta, chains=20, draws=900, burn_in=200, batch_size=None)
    found = estimate_llc(model, half_squared_error, data, sampler=sampler, seed=1)
    of_the_chain = (nbeta * h / (nbeta * h + gamma)).sum().item() / 2
    assert found.health is Health.OK
    assert abs(found.value - of_the_chain) < 4 * found.error
    assert found.error < 0.015 * D / 2
    assert found.value == pytest.approx(D / 2, rel=0.04)
    assert found.nbeta == nbeta


def test_regular_model_on_minibatches():
    model, data = regression()
    h = torch.linalg.eigvalsh(data[0].T @ data[0] / N)
    nbeta = 50.0
    sampler = Langevin(
        step_size=0.1 / (nbeta * h.max().item()),
        localization=0.5,
        nbeta=nbeta,
        chains=8,
        draws=1500,
        burn_in=300,
        batch_size=64,
    )
    found = estimate_llc(model, half_squared_error, data, sampler=sampler, seed=1)
    assert abs(found.value - D / 2) < 4 * found.error + 0.05 * D / 2  # ε, γ and the minibatches each cost 1 to 3 %
    assert found.error < 0.02 * D / 2


class Products(nn.Module):
    """Pairs (u, v) with the loss ½ Σ u²v², at their most singular point."""

    def __init__(self, pairs: int) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.zeros(pairs, dtype=torch.float64))
        self.v = nn.Parameter(torch.zeros(pairs, dtype=torch.float64))

    def forward(self, x):
        return (x @ (self.u * self.v)).unsqueeze(-1)


def test_degenerate_model_against_quadrature():
    pairs, nbeta, gamma = 48, 300.0, 10.0
    reach = np.linspace(-8, 8, 2001) / math.sqrt(gamma)
    u, v = np.meshgrid(reach, reach)
    loss = u**2 * v**2 / 2
    weight = np.exp(-nbeta * loss - gamma / 2 * (u**2 + v**2))
    truth = pairs * (nbeta * loss * weight).sum() / weight.sum()

    x = math.sqrt(pairs) * torch.eye(pairs, dtype=torch.float64)
    sampler = Langevin(
        step_size=0.01 / gamma, localization=gamma, nbeta=nbeta, chains=8, draws=1500, burn_in=300, batch_size=pairs
    )
    found = estimate_llc(
        Products(pairs), half_squared_error, (x, torch.zeros(pairs, 1, dtype=torch.float64)), sampler=sampler, seed=0
    )
    assert found.health is Health.LOCALIZED  # by quadrature, λ̂ is larger by more than 5 % at a hundredth of γ
    assert abs(found.value - truth) < 4 * found.error
    assert found.error < 0.03 * truth
    assert abs(found.value - pairs / 2) > 10 * found.error  # ½ a pair is the limit of nβ that no finite one reaches


@pytest.mark.parametrize("step_size", [0.01, 0.03])
def test_a_step_too_large_is_a_verdict_and_no_number(step_size):
    model, data = regression()
    found = estimate_llc(
        model, half_squared_error, data, sampler=Langevin(step_size=step_size, nbeta=2000.0, draws=200, batch_size=N)
    )
    assert found.health is Health.DIVERGED
    assert math.isnan(found.value)
    assert math.isnan(found.error)
    assert len(found.per_chain) == 4
    assert all(math.isnan(chain) for chain in found.per_chain)


def test_a_model_far_from_its_minimum_is_below_zero():
    model, data = regression()
    with torch.no_grad():
        model.weight += 3.0
    found = estimate_llc(model, half_squared_error, data, sampler=Langevin(1e-5, 100.0, 100.0, 4, 100, 0, 64))
    assert found.health is Health.NEGATIVE
    assert found.value < 0


def test_the_seed_decides_and_the_model_is_untouched():
    model, data = regression()
    model.train()
    model.weight.grad = torch.ones_like(model.weight)
    before = model.weight.detach().clone()
    sampler = Langevin(1e-4, 10.0, 100.0, 2, 10, 5, 64)
    torch.manual_seed(0), random.seed(0)
    state, python_state = torch.get_rng_state(), random.getstate()
    first = estimate_llc(model, half_squared_error, data, sampler=sampler, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python_state
    torch.rand(3)
    assert estimate_llc(model, half_squared_error, data, sampler=sampler, seed=1) == first
    assert estimate_llc(model, half_squared_error, data, sampler=sampler, seed=2).value != first.value
    assert model.training
    assert torch.equal(model.weight, before)
    assert torch.equal(model.weight.grad, torch.ones_like(before))


def test_misuse_is_a_sentence():
    model, (x, y) = regression()
    with pytest.raises(PhasewatchError, match=r"has 10 samples, fewer than Langevin\(batch_size=64\)"):
        estimate_llc(model, half_squared_error, (x[:10], y[:10]))
