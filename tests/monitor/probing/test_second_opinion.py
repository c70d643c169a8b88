"""Chains through devinterp's optimizer against hand, against exact values, against our own, and against its `llc()`."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from quadratic import excess_losses, mean_and_error, stationary_mean
from regression import half_squared_error
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from phasewatch.monitor.errors import PhasewatchWarning
from phasewatch.monitor.model.isolation import untouched_randomness
from phasewatch.monitor.model.minibatches import Batches
from phasewatch.monitor.model.weights import FlatModel, LossOnBatches
from phasewatch.monitor.probing.second_opinion import run_devinterp_chains
from phasewatch.monitor.sampling.chains import Chains, chain_seed, orders, run_chains
from phasewatch.monitor.sampling.settings import SGLD, sgld_step


class Weights(nn.Module):
    """Nothing but a vector, so that a loss can be any function of it."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w)


CENTRE = torch.tensor([0.3, -1.2, 2.0])
CURVATURES = torch.tensor([0.5, 2.0, 6.0])


def tilted_quadratic(model: Weights, batch: Tensor) -> Tensor:
    away = model.w - CENTRE
    return (CURVATURES * away.square()).sum() / 2 + batch + 0.4 * batch * away.sum()


POOL = list(torch.tensor([0.7, -1.1, 0.2, 1.9]))
SMALL = SGLD(step_size=0.01, localization=3.0, nbeta=20.0, chains=3, draws=20, burn_in=7, batch_size=1, method="sgld")


def any_order(sampler: SGLD, pool: Sequence[Any], seed: int = 0) -> np.ndarray:
    steps = sampler.burn_in + sampler.draws
    return np.random.default_rng(seed).integers(len(pool), size=(steps, sampler.chains))


def run_our_chains(
    model: FlatModel, anchor: Tensor, pool: Sequence[Any], sampler: SGLD, seed: int
) -> tuple[Chains, np.ndarray]:
    """The chains, and which minibatch each took at each step."""
    target = LossOnBatches(model, Batches(pool))
    (chains,) = run_chains(target, anchor[None], sampler, seed)
    return chains, orders(sampler, seed, target).T.numpy()


# Against the obvious loop


@pytest.mark.parametrize("mask", [None, torch.tensor([True, False, True])])
def test_chains_are_the_obvious_loop(mask):
    anchor = torch.tensor([1.0, -2.0, 0.3])
    order = any_order(SMALL, POOL)
    model = FlatModel(Weights(anchor.clone()), tilted_quadratic)
    chains = run_devinterp_chains(model, anchor, POOL, order, SMALL, seed=11, mask=mask)
    moving = torch.ones(3) if mask is None else mask.float()
    for c in range(SMALL.chains):
        noise = Generator().manual_seed(chain_seed(11, c, 1))
        w = anchor.clone()
        for step, i in enumerate(order[:, c]):
            if step >= SMALL.burn_in:
                there, here = (tilted_quadratic(Weights(at), POOL[i]).item() for at in (w, anchor))
                assert chains.losses[c, step - SMALL.burn_in] == pytest.approx(there, rel=1e-4)
                assert chains.reference[c, step - SMALL.burn_in] == pytest.approx(here, rel=1e-6)
            grad = CURVATURES * (w - CENTRE) + 0.4 * POOL[i]
            z = torch.randn(3, generator=noise)
            w = w + moving * (-0.005 * (20.0 * grad + 3.0 * (w - anchor)) + 0.1 * z)
    assert math.isnan(chains.acceptance)


def test_weights_outside_the_mask_stay_exactly_where_they_are():
    seen = []

    def recorded(model: Weights, batch: Tensor) -> Tensor:
        seen.append(model.w.detach().clone())
        return tilted_quadratic(model, batch)

    anchor = torch.tensor([1.0, -2.0, 0.3])
    model = FlatModel(Weights(anchor.clone()), recorded)
    mask = torch.tensor([True, False, True])
    run_devinterp_chains(model, anchor, POOL, any_order(SMALL, POOL), SMALL, seed=0, mask=mask)
    places = torch.stack(seen)
    assert (places[:, 1] == -2.0).all()
    assert len(places[:, 0].unique()) > 50


