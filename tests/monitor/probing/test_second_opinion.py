"""Chains through devinterp's optimizer against hand, against exact values, against our own, and against its `llc()`."""

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from quadratic import excess_losses, mean_and_error, stationary_mean
from regression import half_squared_error
from regression import regression as linear_regression
from torch import Tensor, nn
from torch.nn import functional as F

import phasewatch as pw
from phasewatch.monitor.errors import PhasewatchError, PhasewatchWarning
from phasewatch.monitor.estimates.estimate import Health
from phasewatch.monitor.estimates.verdict import estimate_from_losses
from phasewatch.monitor.model.isolation import untouched_randomness
from phasewatch.monitor.model.loss import ModelLoss
from phasewatch.monitor.model.minibatches import Batches
from phasewatch.monitor.model.on_batches import LossOnBatches
from phasewatch.monitor.model.weights import SampledModel
from phasewatch.monitor.probing.second_opinion import run_devinterp_chains, second_opinion
from phasewatch.monitor.sampling.chains import Chains, run_chains
from phasewatch.monitor.sampling.random_streams import ChainNoise, minibatch_orders
from phasewatch.monitor.sampling.settings import SGLD
from phasewatch.monitor.sampling.steps import sgld_step
from tests.noise import noise_of_step

CPU = torch.device("cpu")


class Vector(nn.Module):
    """Nothing but two vectors, so that a loss can be any function of them."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.first, self.rest = nn.Parameter(w[:1].clone()), nn.Parameter(w[1:].clone())

    @property
    def w(self) -> Tensor:
        return torch.cat([self.first, self.rest])


CENTRE = torch.tensor([0.3, -1.2, 2.0])
CURVATURES = torch.tensor([0.5, 2.0, 6.0])
START = torch.tensor([1.0, -2.0, 0.3])


def tilted_quadratic(model: Vector, batch: Tensor) -> Tensor:
    away = model.w - CENTRE
    return (CURVATURES * away.square()).sum() / 2 + batch + 0.4 * batch * away.sum()


POOL = list(torch.tensor([0.7, -1.1, 0.2, 1.9]))
SMALL = SGLD(step_size=0.01, localization=3.0, nbeta=20.0, chains=3, draws=20, burn_in=7, batch_size=1)


def of(model: nn.Module, loss: Any) -> ModelLoss:
    return ModelLoss(SampledModel(model), loss)


def vector(loss: Any = tilted_quadratic) -> ModelLoss:
    return of(Vector(START), loss)


def theirs(model_loss: ModelLoss, pool: Sequence[Any], sampler: SGLD, seed: int) -> Chains:
    """The chains that devinterp's optimizer moves."""
    target, anchor = LossOnBatches(model_loss, Batches(pool)), model_loss.model.weights()
    losses, reference = run_devinterp_chains(target, anchor, sampler, seed)
    assert losses.shape == reference.shape == (sampler.chains, sampler.draws)
    assert all(map(torch.equal, model_loss.model.weights(), anchor))
    assert all(parameter.grad is None for parameter in target.parameters)
    return Chains(losses, reference, checks=None)


def ours(model_loss: ModelLoss, pool: Sequence[Any], sampler: SGLD, seed: int, *, stacked: bool) -> Chains:
    model_loss.vectorised, anchor = stacked, model_loss.model.weights()
    (chains,) = run_chains(LossOnBatches(model_loss, Batches(pool)), [anchor], sampler, seed)
    model_loss.model.set(anchor)
    return chains


def verdict(chains: Chains) -> Health:
    return estimate_from_losses(chains.losses, chains.reference, nbeta=20.0, parameters=3).health


paths = pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "in place"])


# Against the obvious loop


def test_chains_are_the_obvious_loop():
    chains = theirs(vector(), POOL, SMALL, seed=11)
    order = minibatch_orders(11, 3, 27, 4, whole=True)
    for c in range(SMALL.chains):
        noise = ChainNoise(11, c, CPU)

        def drawn(noise=noise) -> Tensor:
            return torch.cat(noise_of_step(noise, [START[:1], START[1:]]))

        drawn()  # that of a start, which SGLD has none for
        w = START.clone()
        for step, i in enumerate(order[c].tolist()):
            if step >= SMALL.burn_in:
                there, here = (tilted_quadratic(Vector(at), POOL[i]).item() for at in (w, START))
                assert chains.losses[c, step - SMALL.burn_in] == pytest.approx(there, rel=1e-4)
                assert chains.reference[c, step - SMALL.burn_in] == pytest.approx(here, rel=1e-6)
            grad = CURVATURES * (w - CENTRE) + 0.4 * POOL[i]
            w = w - 0.005 * (20.0 * grad + 3.0 * (w - START)) + 0.1 * drawn()


