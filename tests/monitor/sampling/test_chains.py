"""The chains against quadratic truths, where their mean, the error of their step and what is held back are known."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from quadratic import Quadratic, excess_losses, mean_and_error, shifts, stationary_mean
from torch import Generator

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.sampling.chains import Chains, chain_seed, orders, run_chains
from phasewatch.monitor.sampling.settings import SGLD


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def run(target, sampler, seed, **more) -> Chains:
    (chains,) = run_chains(target, target.centre.unsqueeze(0), sampler, seed, **more)
    return chains


# The stationary mean


@pytest.mark.parametrize("kappa", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(("method", "momentum"), [("sgld", 0), ("langevin", 0), ("langevin", 0.8), ("mala", 0)])
def test_stationary_excess_loss_of_a_quadratic(method, momentum, kappa):
    nbeta, gamma = 40.0, 5.0
    h = torch.logspace(math.log10(0.7), math.log10(5.0), 48, dtype=torch.float64)
    eps = kappa / (nbeta * h.max().item() + gamma)
    truth = stationary_mean(h, nbeta=nbeta, gamma=gamma, eps=eps, method=method)
    draws, burn_in = round(1200 / math.sqrt(kappa)), round(200 / kappa)
    sampler = SGLD(eps, gamma, nbeta, 16, draws, burn_in, None, method, momentum=momentum)
    chains = run(Quadratic(h, torch.linspace(-2, 3, 48, dtype=torch.float64)), sampler, 3)
    mean, error = mean_and_error(excess_losses(chains, nbeta))
    assert abs(mean - truth) < 4 * error
    assert error < 0.01 * truth
    other = stationary_mean(h, nbeta=nbeta, gamma=gamma, eps=eps, method="sgld" if method != "sgld" else "mala")
    assert abs(truth - other) > max(4 * error, 0.03 * truth)  # so that the wrong step would fail above


@pytest.mark.parametrize(("method", "momentum"), [("sgld", 0), ("langevin", 0), ("langevin", 0.5)])
def test_minibatch_noise_adds_its_known_share(method, momentum):
    nbeta, gamma, h = 30.0, 7.0, doubles(2.0)
    eps, tilt = 0.5 / (nbeta * 2 + gamma), 0.5 / math.sqrt((1 + momentum) / (1 - momentum))
    heat = (1 + momentum) / (1 - momentum)
    truth = stationary_mean(h, nbeta=nbeta, gamma=gamma, eps=eps, method=method, tilt=tilt * math.sqrt(heat))
    sampler = SGLD(eps, gamma, nbeta, 64, 1500, 100, 1, method, momentum=momentum)
    # More minibatches than steps, since those of one epoch without replacement cancel each other.
    chains = run(Quadratic(h, doubles(-1.3), tilt, shifts(2000)), sampler, 5)
    mean, error = mean_and_error(excess_losses(chains, nbeta))
    assert abs(mean - truth) < 4 * error + (0.05 * truth if momentum else 0)  # its heat is so to first order in κ
    assert error < 0.02 * truth
    quiet = stationary_mean(h, nbeta=nbeta, gamma=gamma, eps=eps, method=method)
    assert truth > 1.2 * quiet
    assert chains.checks.noise == pytest.approx(
        eps * (nbeta * tilt) ** 2 / 8 * heat, rel=0.5
    )  # from 64 chains' minibatches


# What is known beside the losses


def test_the_checks_of_a_quadratic():
    nbeta, gamma = 40.0, 30.0
    h = torch.linspace(0.3, 5.0, 40, dtype=torch.float64)
    a = nbeta * h
    sampler = SGLD(0.4 / (a.max().item() + gamma), gamma, nbeta, 12, 1500, 200, None, "sgld")
    checks = run(Quadratic(h, torch.zeros(40, dtype=torch.float64)), sampler, 0).checks
    assert checks.kappa == pytest.approx(0.4, rel=0.02)
    assert checks.step_size == pytest.approx(sampler.step_size, rel=1e-9)
    assert checks.curvature == pytest.approx(5.0, rel=0.02)
    longer = sampler.step_size * a / 8 / (1 - sampler.step_size * (a + gamma) / 4)  # the gradients are overshot too
    assert checks.overshoot == pytest.approx(longer.sum().item(), rel=0.02)
    assert checks.noise == checks.descent == checks.below == 0
    held = ((a * gamma / (a + gamma) ** 2).sum() / (a / (a + gamma)).sum()).item()
    assert abs(checks.held - held) < 4 * checks.held_error
    assert checks.held_error < 0.1
    assert held > 0.2


@pytest.mark.parametrize("curvatures", [(-1.5, 1.0, 0.5), (-0.9, 1.0, 0.5), (2.0,)])
@pytest.mark.parametrize("seed", range(4))
def test_the_curvature_is_that_of_the_steepest_direction_up_or_down(curvatures, seed):
    h = doubles(*curvatures)
    target, anchor = Quadratic(h, torch.zeros_like(h)), torch.full_like(h, 0.1)
    (chains,) = run_chains(target, anchor.unsqueeze(0), SGLD(1e-4, 10.0, 30.0, 2, 8, 0, None), seed)
    steepest = h.abs().max().item()
    assert 0.9 * steepest < chains.checks.curvature < 1.001 * steepest
    slope = (h * anchor).square().sum().item()
    assert chains.checks.descent == pytest.approx(30 * slope / (2 * chains.checks.curvature), rel=0.12)


@pytest.mark.parametrize("tilted", [False, True])
def test_descent_off_the_minimum(tilted):
    """nβ·‖∇L‖²/(2h) along the steepest direction, whatever noise the minibatches' gradients have."""
    h, centre = doubles(*[0.5] * 20, 4.0), torch.zeros(21, dtype=torch.float64)
    target = Quadratic(h, centre, 0.3 if tilted else 0.0, shifts(256) if tilted else shifts(2))
    anchor = centre.clone()
    anchor[-1] = 0.5
    sampler = SGLD(1e-4, 10.0, 50.0, 16, 10, 0, 1)
    (chains,) = run_chains(target, anchor.unsqueeze(0), sampler, 0)
    checks = chains.checks
    assert abs(checks.descent - 50 * 4.0 * 0.5**2 / 2) < 4 * checks.descent_error + 0.02 * checks.descent
    assert checks.descent_error < (8 if tilted else 1e-9)