def test_each_minibatch_has_its_reference_taken_once():
    references = []

    def recorded(model: Weights, batch: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            references.append(batch.item())
        return tilted_quadratic(model, batch)

    model = FlatModel(Weights(torch.tensor([1.0, -2.0, 0.3])), recorded)
    run_devinterp_chains(model, model.weights(), POOL, any_order(SMALL, POOL[:3]), SMALL, seed=0)
    assert sorted(references) == sorted(b.item() for b in POOL[:3])


def test_global_randomness_is_neither_used_nor_moved():
    model = FlatModel(Weights(torch.tensor([1.0, -2.0, 0.3])), tilted_quadratic)
    anchor, order = model.weights(), any_order(SMALL, POOL)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(run_devinterp_chains(model, anchor, POOL, order, SMALL, seed=4))
        assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(found[0].losses, found[1].losses)
    assert torch.equal(anchor, torch.tensor([1.0, -2.0, 0.3]))


def test_an_inverse_temperature_of_one_is_taken_without_a_warning():
    sampler = SGLD(step_size=0.01, localization=3.0, nbeta=1.0, chains=2, draws=4, burn_in=0, batch_size=1)
    model = FlatModel(Weights(torch.tensor([1.0, -2.0, 0.3])), tilted_quadratic)
    chains = run_devinterp_chains(model, model.weights(), POOL, any_order(sampler, POOL), sampler, seed=0)
    assert np.isfinite(chains.losses).all()


# Against exact values


def many_quadratics(dtype: torch.dtype) -> tuple[FlatModel, Tensor]:
    """2,000 curvatures around a centre near 1, with the anchor at the minimum."""
    h = torch.linspace(0.7, 5.0, 2000)
    centre = torch.linspace(0.5, 1.5, 2000).to(dtype).float()

    def loss(model: Weights, batch: None) -> Tensor:
        return (h * (model.w.float() - centre).square()).sum() / 2

    return FlatModel(Weights(centre.to(dtype, copy=True)), loss), h


@pytest.mark.parametrize(
    ("dtype", "kappa"), [(torch.float32, 0.3), (torch.float32, 1.5), (torch.float64, 1.5), (torch.bfloat16, 0.3)]
)
def test_stationary_excess_loss_of_a_quadratic(dtype, kappa):
    nbeta, gamma = 400.0, 50.0
    model, h = many_quadratics(dtype)
    eps = kappa / (nbeta * h.max().item() + gamma)
    truth = stationary_mean(h, nbeta=nbeta, gamma=gamma, eps=eps, method="sgld")
    sampler = SGLD(eps, gamma, nbeta, chains=8, draws=100, burn_in=round(50 / kappa), batch_size=1)
    order = any_order(sampler, [None])
    chains = run_devinterp_chains(model, model.weights(), [None], order, sampler, seed=3)
    value, error = mean_and_error(excess_losses(chains, nbeta))
    rounding = 0.01 * truth if dtype is torch.bfloat16 else 0  # of the weights that the model itself is called with
    assert abs(value - truth) < 4 * error + rounding
    assert error < 0.005 * truth
    unbiased = stationary_mean(h, nbeta=nbeta, gamma=gamma, eps=eps, method="mala")
    assert (truth - unbiased) / unbiased > 0.03  # so that a sampler without the bias would fail above


# Against our own chains


def regression() -> tuple[FlatModel, list[Any]]:
    generator = Generator().manual_seed(1)
    x = torch.randn(256, 30, generator=generator)
    model = nn.Linear(30, 1)
    y = x @ torch.randn(30, 1, generator=generator) + torch.randn(256, 1, generator=generator)
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(256, 1)], dim=1), y).solution
    with torch.no_grad():
        model.weight.copy_(solution[:-1].mT)
        model.bias.copy_(solution[-1])
    return FlatModel(model, half_squared_error), list(zip(x.split(64), y.split(64), strict=True))


def at_its_own_targets(model: nn.Module) -> tuple[FlatModel, list[Any]]:
    """A network that explains its data exactly, so that it stands at a minimum, regular or not."""
    x = torch.randn(256, 5, generator=Generator().manual_seed(2))
    y = model(x).detach()
    return FlatModel(model, half_squared_error), list(zip(x.split(64), y.split(64), strict=True))


