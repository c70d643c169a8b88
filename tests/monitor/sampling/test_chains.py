"""The chains against quadratic truths, where their mean, the error of their step and what is held back are known."""

import itertools
import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from quadratic import Quadratic, excess_losses, mean_and_error, shifts, stationary_mean
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.sampling import random_streams, start
from phasewatch.monitor.sampling.chains import Chains, run_chains
from phasewatch.monitor.sampling.random_streams import ChainNoise, chain_seed, minibatch_orders
from phasewatch.monitor.sampling.settings import SGLD, Langevin
from tests.noise import noise_of_step


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def around(target, anchors, sampler, seed, *, masks=(None,), rows=None) -> list[Chains]:
    """The chains around flat anchors, with flat masks; equal anchors are one, as a probe gives those of its parts."""
    known = {}
    pieces = [known.setdefault(tuple(anchor.tolist()), target.pieces(anchor)) for anchor in anchors]
    masks = [None if mask is None else target.pieces(mask) for mask in masks]
    return run_chains(target, pieces, sampler, seed, masks=masks, rows=rows)


def run(target, sampler, seed, **more) -> Chains:
    (chains,) = around(target, target.centre.unsqueeze(0), sampler, seed, **more)
    return chains


def orders(sampler, seed, target):
    steps = sampler.burn_in + sampler.draws
    return minibatch_orders(seed, sampler.chains, steps, target.minibatches, whole=target.whole)


def sampler_of(momentum, *arguments, **named):
    """SGLD for a momentum of None, so that a test goes over all samplers."""
    return SGLD(*arguments, **named) if momentum is None else Langevin(*arguments, momentum=momentum, **named)


paths = pytest.mark.parametrize("vectorised", [True, False], ids=["stacked", "in place"])


# The stationary mean