def test_chains_slide_down_every_slope():
    """½ Σ (nβ·g)²/(nβ·h + γ), most of it here in directions that the steepest one knows nothing of."""
    nbeta, gamma, away = 40.0, 30.0, 0.3
    h = torch.linspace(0.3, 5.0, 40, dtype=torch.float64)
    a = nbeta * h
    sampler = SGLD(0.4 / (a.max().item() + gamma), gamma, nbeta, 12, 1500, 200, None, momentum=0.0)
    target = Quadratic(h, torch.full((40,), away, dtype=torch.float64))
    (chains,) = run_chains(target, torch.zeros(1, 40, dtype=torch.float64), sampler, 0)
    checks = chains.checks
    truth = ((a * away) ** 2 / (a + gamma)).sum().item() / 2
    assert abs(checks.slid - truth) < 4 * checks.slid_error
    assert checks.slid_error < 0.02 * truth


def test_the_pull_of_the_localization():
    nbeta, gamma = 40.0, 30.0
    a = nbeta * torch.linspace(0.3, 5.0, 40, dtype=torch.float64)
    sampler = SGLD(0.4 / (a.max().item() + gamma), gamma, nbeta, 12, 1500, 200, None, momentum=0.0)
    checks = run(Quadratic(a / nbeta, torch.zeros(40, dtype=torch.float64)), sampler, 0).checks
    truth = ((gamma / (a + gamma)).sum() / (a / (a + gamma)).sum()).item()
    assert checks.pull == pytest.approx(truth, rel=0.05)
    assert checks.pull > checks.held > 0