def test_each_minibatch_has_its_reference_taken_once():
    references = []

    def recorded(model: Vector, batch: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            references.append(batch.item())
        return tilted_quadratic(model, batch)

    theirs(vector(recorded), POOL[:3], SMALL, seed=0)
    assert sorted(references) == sorted(b.item() for b in POOL[:3])


def test_global_randomness_is_neither_used_nor_moved():
    model_loss, found = vector(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(theirs(model_loss, POOL, SMALL, seed=4))
        assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(found[0].losses, found[1].losses)


def test_an_inverse_temperature_of_one_is_taken_without_a_warning():
    sampler = SGLD(step_size=0.01, localization=3.0, nbeta=1.0, chains=2, draws=4, burn_in=0, batch_size=1)
    assert np.isfinite(theirs(vector(), POOL, sampler, seed=0).losses).all()


# Against exact values


def many_quadratics(dtype: torch.dtype) -> tuple[ModelLoss, Tensor]:
    """2,000 curvatures around a centre near 1, with the anchor at the minimum."""
    h = torch.linspace(0.7, 5.0, 2000)
    centre = torch.linspace(0.5, 1.5, 2000).to(dtype).float()

    def loss(model: Vector, batch: Tensor) -> Tensor:
        return (h * (model.w.float() - centre).square()).sum() / 2

    return of(Vector(centre.to(dtype, copy=True)), loss), h


@pytest.mark.parametrize(
    ("dtype", "kappa"), [(torch.float32, 0.3), (torch.float32, 1.5), (torch.float64, 1.5), (torch.bfloat16, 0.3)]
)
def test_stationary_excess_loss_of_a_quadratic(dtype, kappa):
    nbeta, gamma = 400.0, 50.0
    model_loss, h = many_quadratics(dtype)
    eps = kappa / (nbeta * h.max().item() + gamma)
    truth = stationary_mean(h, nbeta=nbeta, gamma=gamma, eps=eps, sgld=True)
    sampler = SGLD(eps, gamma, nbeta, chains=8, draws=100, burn_in=round(50 / kappa), batch_size=1)
    chains = theirs(model_loss, [torch.zeros(())], sampler, seed=3)
    value, error = mean_and_error(excess_losses(chains, nbeta))
    rounding = 0.01 * truth if dtype is torch.bfloat16 else 0  # of the weights that the model itself is called with
    assert abs(value - truth) < 4 * error + rounding
    assert error < 0.005 * truth
    unbiased = stationary_mean(h, nbeta=nbeta, gamma=gamma, eps=eps, sgld=False)
    assert (truth - unbiased) / unbiased > 0.03  # so that a sampler without the bias would fail above


# Against our own chains


def regression() -> tuple[ModelLoss, list[Any]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, 30, generator=generator)
    model = nn.Linear(30, 1)
    y = x @ torch.randn(30, 1, generator=generator) + torch.randn(256, 1, generator=generator)
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(256, 1)], dim=1), y).solution
    with torch.no_grad():
        model.weight.copy_(solution[:-1].mT)
        model.bias.copy_(solution[-1])
    return of(model, half_squared_error), list(zip(x.split(64), y.split(64), strict=True))


def at_its_own_targets(model: nn.Module) -> tuple[ModelLoss, list[Any]]:
    """A network that explains its data exactly, so that it stands at a minimum, regular or not."""
    x = torch.randn(256, 5, generator=torch.Generator().manual_seed(2))
    y = model(x).detach()
    return of(model, half_squared_error), list(zip(x.split(64), y.split(64), strict=True))


def deep_linear() -> tuple[ModelLoss, list[Any]]:
    """Widths (5, 3, 5), true rank 1."""
    model = nn.Sequential(nn.Linear(5, 3, bias=False), nn.Linear(3, 5, bias=False))
    with torch.no_grad():
        for layer in model:
            layer.weight.zero_()
            layer.weight[0, 0] = 1
    return at_its_own_targets(model)


def perceptron() -> tuple[ModelLoss, list[Any]]:
    with untouched_randomness(5):
        return at_its_own_targets(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)))


BOTH = SGLD(step_size=2e-3, localization=5.0, nbeta=60.0, chains=8, draws=150, burn_in=100, batch_size=64)