@pytest.mark.parametrize("kappa", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("momentum", [None, 0, 0.8])
def test_stationary_excess_loss_of_a_quadratic(momentum, kappa):
    nbeta, gamma = 40.0, 5.0
    h = torch.logspace(math.log10(0.7), math.log10(5.0), 48, dtype=torch.float64)
    eps = kappa / (nbeta * h.max().item() + gamma)
    scale = {"nbeta": nbeta, "gamma": gamma, "eps": eps}
    truth = stationary_mean(h, **scale, sgld=momentum is None)
    draws, burn_in = round(1200 / math.sqrt(kappa)), round(200 / kappa)
    sampler = sampler_of(momentum, eps, gamma, nbeta, 16, draws, burn_in, None)
    chains = run(Quadratic(h, torch.linspace(-2, 3, 48, dtype=torch.float64)), sampler, 3)
    mean, error = mean_and_error(excess_losses(chains, nbeta))
    assert abs(mean - truth) < 4 * error
    assert error < 0.01 * truth
    other = stationary_mean(h, **scale, sgld=momentum is not None)
    assert abs(truth - other) > max(4 * error, 0.03 * truth)  # so that the wrong step would fail above


@paths
@pytest.mark.parametrize("momentum", [None, pytest.param(0, marks=pytest.mark.slow), 0.5])
def test_minibatch_noise_adds_its_known_share(momentum, vectorised):
    nbeta, gamma, h = 30.0, 7.0, doubles(2.0)
    gain = (1 + (momentum or 0)) / (1 - (momentum or 0))
    eps, tilt = 0.5 / (nbeta * 2 + gamma), 0.5 / math.sqrt(gain)
    scale = {"nbeta": nbeta, "gamma": gamma, "eps": eps, "sgld": momentum is None}
    truth = stationary_mean(h, **scale, tilt=tilt * math.sqrt(gain))
    chains, draws = (64, 1500) if vectorised else (12, 800)
    sampler = sampler_of(momentum, eps, gamma, nbeta, chains, draws, 100, 1)
    # More minibatches than steps, since those of one epoch without replacement cancel each other.
    chains = run(Quadratic(h, doubles(-1.3), tilt, shifts(2000), vectorised=vectorised), sampler, 5)
    mean, error = mean_and_error(excess_losses(chains, nbeta))
    assert abs(mean - truth) < 4 * error + (0.05 * truth if momentum else 0)  # its noise is so to first order in κ
    assert error < (0.02 if vectorised else 0.07) * truth
    assert truth > 1.2 * stationary_mean(h, **scale)
    assert chains.checks.noise == pytest.approx(eps * (nbeta * tilt) ** 2 / 8 * gain, rel=0.8)  # of 16 minibatches


# What is known beside the losses


@pytest.mark.parametrize("vectorised", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["stacked", "in place"])
def test_the_checks_of_a_quadratic(vectorised):
    nbeta, gamma = 40.0, 30.0
    h = torch.linspace(0.3, 5.0, 40, dtype=torch.float64)
    a = nbeta * h
    sampler = SGLD(0.4 / (a.max().item() + gamma), gamma, nbeta, 12, 1500, 200, None)
    target = Quadratic(h, torch.zeros(40, dtype=torch.float64), vectorised=vectorised)
    checks = run(target, sampler, 0).checks
    assert checks.kappa == pytest.approx(0.4, rel=0.08)
    assert checks.step_size == pytest.approx(sampler.step_size, rel=1e-9)
    assert checks.curvature == pytest.approx(5.0, rel=0.08)
    longer = sampler.step_size * a / 8 / (1 - sampler.step_size * (a + gamma) / 4)  # the gradients are overshot too
    assert checks.overshoot == pytest.approx(longer.sum().item(), rel=0.03)
    assert checks.noise == checks.descent == checks.below == 0
    held = ((a * gamma / (a + gamma) ** 2).sum() / (a / (a + gamma)).sum()).item()
    assert abs(checks.held - held) < 4 * checks.held_error
    assert checks.held_error < 0.03
    assert held > 0.2


@pytest.mark.parametrize("momentum", [None, 0.0, 0.5, 0.95])
@pytest.mark.parametrize("gamma", [0.4, 4.0, 40.0])
def test_what_the_localization_holds_back_is_known_from_one_run(momentum, gamma):
    """By the formula for a spectrum over two decades beside flat directions, which don't count."""
    nbeta = 100.0
    h = torch.cat([torch.zeros(60), torch.logspace(-2, 0, 60)]).double()
    a = nbeta * h
    exact = ((a * gamma / (a + gamma) ** 2).sum() / (a / (a + gamma)).sum()).item()
    sampler = sampler_of(momentum, 0.5 / (nbeta + gamma), gamma, nbeta, 6, 500, 300, None)
    checks = run(Quadratic(h, torch.zeros(120, dtype=torch.float64)), sampler, 0).checks
    assert abs(checks.held - exact) < 4 * checks.held_error + 0.1 * exact + 0.01  # flat directions haven't all settled
    assert checks.held_error < 0.25 * exact + 0.01


@pytest.mark.parametrize(("momentum", "vectorised"), [(0.0, True), (0.0, False), (0.9, True)])
@pytest.mark.parametrize("relaxed", [1.3, 4.0, 40.0])
def test_what_chains_lack_is_known_from_how_much_they_remember(momentum, vectorised, relaxed):
    """By the formula for curvatures spread over a factor 30 whose softest relaxes so many times within a chain."""
    nbeta, steps, burn_in = 100.0, 400, 100
    h = torch.logspace(-math.log10(30), 0, 200, dtype=torch.float64)
    eps = relaxed / (steps * nbeta * h[0].item() * (1 + momentum) / (1 - momentum))
    sampler = sampler_of(momentum, eps, 0.0, nbeta, 6, steps - burn_in, burn_in, None)
    checks = run(Quadratic(h, torch.zeros(200, dtype=torch.float64), vectorised=vectorised), sampler, 0).checks
    x = relaxed * h / h[0]
    share = ((torch.exp(-x / 4) - torch.exp(-x)) / (0.75 * x)).mean().item()
    assert abs(checks.short - share / (1 - share)) < 4 * checks.short_error + 0.01
    assert checks.short_error < 0.05


class Steeper(Quadratic):
    """A quadratic that some minibatches see steeper than others, all with their minimum at the centre."""

    SPREAD = 0.6

    def at(self, flat, which):
        steep = 1 + self.SPREAD * self.shifts[which].to(flat)
        return steep * (self.curvatures * (flat - self.centre).square()).sum(-1) / 2


@paths
def test_noise_that_grows_away_from_the_snapshot_is_measured_where_the_chains_are(vectorised):
    h, nbeta, gamma, eps = torch.full((300,), 2.0, dtype=torch.float64), 20.0, 1.0, 0.005
    target = Steeper(h, torch.zeros_like(h), shifts=shifts(400), vectorised=vectorised)
    checks = run(target, Langevin(eps, gamma, nbeta, 6, 200, 50, 1), 0).checks
    noise = (h * Steeper.SPREAD).square() / (nbeta * h + gamma)  # Var of h·(1 + 0.6·shift)·δ over minibatches
    assert checks.noise == pytest.approx(eps * nbeta**2 / 8 * noise.sum().item(), rel=0.35)
    assert checks.noise_error < 0.35 * checks.noise


@pytest.mark.parametrize("curvatures", [(-1.5, 1.0, 0.5), (-0.9, 1.0, 0.5), (2.0,)])
@pytest.mark.parametrize("seed", range(4))
def test_the_curvature_is_that_of_the_steepest_direction_up_or_down(curvatures, seed):
    h = doubles(*curvatures)
    target, anchor = Quadratic(h, torch.zeros_like(h)), torch.full_like(h, 0.1)
    (chains,) = around(target, anchor.unsqueeze(0), Langevin(1e-4, 10.0, 30.0, 2, 8, 0, None), seed)
    steepest = h.abs().max().item()
    assert 0.9 * steepest < chains.checks.curvature < 1.001 * steepest
    slope = (h * anchor).square().sum().item()
    assert chains.checks.descent == pytest.approx(30 * slope / (2 * chains.checks.curvature), rel=0.12)


@paths
@pytest.mark.parametrize("tilted", [False, True])
def test_descent_off_the_minimum(tilted, vectorised):
    """nβ·‖∇L‖²/(2h) along the steepest direction, whatever noise the minibatches' gradients have."""
    h, centre = doubles(*[0.5] * 20, 4.0), torch.zeros(21, dtype=torch.float64)
    shift = shifts(256) if tilted else shifts(2)
    target = Quadratic(h, centre, 0.3 if tilted else 0.0, shift, vectorised=vectorised)
    anchor = centre.clone()
    anchor[-1] = 0.5
    (chains,) = around(target, anchor.unsqueeze(0), Langevin(1e-4, 10.0, 50.0, 8, 10, 0, 1), 0)
    checks = chains.checks
    assert abs(checks.descent - 50 * 4.0 * 0.5**2 / 2) < 4 * checks.descent_error + 0.02 * checks.descent
    assert checks.descent_error < (12 if tilted else 1e-9)


@pytest.mark.slow
def test_the_descent_of_noise_alone_is_zero_within_its_error():
    """Over 200 draws of the minibatches at a minimum; with too small an error many would be called descents."""
    h, off, noise = torch.full((30,), 0.5, dtype=torch.float64), [], []
    for seed in range(200):
        target = Quadratic(h, torch.zeros(30, dtype=torch.float64), 0.3, shifts(4096, seed), whole=False)
        checks = run(target, Langevin(1e-4, 10.0, 50.0, 2, 4, 0, 1), 0).checks
        off.append(checks.descent / checks.descent_error)
        noise.append(checks.noise)
    assert np.mean(np.array(off) > 2) < 0.05
    assert np.std(off) > 0.3
    assert np.mean(noise) == pytest.approx(1e-4 * 50**2 * 30 * 0.3**2 / 8, rel=0.1)


def test_chains_go_down_every_slope():
    """½ Σ (nβ·g)²/(nβ·h + γ), most of it here in directions that the steepest one knows nothing of."""
    nbeta, gamma, away = 40.0, 30.0, 0.3
    h = torch.linspace(0.3, 5.0, 40, dtype=torch.float64)
    a = nbeta * h
    sampler = Langevin(0.4 / (a.max().item() + gamma), gamma, nbeta, 12, 1500, 200, None, momentum=0.0)
    target = Quadratic(h, torch.full((40,), away, dtype=torch.float64))
    (chains,) = around(target, torch.zeros(1, 40, dtype=torch.float64), sampler, 0)
    checks = chains.checks
    truth = ((a * away) ** 2 / (a + gamma)).sum().item() / 2
    assert abs(checks.drop - truth) < 4 * checks.drop_error
    assert checks.drop_error < 0.02 * truth


@pytest.mark.parametrize(("burn_in", "draws", "kappa"), [(0, 100, 0.02), (50, 100, 0.01), (20, 400, 0.005)])
def test_steps_that_are_too_few_for_the_steepest_direction(burn_in, draws, kappa):
    """Of many directions alike, started at 0, λ̂ lacks the share that is foretold."""
    h, nbeta, gamma = torch.full((300,), 2.0, dtype=torch.float64), 50.0, 1.0
    sampler = Langevin(kappa / 101, gamma, nbeta, 8, draws, burn_in, None, momentum=0.0)
    chains = run(Quadratic(h, torch.zeros(300, dtype=torch.float64)), sampler, 0)
    mean, error = mean_and_error(excess_losses(chains, nbeta))
    truth = 300 / 2 * 100 / 101
    assert abs(mean / truth - (1 - chains.checks.unsettled)) < 4 * error / truth
    assert error < 0.03 * truth
    assert chains.checks.unsettled > 0.1


@paths
def test_draws_below_the_snapshot_are_counted(vectorised):
    h = torch.full((10,), 2.0, dtype=torch.float64)
    target = Quadratic(h, torch.zeros(10, dtype=torch.float64), vectorised=vectorised)
    sampler = Langevin(1e-3, 1.0, 50.0, 4, 400, 50, None)
    (at_minimum,) = around(target, torch.zeros(1, 10, dtype=torch.float64), sampler, 0)
    (above_it,) = around(target, torch.full((1, 10), 0.5, dtype=torch.float64), sampler, 0)
    assert at_minimum.checks.below == 0
    assert above_it.checks.below > 0.9


# The step by curvature


@paths
def test_kappa_makes_the_step(vectorised):
    h = torch.logspace(-2, 1, 30, dtype=torch.float64)
    sampler = Langevin(None, 3.0, 20.0, 3, 40, 40, None, kappa=0.6)
    chains = run(Quadratic(h, torch.zeros(30, dtype=torch.float64), vectorised=vectorised), sampler, 0)
    assert chains.checks.step_size == pytest.approx(0.6 / (20 * 10 + 3), rel=0.08)
    assert chains.checks.kappa == pytest.approx(0.6, rel=1e-6)


def test_steps_shrink_where_curvature_grows_along_the_chains():
    """L = ½ Σ u²v² has no curvature at 0, where the chains start, and plenty where they go."""

    class Products(Quadratic):
        def at(self, flat, which):
            u, v = flat.chunk(2, dim=-1)
            return (u * v).square().sum(-1).expand(which.shape) / 2

    centre = torch.zeros(32, dtype=torch.float64)
    sampler = Langevin(None, 10.0, 3000.0, 8, 2500, 500, None, kappa=0.5)
    chains = run(Products(centre, centre), sampler, 0)
    assert chains.checks.step_size < 0.2 * 0.5 / 10.0
    mean, error = mean_and_error(excess_losses(chains, 3000.0))
    reach = np.linspace(-8, 8, 4001) / math.sqrt(10)
    u, v = np.meshgrid(reach, reach)
    loss = u**2 * v**2 / 2
    weight = np.exp(-3000 * loss - 5 * (u**2 + v**2))
    truth = 16 * (3000 * loss * weight).sum() / weight.sum()
    assert abs(mean - truth) < 4 * error + 0.03 * truth
    assert error < 0.015 * truth


# The chains against the obvious loop


SMALL = Langevin(0.01, 3.0, 20.0, chains=3, draws=20, burn_in=7, batch_size=1)


@paths
@pytest.mark.parametrize("momentum", [None, 0, 0.6])
def test_chains_are_the_obvious_loop(momentum, vectorised):
    h, anchor = doubles(0.5, 2.0, 6.0), doubles(1.0, -2.0, 0.3)
    sampler = sampler_of(momentum, 0.01, 3.0, 20.0, 3, 20, 7, 1)
    target = Quadratic(h, anchor, 0.4, shifts(5), vectorised=vectorised)
    chains = run(target, sampler, seed=11)
    for c, order in enumerate(orders(sampler, 11, target)):
        stream = ChainNoise(11, c, torch.device("cpu"))
        z = torch.stack([torch.cat(noise_of_step(stream, target.pieces(anchor))) for _ in range(28)])
        p = z[0]
        w = anchor.clone() if momentum is None else anchor + 0.1 / 2 * p
        for step in range(27):
            shift = target.shifts[order[step]]
            away = w - anchor
            loss = (h * away**2).sum() / 2 + shift + 0.4 * shift * away.sum()
            if step >= 7:
                assert chains.losses[c, step - 7] == pytest.approx(loss.item(), rel=1e-12)
                assert chains.reference[c, step - 7] == pytest.approx(shift.item(), rel=1e-12)
            force = -(20.0 * (h * away + 0.4 * shift) + 3.0 * away)
            if momentum is None:
                w = w + 0.005 * force + 0.1 * z[step + 1]
            else:
                p = p + 0.1 * force
                w = w + 0.1 / 2 * p
                p = momentum * p + math.sqrt(1 - momentum**2) * z[step + 1]
                w = w + 0.1 / 2 * p


def assert_same(found, alone, names=("step_size", "kappa", "curvature", "unsettled", "noise", "held", "below")):
    np.testing.assert_allclose(found.losses, alone.losses, rtol=1e-10)
    np.testing.assert_allclose(found.reference, alone.reference, rtol=1e-10)
    for name in names:
        of_both = getattr(found.checks, name), getattr(alone.checks, name)
        assert of_both[0] == pytest.approx(of_both[1], rel=1e-6, nan_ok=True), name


@pytest.mark.parametrize("step", [{"step_size": 0.01}, {"kappa": 0.5}], ids=["step size", "kappa"])
@pytest.mark.parametrize("momentum", [None, 0, 0.6])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 9, None, "in place"])
def test_any_grouping_gives_each_anchor_the_chains_it_has_alone(momentum, rows, step):
    if momentum is None and "kappa" in step:
        pytest.skip("SGLD takes a step size")
    h, anchors = doubles(0.5, 2.0, 6.0), doubles([1.0, -2.0, 0.3], [0.9, -2.0, 0.3], [1.0, 0.0, 0.0])
    masks = torch.tensor([[True, True, True], [False, True, True], [True, False, True]])
    sampler = sampler_of(momentum, **step, localization=3.0, nbeta=20.0, chains=3, draws=20, burn_in=7, batch_size=1)
    target = Quadratic(h, anchors[0], 0.4, shifts(5), vectorised=rows != "in place")
    together = around(target, anchors, sampler, 4, masks=masks, rows=None if rows == "in place" else rows)
    target.vectorised = True
    for i, found in enumerate(together):
        (alone,) = around(target, anchors[i : i + 1], sampler, 4, masks=masks[i : i + 1])
        assert_same(found, alone)