@pytest.mark.parametrize(("burn_in", "draws", "kappa"), [(0, 100, 0.02), (50, 100, 0.01), (20, 400, 0.005)])
def test_steps_that_are_too_few_for_the_steepest_direction(burn_in, draws, kappa):
    """Of many directions alike, started at 0, λ̂ lacks the share that is foretold."""
    h, nbeta, gamma = torch.full((300,), 2.0, dtype=torch.float64), 50.0, 1.0
    sampler = SGLD(kappa / 101, gamma, nbeta, 8, draws, burn_in, None, momentum=0.0)
    chains = run(Quadratic(h, torch.zeros(300, dtype=torch.float64)), sampler, 0)
    mean, error = mean_and_error(excess_losses(chains, nbeta))
    truth = 300 / 2 * 100 / 101
    assert abs(mean / truth - (1 - chains.checks.unsettled)) < 4 * error / truth
    assert error < 0.03 * truth
    assert chains.checks.unsettled > 0.1


def test_draws_below_the_snapshot_are_counted():
    h = torch.full((10,), 2.0, dtype=torch.float64)
    target = Quadratic(h, torch.zeros(10, dtype=torch.float64))
    sampler = SGLD(1e-3, 1.0, 50.0, 4, 400, 50, None)
    (at_minimum,) = run_chains(target, torch.zeros(1, 10, dtype=torch.float64), sampler, 0)
    (above_it,) = run_chains(target, torch.full((1, 10), 0.5, dtype=torch.float64), sampler, 0)
    assert at_minimum.checks.below == 0
    assert above_it.checks.below > 0.9


# The step by curvature


@pytest.mark.parametrize("method", ["sgld", "langevin"])
def test_kappa_makes_the_step(method):
    h = torch.logspace(-2, 1, 30, dtype=torch.float64)
    sampler = SGLD(None, 3.0, 20.0, 3, 40, 40, None, method, kappa=0.6)
    chains = run(Quadratic(h, torch.zeros(30, dtype=torch.float64)), sampler, 0)
    assert chains.checks.step_size == pytest.approx(0.6 / (20 * 10 + 3), rel=0.02)
    assert chains.checks.kappa == pytest.approx(0.6, rel=0.02)


@pytest.mark.parametrize("method", ["sgld", "langevin"])
def test_steps_shrink_where_curvature_grows_along_the_chains(method):
    """L = ½ Σ u²v² has no curvature at 0, where the chains start, and plenty where they go."""

    class Products(Quadratic):
        def losses(self, weights, which):
            u, v = weights.chunk(2, dim=-1)
            return (u * v).square().sum(-1).expand(len(which)) / 2

        def losses_and_grads(self, weights, which):
            u, v = weights.chunk(2, dim=-1)
            return self.losses(weights, which), torch.cat([u * v**2, u**2 * v], -1)

    centre = torch.zeros(32, dtype=torch.float64)
    sampler = SGLD(None, 10.0, 3000.0, 8, 2500, 500, None, method, kappa=0.5)
    chains = run(Products(centre, centre), sampler, 0)
    assert chains.checks.step_size < 0.2 * 0.5 / 10.0
    mean, error = mean_and_error(excess_losses(chains, 3000.0))
    reach = np.linspace(-8, 8, 4001) / math.sqrt(10)
    u, v = np.meshgrid(reach, reach)
    loss = u**2 * v**2 / 2
    weight = np.exp(-3000 * loss - 5 * (u**2 + v**2))
    truth = 16 * (3000 * loss * weight).sum() / weight.sum()
    bias = {"sgld": 0.5 / 4 / (1 - 0.5 / 4), "langevin": 0.03}[method]  # the first is the quadratics'
    assert abs(mean - truth) < 4 * error + bias * truth
    assert error < 0.015 * truth


def test_mala_finds_its_step():
    h = torch.full((50,), 2.0, dtype=torch.float64)
    sampler = SGLD(1e-6, 1.0, 50.0, 4, 300, 400, None, "mala")
    chains = run(Quadratic(h, torch.zeros(50, dtype=torch.float64)), sampler, 0)
    assert 0.5 < chains.acceptance < 0.7
    assert chains.checks.step_size > 1e-3


# The chains against the obvious loop