@paths
@pytest.mark.parametrize(
    "make",
    [pytest.param(regression, marks=pytest.mark.slow), deep_linear, pytest.param(perceptron, marks=pytest.mark.slow)],
)
def test_both_samplers_agree(make, stacked):
    model_loss, pool = make()
    mine = ours(model_loss, pool, BOTH, seed=1, stacked=stacked)
    same = theirs(model_loss, pool, BOTH, seed=1)
    np.testing.assert_allclose(same.losses, mine.losses, rtol=2e-3, atol=1e-6)
    np.testing.assert_allclose(same.reference, mine.reference, rtol=1e-4, atol=1e-9)
    other = theirs(model_loss, pool, BOTH, seed=2)
    (a, a_error), (b, b_error) = (mean_and_error(excess_losses(chains, 60.0)) for chains in (mine, other))
    assert abs(a - b) < 4 * math.hypot(a_error, b_error)
    assert math.hypot(a_error, b_error) < 0.08 * a


@paths
def test_both_samplers_walk_the_same_chain(stacked):
    model_loss, pool = perceptron()
    model_loss = of(model_loss.model.module.double(), half_squared_error)
    pool = [tuple(tensor.double() for tensor in batch) for batch in pool]
    mine = ours(model_loss, pool, BOTH, seed=1, stacked=stacked)
    same = theirs(model_loss, pool, BOTH, seed=1)
    np.testing.assert_allclose(same.losses, mine.losses, rtol=1e-9)
    np.testing.assert_allclose(same.reference, mine.reference, rtol=1e-9, atol=1e-15)
    assert (same.losses[:, -1] > same.reference[:, -1]).all()


# Models that resist vectorising


class Experts(nn.Module):
    """One of three weights, by the sign of the data: a branch that can't be vectorised, and one that is never taken."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ParameterList(torch.tensor([0.5 + i]) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[0 if x.sum() > 0 else 1] * x


def test_control_flow_that_depends_on_the_data():
    x = torch.tensor([[1.0, -0.3], [-0.8, 0.2], [0.5, 0.9], [-0.4, -1.1]])
    pool = [(x, 1.3 * x) for x in x]
    model_loss = of(Experts(), half_squared_error)
    with pytest.warns(PhasewatchWarning, match="Experts can't be vectorised"):
        model_loss.choose_path(Batches(pool[:2]))
    mine, same = ours(model_loss, pool, SMALL, seed=3, stacked=False), theirs(model_loss, pool, SMALL, seed=3)
    np.testing.assert_allclose(same.losses, mine.losses, rtol=1e-4)
    np.testing.assert_allclose(same.reference, mine.reference, rtol=1e-6)


def test_an_expert_that_a_minibatch_leaves_out_is_still_pulled_and_shaken():
    """Its gradient there is zero, and not none at all: devinterp's optimizer would leave it where it is."""
    x = torch.tensor([[1.0], [-1.0]])
    pool = [(x, 0.5 * x) for x in x]
    chains = theirs(of(Experts(), half_squared_error), pool, SMALL, seed=0)
    order, start = minibatch_orders(0, 3, 27, 2, whole=True), torch.tensor([0.5, 1.5, 2.5])
    for c in range(3):
        noise = ChainNoise(0, c, CPU)

        def drawn(noise=noise) -> Tensor:
            return torch.cat(noise_of_step(noise, [start[k : k + 1] for k in range(3)]))

        drawn()
        w = start.clone()
        for step, i in enumerate(order[c].tolist()):
            if step >= SMALL.burn_in:
                assert chains.losses[c, step - SMALL.burn_in] == pytest.approx(
                    float(w[i] - 0.5) ** 2 / 2, rel=1e-4, abs=1e-7
                )
            grad = torch.zeros(3)
            grad[i] = w[i] - 0.5
            w = w - 0.005 * (20.0 * grad + 3.0 * (w - start)) + 0.1 * drawn()


# Chains that leave


def test_unstable_steps_are_a_divergence():
    sampler = SGLD(step_size=5.0, localization=0.5, nbeta=20.0, chains=2, draws=500, burn_in=100, batch_size=1)
    chains = theirs(vector(), POOL, sampler, seed=0)
    assert np.isnan(chains.losses).all()
    assert verdict(chains) is Health.DIVERGED