class Memory(TorchDispatchMode):
    """The most bytes that were held at a time by tensors which operations inside returned."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and (key := leaf.untyped_storage()._cdata) not in self._known:
                self._known[key] = leaf.untyped_storage().nbytes()
                weakref.finalize(leaf.untyped_storage(), self._forget, key)
                self.now += self._known[key]
                self.peak = max(self.peak, self.now)
        return out

    def _forget(self, key):
        self.now -= self._known.pop(key)


@pytest.mark.parametrize(("momentum", "sets"), [(None, 0), (0, 0), (0.5, 1)])
def test_chains_in_place_hold_no_more_than_an_anchor_a_gradient_and_a_velocity(monkeypatch, momentum, sets):
    """In sets of weights: parameters, anchor and gradient, which operations return, and what a backward pass takes."""
    size, pieces = 2**16, 16

    class Many(Quadratic):
        def pieces(self, flat):
            return [piece.clone() for piece in flat.chunk(pieces, dim=-1)]

        def loss(self, number):
            with torch.no_grad():
                return sum(parameter.square().sum() for parameter in self.parameters) / 2

        def add_gradient(self, number, scale=1.0, *, part=False):
            value = sum(parameter.square().sum() for parameter in self.parameters) / 2
            (scale * value).backward()
            return value.detach()

    target = Many(torch.ones(size), torch.zeros(size), shifts=shifts(20), vectorised=False)
    anchor = target.pieces(target.centre)
    sampler = sampler_of(momentum, 1e-3, 1.0, 1.0, chains=2, draws=4, burn_in=0, batch_size=None)
    monkeypatch.setattr(random_streams, "GROUP", size // pieces)
    monkeypatch.setattr(start, "LARGE", size)
    with Memory() as memory:
        for tensor in [*target.parameters, *anchor]:
            tensor.detach()  # is counted from here on
        run_chains(target, [anchor], sampler, 0)
    assert memory.peak / (4 * size) < 3 + sets + 0.7  # and a few single parameters, of a sixteenth each
    assert memory.peak / (4 * size) > 3 + sets


@paths
def test_parameters_of_any_shape_are_sampled(vectorised):
    """A number by itself and a matrix."""

    class Shaped(Quadratic):
        def pieces(self, flat):
            scalar, matrix = flat[..., 0].clone(), flat[..., 1:].clone()
            return [scalar, matrix.unflatten(-1, (2, 2))]

        def _flat(self, weights):
            scalar, matrix = weights
            return torch.cat([scalar.unsqueeze(-1), matrix.flatten(-2)], -1)

        def loss(self, number):
            with torch.no_grad():
                return self.at(self._flat(self.parameters), torch.tensor(number))

        def add_gradient(self, number, scale=1.0, *, part=False):
            value = self.at(self._flat(self.parameters), torch.tensor(number))
            (scale * value).backward()
            return value.detach()

        def rows(self, weights, which):
            with torch.no_grad():
                return self.at(self._flat(weights), which)

        def rows_and_gradients(self, weights, which):
            flat = self._flat(weights).detach().requires_grad_()
            losses = self.at(flat, which)
            (grads,) = torch.autograd.grad(losses.sum(), flat)
            return losses.detach(), self.pieces(grads)

    h, centre = doubles(0.5, 2.0, 6.0, 1.0, 3.0), doubles(1.0, -2.0, 0.3, 0.0, 2.0)
    sampler = Langevin(0.01, 3.0, 20.0, chains=3, draws=200, burn_in=20, batch_size=None, momentum=0.5)
    chains = run(Shaped(h, centre, vectorised=vectorised), sampler, 0)
    mean, error = mean_and_error(excess_losses(chains, 20.0))
    assert abs(mean - stationary_mean(h, nbeta=20.0, gamma=3.0, eps=0.01, sgld=False)) < 4 * error
    assert chains.checks.curvature == pytest.approx(6.0, rel=0.05)


def test_parts_of_one_snapshot_share_its_reference():
    class Counts(Quadratic):
        asked = 0

        def rows(self, weights, which):
            self.asked += len(which)
            return super().rows(weights, which)

    anchor = doubles(1.0, -2.0)
    target = Counts(doubles(0.5, 2.0), anchor, shifts=shifts(16))
    masks = [None, torch.tensor([True, False]), torch.tensor([False, True])]
    parts = around(target, [anchor] * 3, SMALL, 0, masks=masks)
    assert target.asked == 16
    assert len({chains.losses.mean() for chains in parts}) == 3


@paths
def test_masked_weights_stay(vectorised):
    h, anchor = doubles(0.5, 2.0, 6.0, 1.0), doubles(1.0, -2.0, 0.3, 4.0)
    target = Quadratic(h, anchor + 1, vectorised=vectorised)  # so that each of them has a gradient
    (alone,) = around(target, anchor.unsqueeze(0), SMALL, 0, masks=torch.tensor([[False, True, False, True]]))
    assert all((weights[:, [0, 2]] == anchor[[0, 2]]).all() for weights in target.calls)
    assert any((weights[:, 1] != anchor[1]).any() for weights in target.calls)
    assert any((weights[:, 3] != anchor[3]).any() for weights in target.calls)
    assert alone.losses.std() > 0


@paths
def test_results_are_float64_of_shape_chain_draw_whatever_the_weights(vectorised):
    target = Quadratic(torch.tensor([0.5, 2.0]), torch.tensor([1.0, -2.0]), vectorised=vectorised)
    chains = run(target, SMALL, seed=0)
    assert chains.losses.shape == chains.reference.shape == (3, 20)
    assert chains.losses.dtype == chains.reference.dtype == np.float64


@paths
def test_the_anchor_is_left_as_it_is(vectorised):
    target = Quadratic(doubles(0.5, 2.0), doubles(1.0, -2.0), vectorised=vectorised)
    anchor = target.pieces(doubles(1.0, -2.0))
    run_chains(target, [anchor], SMALL, seed=0)
    assert torch.equal(torch.cat(anchor), doubles(1.0, -2.0))
    assert all(parameter.grad is None for parameter in target.parameters)


@paths
def test_global_randomness_is_neither_used_nor_moved(vectorised):
    target = Quadratic(doubles(0.5, 2.0), doubles(1.0, -2.0), shifts=shifts(5), vectorised=vectorised)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(run(target, SMALL, seed=4))
        assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(found[0].losses, found[1].losses)


def test_a_chain_is_the_same_however_many_there_are():
    target = Quadratic(doubles(0.5, 2.0), doubles(1.0, -2.0), 0.4, shifts(7))
    few, many = (run(target, Langevin(0.01, 3.0, 20.0, chains, 20, 7, 1), seed=4) for chains in (2, 9))
    np.testing.assert_array_equal(few.losses, many.losses[:2])
    np.testing.assert_array_equal(few.reference, many.reference[:2])


def test_seeds_chains_and_purposes_have_streams_of_their_own():
    seeds = [chain_seed(*key) for key in itertools.product((0, 1, 2**31), range(20), range(5))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


# Common random numbers


def neighbours(seed: int, other_seed: int) -> tuple[np.ndarray, np.ndarray]:
    """λ̂ of each chain at two neighbouring anchors, shape (chain,) each."""
    sampler = Langevin(step_size=2e-3, localization=7.0, nbeta=30.0, chains=16, draws=100, burn_in=50, batch_size=1)
    h = torch.linspace(0.5, 6.0, 12, dtype=torch.float64)
    anchors = torch.zeros(12, dtype=torch.float64), torch.full((12,), 0.01, dtype=torch.float64)
    found = (
        run(Quadratic(curvatures, anchor, 0.2, shifts(40)), sampler, seed=s)
        for curvatures, anchor, s in zip((h, 1.01 * h), anchors, (seed, other_seed), strict=True)
    )
    return tuple(excess_losses(chains, 30.0) for chains in found)


def test_neighbouring_snapshots_share_noise_and_minibatches():
    level, shared = neighbours(3, 3)
    difference = shared - level
    assert level.std(ddof=1) > 50 * difference.std(ddof=1)
    _, fresh = neighbours(3, 4)
    assert level.std(ddof=1) < 2 * (fresh - level).std(ddof=1)  # so that it is the sharing that does it


# Chains that leave


def diverged(chains) -> bool:
    return bool(np.isnan(chains.losses).all() and np.isnan(chains.reference).all())


@paths
def test_unstable_steps_leave_nothing_but_nan(vectorised):
    target = Quadratic(torch.tensor([0.5, 2.0]), torch.tensor([1.0, -2.0]), vectorised=vectorised)
    sampler = Langevin(step_size=5.0, localization=0.5, nbeta=20.0, chains=2, draws=500, burn_in=100, batch_size=1)
    chains = run(target, sampler, seed=0)
    assert chains.losses.shape == chains.reference.shape == (2, 500)
    assert diverged(chains)
    assert len(target.calls) < 150  # it doesn't go on with what can't come back


@paths
def test_one_anchor_that_diverges_leaves_the_others(vectorised):
    class Bounded(Quadratic):
        def at(self, flat, which):
            losses = super().at(flat, which)
            return torch.where(flat.amax(-1) > 8, math.inf * losses, losses)

    target = Bounded(doubles(0.5, 2.0), doubles(1.0, -2.0), vectorised=vectorised)
    anchors = doubles([1.0, -2.0], [9.0, 9.0])
    sampler = replace(SMALL, burn_in=0)
    first, second = around(target, anchors, sampler, 0)
    (alone,) = around(target, anchors[:1], sampler, 0)
    np.testing.assert_array_equal(first.losses, alone.losses)
    assert diverged(second)


@paths
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("last", [1, 2, 9, 17])
def test_one_loss_near_the_end_that_is_not_finite(bad, last, vectorised):
    """Of the second chain, which meets each of as many minibatches as there are steps once."""

    class Breaks(Quadratic):
        def at(self, flat, which):
            losses, away = super().at(flat, which), (flat - self.centre).abs().amax(-1) > 0.05
            return torch.where((which == number) & away, bad, losses)

    target = Breaks(doubles(0.5, 2.0), doubles(1.0, -2.0), shifts=shifts(27), whole=False, vectorised=vectorised)
    number = -1
    assert not diverged(run(target, SMALL, seed=0))
    number = int(orders(SMALL, 0, target)[1, 27 - last])
    assert diverged(run(target, SMALL, seed=0))


@paths
def test_a_loss_that_refuses_what_the_chains_do_is_a_divergence(vectorised):
    class Refuses(Quadratic):
        def at(self, flat, which):
            if flat.abs().max() > 10:
                raise ValueError("these are no probabilities")
            return super().at(flat, which)

    target = Refuses(torch.tensor([0.5, 2.0]), torch.tensor([1.0, -2.0]), vectorised=vectorised)
    sampler = SGLD(step_size=0.5, localization=0.0, nbeta=20.0, chains=2, draws=40, burn_in=0, batch_size=1)
    assert diverged(run(target, sampler, seed=0))
    stiller = torch.tensor([[1.0, -2.0], [1.0, -2.0]])
    masks = torch.tensor([[True, True], [False, False]])
    first, second = around(target, stiller, sampler, 0, masks=masks)
    assert diverged(first)
    assert not diverged(second)


@pytest.mark.parametrize("limit", [1e-9, 0.5])
def test_a_loss_that_refuses_what_is_around_the_anchor_is_a_divergence(limit):
    class Refuses(Quadratic):
        def at(self, flat, which):
            if not (flat - self.centre).abs().max() < limit:
                raise ValueError("these are no probabilities")
            return super().at(flat, which)

    target = Refuses(doubles(0.5, 2.0), doubles(1.0, -2.0))
    sampler = Langevin(localization=0.1, nbeta=1.0, chains=2, draws=400, burn_in=0, batch_size=1)
    assert diverged(run(target, sampler, seed=0))


@pytest.mark.parametrize("rows", [1, 2, 3, None])
def test_diverged_chains_are_as_many_as_were_asked_for(rows):
    target = Quadratic(torch.tensor([0.5, 2.0]), torch.tensor([1.0, -2.0]))
    sampler = Langevin(step_size=5.0, localization=0.5, nbeta=20.0, chains=3, draws=50, burn_in=10, batch_size=1)
    chains = run(target, sampler, seed=0, rows=rows)
    assert chains.losses.shape == chains.reference.shape == (3, 50)
    assert diverged(chains)


@paths
def test_a_loss_that_fails_at_the_anchor_too_is_no_divergence(vectorised):
    class Broken(Quadratic):
        def at(self, flat, which):
            raise ValueError("no such column")

    target = Broken(torch.tensor([0.5, 2.0]), torch.tensor([1.0, -2.0]), vectorised=vectorised)
    with pytest.raises(ValueError, match="no such column"):
        run(target, SGLD(), seed=0)


# Memory


def test_where_memory_runs_out_fewer_run_together():
    class Tight(Quadratic):
        def rows_and_gradients(self, weights, which):
            if len(which) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().rows_and_gradients(weights, which)

    anchors = doubles([1.0, -2.0], [0.5, -2.0])
    h = doubles(0.5, 2.0)
    tight = around(Tight(h, anchors[0]), anchors, SMALL, 0)
    roomy = around(Quadratic(h, anchors[0]), anchors, SMALL, 0)
    for a, b in zip(tight, roomy, strict=True):
        np.testing.assert_allclose(a.losses, b.losses, rtol=1e-12)


def test_where_there_is_no_memory_for_one_stacked_chain_they_run_in_place():
    class Tight(Quadratic):
        def rows_and_gradients(self, weights, which):
            raise torch.OutOfMemoryError("CUDA out of memory")

    h, anchor = doubles(0.5, 2.0), doubles(1.0, -2.0)
    np.testing.assert_allclose(run(Tight(h, anchor), SMALL, 0).losses, run(Quadratic(h, anchor), SMALL, 0).losses)


def test_no_memory_for_one_chain_is_a_sentence():
    class Full(Quadratic):
        def add_gradient(self, number, scale=1.0, *, part=False):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(PhasewatchError, match=r"no memory for one chain of 2 parameters with Langevin\(batch_size=1\)"):
        run(Full(doubles(0.5, 2.0), doubles(1.0, -2.0)), SMALL, seed=0)