SMALL = SGLD(0.01, 3.0, 20.0, chains=3, draws=20, burn_in=7, batch_size=1)


@pytest.mark.parametrize(("method", "momentum"), [("sgld", 0), ("langevin", 0), ("langevin", 0.6)])
def test_chains_are_the_obvious_loop(method, momentum):
    h, anchor = doubles(0.5, 2.0, 6.0), doubles(1.0, -2.0, 0.3)
    sampler = SGLD(0.01, 3.0, 20.0, 3, 20, 7, 1, method, momentum=momentum)
    target = Quadratic(h, anchor, 0.4, shifts(5))
    chains = run(target, sampler, seed=11)
    for c, order in enumerate(orders(sampler, 11, target)):
        generator = Generator().manual_seed(chain_seed(11, c, 1))
        z = torch.stack([torch.randn(3, generator=generator, dtype=torch.float64) for _ in range(28)])
        p = z[0]
        w = anchor.clone() if method == "sgld" else anchor + 0.1 / 2 * p
        for step in range(27):
            shift = target.shifts[order[step]]
            away = w - anchor
            loss = (h * away**2).sum() / 2 + shift + 0.4 * shift * away.sum()
            if step >= 7:
                assert chains.losses[c, step - 7] == pytest.approx(loss.item(), rel=1e-12)
                assert chains.reference[c, step - 7] == pytest.approx(shift.item(), rel=1e-12)
            force = -(20.0 * (h * away + 0.4 * shift) + 3.0 * away)
            if method == "sgld":
                w = w + 0.005 * force + 0.1 * z[step]
            else:
                p = p + 0.1 * force
                w = w + 0.1 / 2 * p
                p = momentum * p + math.sqrt(1 - momentum**2) * z[step + 1]
                w = w + 0.1 / 2 * p


@pytest.mark.parametrize("method", ["sgld", "langevin", "mala"])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 9, None])
def test_any_grouping_gives_each_anchor_the_chains_it_has_alone(method, rows):
    h, anchors = doubles(0.5, 2.0, 6.0), doubles([1.0, -2.0, 0.3], [0.9, -2.0, 0.3], [1.0, 0.0, 0.0])
    masks = torch.tensor([[True, True, True], [False, True, True], [True, False, True]])
    sampler = SGLD(0.01, 3.0, 20.0, 3, 20, 7, 1 if method != "mala" else None, method)
    target = Quadratic(
        h, anchors[0], 0.4 if method != "mala" else 0.0, shifts(5) if method != "mala" else shifts(2)[:1]
    )
    together = run_chains(target, anchors, sampler, 4, masks=masks, rows=rows)
    for i, found in enumerate(together):
        (alone,) = run_chains(target, anchors[i : i + 1], sampler, 4, masks=masks[i : i + 1])
        np.testing.assert_allclose(found.losses, alone.losses, rtol=1e-10)
        np.testing.assert_allclose(found.reference, alone.reference, rtol=1e-10)
        assert found.acceptance == pytest.approx(alone.acceptance, rel=1e-6)
        for name in ("step_size", "kappa", "curvature", "unsettled", "noise", "slid", "pull", "below"):
            of_both = getattr(found.checks, name), getattr(alone.checks, name)
            assert of_both[0] == pytest.approx(of_both[1], rel=1e-6, nan_ok=True)


def test_parts_of_one_snapshot_share_its_reference():
    class Counts(Quadratic):
        asked = 0

        def losses(self, weights, which):
            self.asked += len(which) if weights.ndim == 1 else 0
            return super().losses(weights, which)

    anchor = doubles(1.0, -2.0)
    target = Counts(doubles(0.5, 2.0), anchor, shifts=shifts(16))
    masks = [None, torch.tensor([True, False]), torch.tensor([False, True])]
    parts = run_chains(target, [anchor] * 3, SMALL, 0, masks=masks)
    assert target.asked == 16
    assert len({chains.losses.mean() for chains in parts}) == 3