def deep_linear() -> tuple[FlatModel, list[Any]]:
    """Widths (5, 3, 5), true rank 1."""
    model = nn.Sequential(nn.Linear(5, 3, bias=False), nn.Linear(3, 5, bias=False))
    with torch.no_grad():
        for layer in model:
            layer.weight.zero_()
            layer.weight[0, 0] = 1
    return at_its_own_targets(model)


def perceptron() -> tuple[FlatModel, list[Any]]:
    with untouched_randomness(5):
        return at_its_own_targets(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)))


@pytest.mark.parametrize("make", [regression, deep_linear, perceptron])
def test_both_samplers_agree(make):
    sampler = SGLD(
        step_size=2e-3, localization=5.0, nbeta=60.0, chains=8, draws=150, burn_in=100, batch_size=64, method="sgld"
    )
    model, pool = make()
    start = model.weights()
    mine, order = run_our_chains(model, start, pool, sampler, seed=1)
    same = run_devinterp_chains(model, start, pool, order, sampler, seed=1)
    np.testing.assert_allclose(same.losses, mine.losses, rtol=2e-3, atol=1e-6)
    np.testing.assert_allclose(same.reference, mine.reference, rtol=1e-4, atol=1e-9)
    another_order = any_order(sampler, pool, seed=1)
    other = run_devinterp_chains(model, start, pool, another_order, sampler, seed=2)
    (a, a_error), (b, b_error) = (mean_and_error(excess_losses(chains, 60.0)) for chains in (mine, other))
    assert abs(a - b) < 4 * math.hypot(a_error, b_error)
    assert math.hypot(a_error, b_error) < 0.08 * a


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
    model = FlatModel(Experts(), half_squared_error)
    with pytest.warns(PhasewatchWarning, match="Experts can't be vectorised"):
        model.choose_path(Batches(pool[:2]))
    start = model.weights()
    mine, order = run_our_chains(model, start, pool, SMALL, seed=3)
    theirs = run_devinterp_chains(model, start, pool, order, SMALL, seed=3)
    np.testing.assert_allclose(theirs.losses, mine.losses, rtol=1e-4)
    np.testing.assert_allclose(theirs.reference, mine.reference, rtol=1e-6)


def test_an_expert_that_a_minibatch_leaves_out_is_still_pulled_and_shaken():
    """Its gradient there is zero, and not none at all: devinterp's optimizer would leave it where it is."""
    x = torch.tensor([[1.0], [-1.0]])
    pool, sampler = [(x, 0.5 * x) for x in x], SGLD(0.01, 3.0, 20.0, chains=2, draws=4, burn_in=0, batch_size=1)
    model = FlatModel(Experts(), half_squared_error)
    start = model.weights()
    noises = [Generator().manual_seed(chain_seed(0, c, 1)) for c in range(2)]
    shaken = torch.stack([0.1 * torch.randn(3, generator=noise) for noise in noises])
    order = np.array([[0, 0], [1, 1], [1, 1], [1, 1]])  # the second expert's first turn is the second step
    chains = run_devinterp_chains(model, start, pool, order, sampler, seed=0)
    expected = (start[1] + shaken[:, 1] - 0.5).square() / 2
    np.testing.assert_allclose(chains.losses[:, 1], expected.numpy(), rtol=1e-5)


# Chains that leave


def test_unstable_steps_leave_nothing_but_nan():
    model = FlatModel(Weights(torch.tensor([1.0, -2.0, 0.3])), tilted_quadratic)
    sampler = SGLD(step_size=5.0, localization=0.5, nbeta=20.0, chains=2, draws=500, burn_in=100, batch_size=1)
    chains = run_devinterp_chains(model, model.weights(), POOL, any_order(sampler, POOL), sampler, seed=0)
    assert chains.losses.shape == chains.reference.shape == (2, 500)
    assert np.isnan(chains.losses).all()
    assert np.isnan(chains.reference).all()