def test_a_reference_that_is_not_finite_is_a_divergence():
    def endless_at_the_anchor(model: Vector, batch: Tensor) -> Tensor:
        there = tilted_quadratic(model, batch)
        return there / 0 if batch == POOL[3] and torch.equal(model.w, START) else there

    # Each chain takes another minibatch than that from the anchor.
    assert 3 not in minibatch_orders(SEED_AWAY, 3, 27, 4, whole=True)[:, 0]
    chains = theirs(vector(endless_at_the_anchor), POOL, SMALL, seed=SEED_AWAY)
    assert np.isfinite(chains.losses).all()
    assert verdict(chains) is Health.DIVERGED
    assert verdict(theirs(vector(), POOL, SMALL, seed=SEED_AWAY)) is not Health.DIVERGED


SEED_AWAY = next(s for s in range(100) if 3 not in minibatch_orders(s, 3, 27, 4, whole=True)[:, 0])


def test_a_loss_that_refuses_what_the_chains_do_is_a_divergence():
    def refuses(model: Vector, batch: Tensor) -> Tensor:
        if model.w.abs().max() > 10:
            raise ValueError("these are no probabilities")
        return tilted_quadratic(model, batch)

    sampler = SGLD(step_size=0.5, localization=0.0, nbeta=20.0, chains=2, draws=40, burn_in=0, batch_size=1)
    chains = theirs(vector(refuses), POOL, sampler, seed=0)
    assert np.isnan(chains.losses[:, -1]).all()
    assert verdict(chains) is Health.DIVERGED


def test_running_out_of_memory_is_no_divergence():
    def greedy(model: Vector, batch: Tensor) -> Tensor:
        if not torch.equal(model.w, START):
            raise torch.OutOfMemoryError("no memory left")
        return tilted_quadratic(model, batch)

    with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
        theirs(vector(greedy), POOL, SMALL, seed=0)


def test_a_gradient_that_fails_at_the_anchor_too_is_no_divergence():
    def broken(model: Vector, batch: Tensor) -> Tensor:
        return tilted_quadratic(model, batch).detach()

    with pytest.raises(RuntimeError, match="does not require grad"):
        theirs(vector(broken), POOL, SMALL, seed=0)


# Of a probe's snapshot


FULL = SGLD(step_size=2e-4, localization=1.0, nbeta=500.0, chains=4, draws=60, burn_in=30, batch_size=None)


def test_the_second_opinion_of_a_snapshot_is_that_of_the_same_chains():
    model, data = linear_regression()
    probe, snapshot = pw.Probe(model, half_squared_error, data, sampler=FULL, seed=3), pw.Snapshot.of(model, 7)
    with torch.no_grad():
        model.weight.add_(1.0)  # it is the snapshot that counts
    torch.manual_seed(0)
    before = torch.get_rng_state()
    found, own = second_opinion(probe, snapshot), probe(snapshot).llc
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_allclose(found.per_chain, own.per_chain, rtol=1e-9)
    assert (found.value, found.error) == (pytest.approx(own.value, rel=1e-9), pytest.approx(own.error, rel=1e-8))
    assert found.nbeta == own.nbeta
    assert all(math.isnan(check) for check in found.checks)


def test_it_is_of_the_parameters_that_the_probe_samples():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    x = torch.randn(64, 4, dtype=torch.float64)
    data = x, model(x).detach()
    probe, snapshot = (
        pw.Probe(model, half_squared_error, data, sampler=FULL, parts="0"),
        pw.Snapshot.of(model, 0),
    )
    np.testing.assert_allclose(second_opinion(probe, snapshot).per_chain, probe(snapshot).llc.per_chain, rtol=1e-9)


def test_what_it_cannot_do_is_a_sentence(monkeypatch):
    model, data = linear_regression()
    snapshot = pw.Snapshot.of(model, 0)
    heavy = pw.Probe(model, half_squared_error, data, sampler=pw.Langevin(batch_size=None))
    with pytest.raises(
        PhasewatchError, match=r"samples by SGLD, and the probe by Langevin\. .*sampler=pw\.SGLD\(\.\.\.\)"
    ):
        second_opinion(heavy, snapshot)
    mask = torch.zeros(1, 20, dtype=torch.bool)
    mask[0, 3:10] = True
    partial = pw.Probe(model, half_squared_error, data, sampler=FULL, parts={"weight": mask})
    with pytest.raises(
        PhasewatchError, match=r"samples whole parameters, .* only some of their elements\. Give a probe"
    ):
        second_opinion(partial, snapshot)
    monkeypatch.setitem(sys.modules, "devinterp.optim", None)
    monkeypatch.setitem(sys.modules, "devinterp", None)
    with pytest.raises(PhasewatchError, match=r"needs the package devinterp.*pip install 'phasewatch\[devinterp\]'"):
        second_opinion(pw.Probe(model, half_squared_error, data, sampler=FULL), snapshot)


