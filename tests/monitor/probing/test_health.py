"""Planted failures are named, and good runs are left in peace; experiments/health.py does it on more of both."""

import pytest
import torch
from regression import half_squared_error
from torch import nn

import phasewatch as pw

DATA = tuple[torch.Tensor, torch.Tensor]
GOOD = {"kappa": 0.5, "nbeta": 1e4, "localization": 1.0, "batch_size": None, "burn_in": 100, "draws": 150}
# The largest curvature is near 1, or a little more with 512 samples.
LONG = {name: value for name, value in GOOD.items() if name != "kappa"} | {"step_size": 1.5e-4}
MINIBATCHES = GOOD | {"kappa": 0.2, "nbeta": 64.0, "localization": 0.1, "batch_size": 32}


def regression(seed: int, *, noise: float = 0.3, low: float = 1.0, shift: float = 0.0) -> tuple[nn.Linear, DATA]:
    """At the minimiser, or `shift` sd at nβ 1e4 from it in the half of the inputs with `low` variance."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.tensor([1.0] * 10 + [low**0.5] * 10, dtype=torch.float64)
    x = torch.randn(512, 20, generator=generator, dtype=torch.float64) * scales
    y = x.sum(1, keepdim=True) + noise * torch.randn(512, 1, generator=generator, dtype=torch.float64)
    model = nn.Linear(20, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y).solution.T)
        model.weight[0, 10:] += 0.01 * shift / scales[10:]
    return model, (x, y)


def health_of(seed: int, settings: dict, **where: float) -> str:
    model, data = regression(seed, **where)
    sampler = (pw.Langevin if "kappa" in settings or "momentum" in settings else pw.SGLD)(**settings)
    return pw.estimate_llc(model, half_squared_error, data, sampler=sampler, seed=seed).health.name


@pytest.mark.parametrize(
    ("settings", "where", "meant"),
    [
        (LONG, {}, "OVERSTEPPING"),
        (GOOD | {"kappa": 3.0}, {}, "OVERSTEPPING"),
        (LONG | {"step_size": 6e-3}, {}, "DIVERGED"),
        (GOOD | {"kappa": 1e-4, "draws": 100}, {}, "CREEPING"),
        (GOOD | {"kappa": 1e-3, "momentum": 0.0, "draws": 100}, {}, "CREEPING"),
        (GOOD | {"burn_in": 0, "draws": 30}, {}, "DRIFTING"),
        (MINIBATCHES | {"kappa": 1e-3}, {}, "CREEPING"),
        (GOOD | {"burn_in": 400}, {"shift": 0.8, "low": 0.03}, "OFF_MINIMUM"),
        (GOOD, {"shift": 0.8}, "OFF_MINIMUM"),
        (GOOD, {"shift": 10.0}, "NEGATIVE"),
        (MINIBATCHES, {"shift": 50.0}, "NEGATIVE"),
        (MINIBATCHES | {"nbeta": 500.0, "batch_size": 16}, {"noise": 1.0}, "NOISY"),
        (GOOD | {"localization": 1e4, "chains": 8}, {}, "LOCALIZED"),
        (GOOD | {"localization": 1e5}, {}, "LOCALIZED"),
    ],
)
def test_a_planted_failure_is_named(settings, where, meant):
    assert [health_of(seed, settings, **where) for seed in range(2)] == [meant] * 2


def test_good_runs_are_left_in_peace():
    found = [health_of(seed, settings) for settings in (GOOD, MINIBATCHES) for seed in range(8)]
    assert found == ["OK"] * 16