def test_a_reference_that_is_not_finite_leaves_nothing_but_nan():
    start = torch.tensor([1.0, -2.0, 0.3])

    def endless_at_the_anchor(model: Weights, batch: Tensor) -> Tensor:
        there = tilted_quadratic(model, batch)
        return there / 0 if batch == POOL[3] and torch.equal(model.w, start) else there

    order = any_order(SMALL, POOL)
    order[0], order[20, 2] = 0, 3  # never there while a chain is at the anchor
    model = FlatModel(Weights(start.clone()), endless_at_the_anchor)
    chains = run_devinterp_chains(model, start, POOL, order, SMALL, seed=0)
    assert np.isnan(chains.losses).all()
    assert np.isnan(chains.reference).all()


def test_a_loss_that_refuses_what_the_chains_do_is_a_divergence():
    def refuses(model: Weights, batch: Tensor) -> Tensor:
        if model.w.abs().max() > 10:
            raise ValueError("these are no probabilities")
        return tilted_quadratic(model, batch)

    sampler = SGLD(step_size=0.5, localization=0.0, nbeta=20.0, chains=2, draws=40, burn_in=0, batch_size=1)
    model = FlatModel(Weights(torch.tensor([1.0, -2.0, 0.3])), refuses)
    chains = run_devinterp_chains(model, model.weights(), POOL, any_order(sampler, POOL), sampler, seed=0)
    assert np.isnan(chains.losses).all()


def test_running_out_of_memory_is_no_divergence():
    start = torch.tensor([1.0, -2.0, 0.3])

    def greedy(model: Weights, batch: Tensor) -> Tensor:
        if not torch.equal(model.w, start):
            raise torch.OutOfMemoryError("no memory left")
        return tilted_quadratic(model, batch)

    model = FlatModel(Weights(start.clone()), greedy)
    with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
        run_devinterp_chains(model, start, POOL, any_order(SMALL, POOL), SMALL, seed=0)


def test_a_gradient_that_fails_at_the_anchor_too_is_no_divergence():
    def broken(model: Weights, batch: Tensor) -> Tensor:
        return tilted_quadratic(model, batch).detach()

    model = FlatModel(Weights(torch.tensor([1.0, -2.0, 0.3])), broken)
    with pytest.raises(RuntimeError, match="does not require grad"):
        run_devinterp_chains(model, model.weights(), POOL, any_order(SMALL, POOL), SMALL, seed=0)


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


LANGUAGE = SGLD(
    step_size=1e-3, localization=20.0, nbeta=100.0, chains=8, draws=100, burn_in=100, batch_size=16, method="sgld"
)


@pytest.fixture(scope="module")
def by_llc(tmp_path_factory) -> tuple[FlatModel, Tensor, list[Tensor], np.ndarray, float]:
    """A model, its anchor, its minibatches, and what `llc()` found: the losses of shape (chain, step), and L(w*).

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
    flat = FlatModel(model, next_token)
    return flat, flat.weights(), list(tokens.split(16)), losses, found.init_loss.item()


def test_llc_itself_takes_our_steps(by_llc):
    """It draws a parameter's noise after another's from the global stream, seeded for each chain."""
    model, anchor, pool, found, _ = by_llc
    w = anchor[None]
    with untouched_randomness(103):
        for step in range(60):
            loss, grads = model.losses_and_grads(w, Batches([pool[step % 4]]))
            assert loss.item() == pytest.approx(found[3, step], rel=1e-4)
            noise = torch.cat([torch.normal(0.0, 1.0, p.shape).flatten() for p in model.model.parameters()])
            w = sgld_step(w, anchor, grads, noise, nbeta=100.0, gamma=20.0, eps=1e-3)


@pytest.mark.parametrize("backend", ["vectorised", "devinterp"])
def test_a_language_model_agrees_with_llc_itself(backend, by_llc):
    model, anchor, pool, found, reference = by_llc
    theirs, their_error = mean_and_error(100.0 * (found[:, LANGUAGE.burn_in :].mean(axis=1) - reference))
    chains, order = run_our_chains(model, anchor, pool, LANGUAGE, seed=1)
    if backend == "devinterp":
        chains = run_devinterp_chains(model, anchor, pool, order, LANGUAGE, seed=1)
    value, error = mean_and_error(excess_losses(chains, 100.0))
    assert abs(value - theirs) < 4 * math.hypot(error, their_error)
    assert math.hypot(error, their_error) < 0.08 * theirs