def test_masked_weights_stay():
    h, anchor = doubles(0.5, 2.0, 6.0, 1.0), doubles(1.0, -2.0, 0.3, 4.0)
    target = Quadratic(h, anchor + 1)  # so that each of them has a gradient
    (alone,) = run_chains(target, anchor.unsqueeze(0), SMALL, 0, masks=torch.tensor([[False, True, False, True]]))
    assert all((weights[:, [0, 2]] == anchor[[0, 2]]).all() for weights in target.calls)
    assert any((weights[:, 1] != anchor[1]).any() for weights in target.calls)
    assert any((weights[:, 3] != anchor[3]).any() for weights in target.calls)
    assert alone.losses.std() > 0


def test_results_are_float64_of_shape_chain_draw_whatever_the_weights():
    chains = run(Quadratic(torch.tensor([0.5, 2.0]), torch.tensor([1.0, -2.0])), SMALL, seed=0)
    assert chains.losses.shape == chains.reference.shape == (3, 20)
    assert chains.losses.dtype == chains.reference.dtype == np.float64
    assert 0 < chains.acceptance <= 1


def test_the_anchor_is_left_as_it_is():
    target = Quadratic(doubles(0.5, 2.0), doubles(1.0, -2.0))
    run(target, SMALL, seed=0)
    assert torch.equal(target.centre, doubles(1.0, -2.0))


def test_global_randomness_is_neither_used_nor_moved():
    target = Quadratic(doubles(0.5, 2.0), doubles(1.0, -2.0), shifts=shifts(5))
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(run(target, SMALL, seed=4))
        assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(found[0].losses, found[1].losses)
    assert found[0].acceptance == found[1].acceptance


def test_a_chain_is_the_same_however_many_there_are():
    target = Quadratic(doubles(0.5, 2.0), doubles(1.0, -2.0), 0.4, shifts(7))
    few, many = (run(target, SGLD(0.01, 3.0, 20.0, chains, 20, 7, 1), seed=4) for chains in (2, 9))
    np.testing.assert_array_equal(few.losses, many.losses[:2])
    np.testing.assert_array_equal(few.reference, many.reference[:2])


