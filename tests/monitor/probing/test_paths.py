"""Chains that run stacked and chains that run in place, of real models and of losses in mixed precision."""

from functools import cache

import numpy as np
import pytest
import torch
from torch import Generator, nn
from torch.nn import functional as F

import phasewatch as pw
from phasewatch.monitor.estimates.estimate import Health
from phasewatch.monitor.model.isolation import measuring
from phasewatch.monitor.model.loss import ModelLoss
from phasewatch.monitor.model.minibatches import Batches
from phasewatch.monitor.model.on_batches import LossOnBatches
from phasewatch.monitor.model.weights import SampledModel
from phasewatch.monitor.sampling.chains import run_chains
from phasewatch.monitor.sampling.settings import SGLD, Langevin
from phasewatch.toy_tasks import attention_only, in_context_regression, induction

paths = pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "in place"])


def repeats() -> tuple[ModelLoss, Batches]:
    """Two layers of attention on sequences with repeated patterns."""
    data = induction.InductionData()
    model = attention_only.make_model(width=16)
    return ModelLoss(SampledModel(model), attention_only.loss), Batches([data(seeded(i), 4) for i in range(5)])


def regression() -> tuple[ModelLoss, Batches]:
    """A transformer that regresses in its context."""
    data = in_context_regression.RegressionData(4, examples=4)
    model = in_context_regression.RegressionTransformer(examples=4, width=16, heads=2)
    return ModelLoss(SampledModel(model), in_context_regression.loss), Batches([data(seeded(i), 8) for i in range(5)])


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "sampler",
    [
        SGLD(1e-4, 100.0, 50.0, chains=2, draws=12, burn_in=5),
        Langevin(1e-4, 100.0, 50.0, chains=2, draws=12, burn_in=5),
        Langevin(1e-4, 100.0, 50.0, chains=2, draws=12, burn_in=5, momentum=0.7),
        Langevin(None, 100.0, 50.0, chains=2, draws=12, burn_in=5, kappa=0.3),
    ],
    ids=["SGLD", "Langevin", "momentum", "kappa"],
)
@pytest.mark.parametrize("make", [repeats, regression])
def test_a_transformers_chains_have_the_same_losses_by_both_paths(make, sampler):
    with measuring(0, torch.device("cpu"), threads=1, precision=None):
        model_loss, batches = make()
        model_loss.choose_path(batches)
        assert model_loss.vectorised
        assert model_loss.model.dtype is torch.float32
        found = []
        for stacked in (True, False):
            model_loss.vectorised = stacked
            (chains,) = run_chains(LossOnBatches(model_loss, batches), [model_loss.model.weights()], sampler, 3)
            found.append(chains)
    stacked, in_place = found
    np.testing.assert_allclose(in_place.losses, stacked.losses, rtol=1e-5)
    np.testing.assert_allclose(in_place.reference, stacked.reference, rtol=1e-5)
    moved = np.abs(stacked.losses - stacked.reference)
    assert np.median(moved) > 1e-3 * stacked.losses.max()  # far more than what the two may be apart


# Mixed precision


X = torch.randn(512, 5, 6, generator=seeded(0))
Y = X[:, -1, :3].argmax(-1)
MIXED = {"step_size": 1e-4, "localization": 100.0, "nbeta": 100.0, "chains": 12, "draws": 100, "burn_in": 50}


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0])[:, -1], batch[1])


def rounded(model, batch):
    """As in a training loop that uses autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        return cross_entropy(model, batch)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    with measuring(0, torch.device("cpu"), threads=1, precision=None):
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(100):
            optimizer.zero_grad()
            cross_entropy(model, (X, Y)).backward()
            optimizer.step()
    return model


def estimate(model, loss, sampler, *, stacked, **more):
    probe = pw.Probe(model, loss, (X, Y), sampler=sampler, threads=1, **more)
    probe.subject.loss.vectorised = stacked
    return probe(pw.Snapshot.of(model, 1)).llc


@cache
def in_single(model, sampler, *, stacked):
    """What both mixed ones are compared with."""
    return estimate(model, cross_entropy, sampler, stacked=stacked)


@paths
@pytest.mark.parametrize("sampler", [SGLD(**MIXED), Langevin(**MIXED)], ids=["SGLD", "Langevin"])
@pytest.mark.parametrize(
    ("loss", "autocast"), [(rounded, None), (cross_entropy, torch.bfloat16)], ids=["in the loss", "of the probe"]
)
def test_chains_in_mixed_precision_move_as_those_in_single(trained, loss, autocast, sampler, stacked):
    found = estimate(trained, loss, sampler, stacked=stacked, autocast=autocast)
    single = in_single(trained, sampler, stacked=stacked)
    assert found.health is not Health.DIVERGED
    assert min(abs(chain) for chain in found.per_chain) > 0
    assert found.value != single.value
    assert abs(found.value - single.value) < 0.1 * abs(single.value) + single.error
    assert single.error < 0.2 * abs(single.value)


@paths
def test_a_surrounding_autocast_is_none_of_the_measurements_business(trained, stacked):
    sampler = SGLD(**MIXED | {"chains": 2, "draws": 10, "burn_in": 5})
    alone = estimate(trained, cross_entropy, sampler, stacked=stacked)
    with torch.autocast("cpu", torch.bfloat16):
        trained(X[:2])  # leaves its weights in the cache
        assert estimate(trained, cross_entropy, sampler, stacked=stacked) == alone
        assert estimate(trained, rounded, sampler, stacked=stacked) != alone
    assert estimate(trained, rounded, sampler, stacked=stacked).value != 0


@pytest.mark.slow
def test_a_second_opinion_in_mixed_precision_moves_too(trained):
    snapshot = pw.Snapshot.of(trained, 1)
    for loss, autocast in ((rounded, None), (cross_entropy, torch.bfloat16)):
        probe = pw.Probe(trained, loss, (X, Y), sampler=SGLD(**MIXED), threads=1, autocast=autocast)
        found, own = pw.second_opinion(probe, snapshot), probe(snapshot).llc
        assert min(abs(chain) for chain in found.per_chain) > 0
        assert abs(found.value - own.value) < 0.1 * abs(own.value) + own.error