# Against devinterp's own estimate


class Attention(nn.Module):
    """A language model of one attention head over tokens of a vocabulary of 6, shape (sequence, token)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.unembed = nn.Embedding(6, 4), nn.Linear(4, 6)
        self.position = nn.Parameter(torch.randn(7, 4))
        self.qkv = nn.Linear(4, 12, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        future = torch.ones(7, 7, dtype=torch.bool).triu(1)
        return self.unembed(x + (q @ k.mT / 2).masked_fill(future, -math.inf).softmax(-1) @ v)


def next_token(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def trained_language_model() -> tuple[Attention, Tensor]:
    with untouched_randomness(0):
        rows = torch.softmax(2 * torch.randn(6, 6), dim=-1)
        tokens = torch.randint(6, (64, 1))
        for _ in range(6):
            tokens = torch.cat([tokens, torch.multinomial(rows[tokens[:, -1]], 1)], dim=1)
        model = Attention()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(400):
            optimizer.zero_grad()
            next_token(model, tokens).backward()
            optimizer.step()
    model.zero_grad()
    return model, tokens


LANGUAGE = SGLD(step_size=1e-3, localization=20.0, nbeta=100.0, chains=8, draws=100, burn_in=100, batch_size=16)


@pytest.fixture(scope="module")
def by_llc(tmp_path_factory) -> tuple[ModelLoss, list[Tensor], np.ndarray, float]:
    """The loss of a model, its minibatches, and what `llc()` found: the losses of shape (chain, step), and L(w*).

    With everything alike: no dropout, since it samples in training mode, and L(w*) over the minibatches that the
    chains go through in turn.
    """
    from datasets import Dataset
    from devinterp.slt.llc import llc

    model, tokens = trained_language_model()
    with untouched_randomness(0):  # it seeds the global streams
        found = llc(
            model,
            Dataset.from_dict({"input_ids": tokens.tolist()}).with_format("torch"),
            {},
            lr=LANGUAGE.step_size,
            n_beta=LANGUAGE.nbeta,
            localization=LANGUAGE.localization,
            num_chains=LANGUAGE.chains,
            num_draws=LANGUAGE.draws,
            num_burnin_steps=LANGUAGE.burn_in,
            batch_size=LANGUAGE.batch_size,
            num_init_loss_batches=4,
            init_seed=100,
            shuffle=False,
            device="cpu",
            output_path=tmp_path_factory.mktemp("llc") / "samples",
        )
    losses = found.loss_trace.values.astype(float)
    return of(model, next_token), list(tokens.split(16)), losses, found.init_loss.item()


@pytest.mark.slow
def test_llc_itself_takes_our_steps(by_llc):
    """It draws a parameter's noise after another's from the global stream, seeded for each chain."""
    model_loss, pool, found, _ = by_llc
    anchor = model_loss.model.weights()
    w = [weight.unsqueeze(0) for weight in anchor]
    with untouched_randomness(103):
        for step in range(60):
            loss, grads = model_loss.at_rows.rows_and_gradients(w, Batches([pool[step % 4]]))
            assert loss.item() == pytest.approx(found[3, step], rel=1e-4)
            w = [
                sgld_step(at, start, grad, torch.normal(0.0, 1.0, start.shape), nbeta=100.0, gamma=20.0, eps=1e-3)
                for at, start, grad in zip(w, anchor, grads, strict=True)
            ]


@pytest.mark.slow
@pytest.mark.parametrize("by", ["stacked", "in place", "second opinion"])
def test_a_language_model_agrees_with_llc_itself(by, by_llc):
    model_loss, pool, found, reference = by_llc
    value_of_theirs, their_error = mean_and_error(100.0 * (found[:, LANGUAGE.burn_in :].mean(axis=1) - reference))
    if by == "second opinion":
        chains = theirs(model_loss, pool, LANGUAGE, seed=1)
    else:
        chains = ours(model_loss, pool, LANGUAGE, seed=1, stacked=by == "stacked")
    value, error = mean_and_error(excess_losses(chains, 100.0))
    assert abs(value - value_of_theirs) < 4 * math.hypot(error, their_error)
    assert math.hypot(error, their_error) < 0.08 * value_of_theirs