def test_seeds_chains_and_purposes_have_streams_of_their_own():
    seeds = [chain_seed(*key) for key in itertools.product((0, 1, 2**31), range(20), range(5))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


# Common random numbers


def neighbours(seed: int, other_seed: int) -> tuple[np.ndarray, np.ndarray]:
    """λ̂ of each chain at two neighbouring anchors, shape (chain,) each."""
    sampler = SGLD(step_size=2e-3, localization=7.0, nbeta=30.0, chains=16, draws=100, burn_in=50, batch_size=1)
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


def nowhere(chains) -> bool:
    return np.isnan(chains.losses).all() and np.isnan(chains.reference).all() and math.isnan(chains.acceptance)


def test_unstable_steps_leave_nothing_but_nan():
    target = Quadratic(torch.tensor([0.5, 2.0]), torch.tensor([1.0, -2.0]))
    sampler = SGLD(step_size=5.0, localization=0.5, nbeta=20.0, chains=2, draws=500, burn_in=100, batch_size=1)
    chains = run(target, sampler, seed=0)
    assert chains.losses.shape == chains.reference.shape == (2, 500)
    assert nowhere(chains)
    assert len(target.calls) < 100  # it doesn't go on with what can't come back


def test_one_anchor_that_diverges_leaves_the_others():
    class Bounded(Quadratic):
        def losses_and_grads(self, weights, which):
            losses, grads = super().losses_and_grads(weights, which)
            return torch.where(weights.amax(-1) > 8, math.inf, losses), grads

    target = Bounded(doubles(0.5, 2.0), doubles(1.0, -2.0))
    anchors = doubles([1.0, -2.0], [9.0, 9.0])
    sampler = replace(SMALL, burn_in=0)
    first, second = run_chains(target, anchors, sampler, 0)
    (alone,) = run_chains(target, anchors[:1], sampler, 0)
    np.testing.assert_array_equal(first.losses, alone.losses)
    assert nowhere(second)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("last", range(1, 18))
def test_one_loss_near_the_end_that_is_not_finite(bad, last):
    """Of the second chain, which meets each of as many minibatches as there are steps once."""

    class Breaks(Quadratic):
        def losses_and_grads(self, weights, which):
            losses, grads = super().losses_and_grads(weights, which)
            if len(which) == SMALL.chains and which[1] == number:
                losses[1] = bad
            return losses, grads

    target = Breaks(doubles(0.5, 2.0), doubles(1.0, -2.0), shifts=shifts(27))
    number = orders(SMALL, 0, target)[1, 27 - last]
    assert nowhere(run(target, SMALL, seed=0))


def test_a_loss_that_refuses_what_the_chains_do_is_a_divergence():
    class Refuses(Quadratic):
        def losses_and_grads(self, weights, which):
            if weights.abs().max() > 10:
                raise ValueError("these are no probabilities")
            return super().losses_and_grads(weights, which)

    target = Refuses(torch.tensor([0.5, 2.0]), torch.tensor([1.0, -2.0]))
    sampler = SGLD(step_size=0.5, localization=0.0, nbeta=20.0, chains=2, draws=40, burn_in=0, batch_size=1)
    assert nowhere(run(target, sampler, seed=0))
    stiller = torch.tensor([[1.0, -2.0], [1.0, -2.0]])
    masks = torch.tensor([[True, True], [False, False]])
    first, second = run_chains(target, stiller, sampler, 0, masks=masks)
    assert nowhere(first)
    assert not nowhere(second)


@pytest.mark.parametrize("limit", [1e-9, 0.5])
def test_a_loss_that_refuses_what_is_around_the_anchor_is_a_divergence(limit):
    class Refuses(Quadratic):
        def losses_and_grads(self, weights, which):
            if not (weights - self.centre).abs().max() < limit:
                raise ValueError("these are no probabilities")
            return super().losses_and_grads(weights, which)

    target = Refuses(doubles(0.5, 2.0), doubles(1.0, -2.0))
    sampler = SGLD(localization=0.1, nbeta=1.0, chains=2, draws=400, burn_in=0, batch_size=1)
    assert nowhere(run(target, sampler, seed=0))


@pytest.mark.parametrize("rows", [1, 2, 3, None])
def test_diverged_chains_are_as_many_as_were_asked_for(rows):
    target = Quadratic(torch.tensor([0.5, 2.0]), torch.tensor([1.0, -2.0]))
    sampler = SGLD(step_size=5.0, localization=0.5, nbeta=20.0, chains=3, draws=50, burn_in=10, batch_size=1)
    chains = run(target, sampler, seed=0, rows=rows)
    assert chains.losses.shape == chains.reference.shape == (3, 50)
    assert nowhere(chains)


def test_a_loss_that_fails_at_the_anchor_too_is_no_divergence():
    class Broken(Quadratic):
        def losses(self, weights, which):
            raise ValueError("no such column")

        losses_and_grads = losses

    with pytest.raises(ValueError, match="no such column"):
        run(Broken(torch.tensor([0.5, 2.0]), torch.tensor([1.0, -2.0])), SGLD(), seed=0)


# Memory


def test_where_memory_runs_out_fewer_run_together():
    class Tight(Quadratic):
        def losses_and_grads(self, weights, which):
            if len(weights) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().losses_and_grads(weights, which)

    anchors = doubles([1.0, -2.0], [0.5, -2.0])
    h = doubles(0.5, 2.0)
    tight = run_chains(Tight(h, anchors[0]), anchors, SMALL, 0)
    roomy = run_chains(Quadratic(h, anchors[0]), anchors, SMALL, 0)
    for a, b in zip(tight, roomy, strict=True):
        np.testing.assert_allclose(a.losses, b.losses, rtol=1e-12)


def test_no_memory_for_one_chain_is_a_sentence():
    class Full(Quadratic):
        def losses_and_grads(self, weights, which):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(PhasewatchError, match=r"no memory for one chain of 2 parameters with SGLD\(batch_size=1\)"):
        run(Full(doubles(0.5, 2.0), doubles(1.0, -2.0)), SMALL, seed=0)
