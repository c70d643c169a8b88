"""Chains around snapshots: all chains of all of them as one vectorised axis."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Generator, Tensor

from phasewatch.monitor.batches import order_of_minibatches
from phasewatch.monitor.checks import Checks
from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.sgld import SGLD, metropolis_acceptance, sgld_step
from phasewatch.monitor.survey import Survey, Target, survey
from phasewatch.monitor.uncertainty import standard_error

LOOKS = 4
"""Draws at which acceptance and curvature are worked out; each costs a gradient."""

FOLLOWED = 8
"""First steps at which curvature is followed to hold κ, and steps from one time to the next after them."""

ROUNDS_TO_KAPPA = 3
"""Times that the first step is taken anew with the step size that the curvature at its end asks for."""

PRODUCTS = 256, 16
"""Draws at which the chains' positions and gradients are multiplied, which costs no gradient, and chains at most."""

WORTH_PREPARING = 2000
"""Steps of all chains that run together from which making ready for them pays."""

TARGET_ACCEPTANCE = 0.6
"""What Metropolis-adjusted chains adapt their step to (0.574 is best in many dimensions, Roberts & Rosenthal 1998)."""


@dataclass(frozen=True)
class Chains:
    """What the chains around a snapshot saw after the burn-in; NaN throughout if a loss was not finite.

    Attributes:
        losses: minibatch losses L_m(w), shape (chain, draw), float64.
        reference: L_m(w*) on the same minibatches, shape (chain, draw), float64.
        acceptance: mean Metropolis acceptance probability of the steps, each on its own minibatch.
        checks: what else there is to judge them by.
    """

    losses: np.ndarray
    reference: np.ndarray
    acceptance: float
    checks: Checks

    @classmethod
    def nowhere(cls, sampler: SGLD, checks: Checks = Checks()) -> Self:  # noqa: B008 - it is frozen
        """Of chains that diverged."""
        nothing = np.full((sampler.chains, sampler.draws), np.nan)
        return cls(nothing, nothing, math.nan, checks)


def chain_seed(seed: int, chain: int, purpose: int) -> int:
    """A seed of its own for each chain and purpose, the same for every snapshot."""
    return int(np.random.SeedSequence([seed, chain, purpose]).generate_state(1, np.uint64)[0] >> 1)


def orders(sampler: SGLD, seed: int, target: Target) -> Tensor:
    """Which minibatch each chain takes at each step, shape (chain, step).

    Unless the minibatches are all there is, each chain has some of its own, so that the spread of the chains shows what
    the choice of minibatches adds to the error.
    """
    steps, apart = sampler.burn_in + sampler.draws, 1 if target.whole else sampler.chains
    found = []
    for chain in range(sampler.chains):
        own = torch.arange(chain % apart, target.minibatches, apart, device="cpu")
        found.append(order_of_minibatches(own, steps, Generator().manual_seed(chain_seed(seed, chain, 0))))
    return torch.stack(found)


def run_chains(
    target: Target, anchors: Tensor, sampler: SGLD, seed: int, *, masks: Tensor | None = None, rows: int | None = None
) -> list[Chains]:
    """Sample around anchors with noise and minibatches that depend on the seed and the chain alone.

    Neighbouring snapshots so share them, and the difference of their estimates is far better known than either. Each
    loss is taken on the minibatch of the step that follows it, and paired with the anchor's loss on that same
    minibatch.

    Args:
        target: the loss to sample.
        anchors: w*, shape (anchor, parameter).
        sampler: the settings.
        seed: seed of the noise and the minibatches.
        masks: which weights move around each anchor, booleans of shape (anchor, parameter); all if None.
        rows: chains of all anchors that run at a time; all if None, and fewer where memory runs out.

    Returns:
        The paired losses of each anchor. Chains with a loss that isn't finite are given up, since there is nothing to
        come back to.

    Raises:
        PhasewatchError: if memory runs out with one chain at a time.
    """
    wanted = len(anchors) * sampler.chains if rows is None else rows
    while True:
        try:
            return list(_in_groups(target, anchors, sampler, seed, masks, wanted))
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            if wanted == 1:
                raise PhasewatchError(
                    f"There is no memory for one chain of {anchors.shape[1]} parameters with "
                    f"SGLD(batch_size={sampler.batch_size}). Lower the batch_size, or give Probe(device=...) with more."
                ) from error
        wanted = max(1, wanted // 2)
        if anchors.is_cuda:
            torch.cuda.empty_cache()


def _in_groups(
    target: Target, anchors: Tensor, sampler: SGLD, seed: int, masks: Tensor | None, rows: int
) -> Iterator[Chains]:
    """Whole anchors at a time if they fit, else some chains of one at a time."""
    at_once = max(1, rows // sampler.chains)
    for start in range(0, len(anchors), at_once):
        here = range(start, min(start + at_once, len(anchors)))
        some, kept = anchors[start : here.stop], None if masks is None else masks[start : here.stop]
        grounds = [
            _ground(target, anchor, None if kept is None else kept[i], sampler, seed, rows)
            for i, anchor in enumerate(some)
        ]
        parts = [
            _walk(target, grounds, sampler, seed, chains.tolist())
            for chains in torch.arange(sampler.chains).split(min(rows, sampler.chains))
        ]
        yield from (_joined(of_one) for of_one in zip(*parts, strict=True))


def _joined(parts: tuple[Chains, ...]) -> Chains:
    """The chains of one anchor, put together."""
    if len(parts) == 1:
        return parts[0]
    losses, reference = (np.concatenate([getattr(p, name) for p in parts]) for name in ("losses", "reference"))
    sizes = [len(p.losses) for p in parts]

    def mean(values: list[float]) -> float:
        return float(np.average(values, weights=sizes))

    means = {name: mean([getattr(p.checks, name) for p in parts]) for name in ("overshoot", "pull", "below")}
    kappa = max(p.checks.kappa for p in parts)
    unknown = dict.fromkeys(("slid", "slid_error", "held", "held_error"), math.nan)
    checks = replace(parts[0].checks, kappa=kappa, **unknown, **means)
    return Chains(losses, reference, mean([p.acceptance for p in parts]), checks)


@dataclass(frozen=True)
class _Ground:
    """An anchor, the weights that move around it, and what is known of it before a chain is run."""

    anchor: Tensor
    mask: Tensor | None
    reference: Tensor
    survey: Survey
    step_size: float


def _ground(target: Target, anchor: Tensor, mask: Tensor | None, sampler: SGLD, seed: int, rows: int) -> _Ground:
    numbers = torch.arange(target.minibatches, device=anchor.device)
    reference = torch.cat([target.losses(anchor, some) for some in numbers.split(rows)])
    generator = Generator(anchor.device).manual_seed(chain_seed(seed, 0, 3))
    scale = {"nbeta": sampler.nbeta, "gamma": sampler.localization}
    found = survey(target, anchor, mask, means=sampler.chains, rows=rows, **scale, generator=generator)
    if sampler.kappa is None:
        step_size = sampler.step_size
    else:
        stiffness = sampler.nbeta * found.curvature + sampler.localization
        step_size = sampler.kappa / max(stiffness, torch.finfo(torch.float32).tiny)
    assert step_size is not None
    return _Ground(anchor, mask, reference, found, step_size)


def _walk(target: Target, grounds: list[_Ground], sampler: SGLD, seed: int, chains: list[int]) -> list[Chains]:
    """Run some of the chains of some anchors to their end."""
    make = _Metropolis if sampler.method == "mala" else _Langevin
    walk = make(target, grounds, sampler, seed, chains)
    steps, draws = sampler.burn_in + sampler.draws, []
    if steps * len(grounds) * len(chains) >= WORTH_PREPARING:
        target.prepare(len(grounds) * len(chains))
    for step in range(steps):
        if not walk.advance(step):
            if len(grounds) == 1:
                return [Chains.nowhere(sampler)]
            # One of them is what the model refuses.
            return [_walk(target, [ground], sampler, seed, chains)[0] for ground in grounds]
        if step % 16 == 0 and not walk.losses.isfinite().all(1).any():
            return [Chains.nowhere(sampler) for _ in grounds]
        if step >= sampler.burn_in:
            draws.append(walk.losses)
    losses = torch.stack(draws, dim=-1).double().cpu().numpy()
    reference = torch.stack([ground.reference for ground in grounds]).double().cpu().numpy()
    reference = reference[:, walk.orders[:, sampler.burn_in :].numpy()]
    return [
        Chains(losses[i], reference[i], *walk.verdicts(i, losses[i] - reference[i], ground))
        if np.isfinite(losses[i]).all() and np.isfinite(reference[i]).all()
        else Chains.nowhere(sampler)
        for i, ground in enumerate(grounds)
    ]


def _stacked(vectors: list[Tensor]) -> Tensor:
    """A vector of each anchor for all of its chains, shape (anchor, 1, parameter); that of one anchor isn't copied."""
    return (vectors[0].unsqueeze(0) if len(vectors) == 1 else torch.stack(vectors)).unsqueeze(1)


class _Walk:
    """Chains on their way; leading axes are (anchor, chain)."""

    def __init__(self, target: Target, grounds: list[_Ground], sampler: SGLD, seed: int, chains: list[int]) -> None:
        self.target = target
        self.sampler = sampler
        self.anchors = anchors = _stacked([ground.anchor for ground in grounds])
        masks = [ground.mask for ground in grounds if ground.mask is not None]
        self.masks = _stacked(masks).to(anchors) if masks else None
        self.w = self.anchors.repeat(1, len(chains), 1)
        self.eps = anchors.new_tensor([ground.step_size for ground in grounds]).view(-1, 1, 1)
        self.orders = orders(sampler, seed, target)[chains]
        self._numbers = self.orders.to(anchors.device)
        self._noises, self._others = (
            [Generator(anchors.device).manual_seed(chain_seed(seed, c, purpose)) for c in chains] for purpose in (1, 4)
        )
        self._steepest = _stacked([ground.survey.direction for ground in grounds])
        self._curvature = anchors.new_tensor([ground.survey.curvature for ground in grounds]).unsqueeze(1)
        self._largest = self._curvature.amax(1)
        self._acceptance: list[Tensor] = []
        self._products: list[Tensor] = []
        self._slopes = _stacked([ground.survey.gradient for ground in grounds])
        self._scale = {"nbeta": sampler.nbeta, "gamma": sampler.localization}
        self.losses = self.w.new_empty(self.w.shape[:2])
        draws = sampler.burn_in + np.arange(sampler.draws)
        self._accepts = set(draws[:: -(-sampler.draws // LOOKS)].tolist())
        followed = () if sampler.kappa is None else range(sampler.burn_in + sampler.draws)
        self._looks = self._accepts | {step for step in followed if step < FOLLOWED or step % FOLLOWED == 0}
        self._multiplied = set(draws[:: -(-sampler.draws // PRODUCTS[0])].tolist())

    def advance(self, step: int) -> bool:
        """Take a step, and leave the loss of this draw in `losses`; False where the model refuses the weights."""
        raise NotImplementedError

    def evaluate(self, at: Tensor, step: int) -> tuple[Tensor, Tensor] | None:
        """Losses (anchor, chain) and masked gradients, or None for weights that the model refuses."""
        which = self._numbers[:, step].repeat(len(at))
        try:
            losses, grads = self.target.losses_and_grads(at.reshape(-1, at.shape[-1]), which)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            # This raises too if it isn't the weights that the model refuses.
            self.target.losses_and_grads(self.anchors[0].expand(len(which), -1), which)
            return None
        grads = grads.view(at.shape)
        return losses.view(at.shape[:2]), grads if self.masks is None else grads.mul_(self.masks)

    def noise(self, *, other: bool = False) -> Tensor:
        """Standard normal for the weights that move, the same around each anchor, shape (chain, parameter) or more.

        Args:
            other: of a second stream, which the chains never see.
        """
        generators = self._others if other else self._noises
        drawn = self.w.new_empty(len(generators), self.w.shape[-1])
        for chain, generator in zip(drawn, generators, strict=True):
            chain.normal_(generator=generator)
        return drawn if self.masks is None else drawn * self.masks

    def multiply(self, at: Tensor, grads: Tensor) -> None:
        """Products of the chains' gradients and displacements with each other's and with themselves."""
        at, grads = at[:, : PRODUCTS[1]], grads[:, : PRODUCTS[1]]
        away = at - self.anchors
        own = [grads.square().sum(-1), away.square().sum(-1), (away * self._slopes).sum(-1)]
        self._products.append(torch.cat([away @ grads.mT, torch.stack(own, -1)], -1).double())

    def look(self, at: Tensor, grads: Tensor, step: int) -> bool:
        """A step of power iteration for each chain at `at`; False where the model refuses the weights."""
        nbeta, gamma = self.sampler.nbeta, self.sampler.localization
        reach = (nbeta * self._curvature + gamma).clamp_min(1e-12).rsqrt().unsqueeze(-1)
        there = self.evaluate(at + reach * self._steepest, step)
        if there is None:
            return False
        turned = there[1].sub_(grads).div_(reach)
        length = turned.norm(dim=-1)
        usable = length.isfinite() & (length > 0)
        self._curvature = torch.where(usable, length, self._curvature)
        self._steepest = torch.where(usable.unsqueeze(-1), turned / length.unsqueeze(-1), self._steepest)
        self._largest = torch.maximum(self._largest, self._curvature.amax(1))
        return True

    def verdicts(self, i: int, above: np.ndarray, ground: _Ground) -> tuple[float, Checks]:
        """Acceptance and checks of one anchor.

        Args:
            i: its number.
            above: L_m(w) − L_m(w*), shape (chain, draw).
            ground: what was known of it before.
        """
        sampler, nbeta, gamma = self.sampler, self.sampler.nbeta, self.sampler.localization
        eps, curvature, here = self.eps[i].item(), max(self._largest[i].item(), 0.0), ground.survey
        products = torch.stack(self._products)[:, i].cpu().numpy()
        pushes, (squares, distances, slid) = products[..., :-3], np.moveaxis(products[..., -3:], -1, 0)
        own = float(np.trace(pushes.mean(0)) / len(pushes[0]))
        alone = self.target.minibatches == 1
        held, held_error = _held(nbeta * pushes, nbeta * float(above.mean()), alone=alone)
        keep = sampler.momentum or 0.0
        heat = (1 + keep) / (1 - keep)
        kappa = eps * (nbeta * curvature + gamma)
        steepness = 2 * max(here.curvature, gamma / nbeta if nbeta else 0.0)
        checks = Checks(
            step_size=eps,
            kappa=kappa,
            unsettled=_unsettled(min(kappa * heat, -math.log(keep) if keep else math.inf), sampler),
            descent=nbeta * here.slope / steepness if steepness else math.inf,
            descent_error=nbeta * here.slope_error / steepness if steepness else math.nan,
            slid=-nbeta * float(slid.mean()) / 2 if alone else math.nan,
            slid_error=nbeta * standard_error(slid.mean(0)) / 2 if alone else math.nan,
            overshoot=eps * nbeta / 8 * (nbeta * float(squares.mean()) + gamma * own - nbeta * here.noise),
            noise=eps * nbeta**2 * here.noise / 8 * heat,
            held=held,
            held_error=held_error,
            pull=gamma * float(distances.mean()) / (nbeta * own) if own > 0 else math.nan,
            below=float((nbeta * above < -1).mean()) if alone else math.nan,
        )
        return torch.stack(self._acceptance)[:, i].mean().item(), checks


def _unsettled(rate: float, sampler: SGLD) -> float:
    """The share of its stationary λ̂ that a direction from 0 lacks, on average over the draws.

    Args:
        rate: at which its square relaxes, in one over steps; κ for plain steps, since E[w²] ∝ 1 − exp(−κ·t).
        sampler: how many steps.
    """
    during = rate * sampler.draws
    return math.exp(-rate * sampler.burn_in) * (-math.expm1(-during) / during if during else 1.0)


def _held(pushes: np.ndarray, value: float, *, alone: bool) -> tuple[float, float]:
    """The share of λ̂ that the localization holds back, and its standard error by leaving out a chain at a time.

    On a quadratic with a = nβ·h, independent chains c and d have E[δ_c·∇_c] = Σ a/(a + γ) = 2λ̂ and
    E[(δ_c·∇_d)·(δ_d·∇_c)] = ½ Var(δ_c·∇_c) = Σ a²/(a + γ)², and −dλ̂/d log γ is half of the difference of the two.

    Args:
        pushes: δ_c·∇_d of the chains' displacements with nβ times their gradients, shape (draw, chain, chain).
        value: λ̂; a loss for which it isn't nearly half the first of these isn't nearly quadratic.
        alone: whether all steps are of one minibatch; the noise of others is in that variance.

    Returns:
        The share and its error, NaN where they can't be had.
    """
    chains = pushes.shape[1]
    own = np.trace(pushes.mean(0))
    if chains < 3 or own <= 0 or value <= 0 or not 0.7 < own / chains / (2 * value) < 1.4:
        return math.nan, math.nan

    def share(kept: list[int]) -> float:
        some = pushes[:, kept][:, :, kept]
        both = some * some.transpose(0, 2, 1)
        diagonal = np.einsum("tcc->tc", some)
        squares, count = (both.sum() - np.einsum("tcc->", both)) / 2, len(kept) * (len(kept) - 1) / 2
        if alone:
            squares, count = squares + diagonal.var(ddof=1) * diagonal.size / 2, count + len(kept)
        return 1 - squares / len(some) / count / diagonal.mean()

    left_out = [share([c for c in range(chains) if c != out]) for out in range(chains)]
    return float(share(list(range(chains)))), float(np.std(left_out) * math.sqrt(chains - 1))


class _Langevin(_Walk):
    """SGLD, and underdamped Langevin dynamics in the BAOAB splitting (Leimkuhler & Matthews 2013).

    Of the latter, w is where the chains are between two half steps, and what is evaluated is w + √ε/2 · p, with
    p ← a·p + √(1 − a²)·noise before it and p ← p − √ε·(nβ·∇L + γ·(w − w*)) after it. Without momentum (a = 0) no p need
    be kept.
    """

    _p: Tensor | None = None

    def advance(self, step: int) -> bool:
        """Take a step; the first one anew until ε holds κ where it leads."""
        keep = self.sampler.momentum or 0.0
        noise = self.noise()
        p = noise if self._p is None else self._p.mul_(keep).add_(noise, alpha=math.sqrt(1 - keep**2))
        found = self._evaluated(p, step)
        for _ in range(ROUNDS_TO_KAPPA if step == 0 and self.sampler.kappa is not None else 0):
            found = found and self._evaluated(p, step)
        if found is None:
            return False
        at, grads = found
        if step in self._accepts and not self._accept(at, grads, step):
            return False
        if step in self._multiplied:
            self.multiply(at, grads)
        if self.sampler.method == "sgld":
            self.w = sgld_step(at, self.anchors, grads, noise, **self._scale, eps=self.eps)
            return True
        force = grads.mul_(-self.sampler.nbeta).add_(at - self.anchors, alpha=-self.sampler.localization)
        if keep:
            p = self._p = p.addcmul(force, self.eps**0.5)
            self.w = at.addcmul_(self.eps**0.5 / 2, p)
        else:
            self.w = at.addcmul_(self.eps**0.5 / 2, p).addcmul_(self.eps / 2, force)
        return True

    def _evaluated(self, p: Tensor, step: int) -> tuple[Tensor, Tensor] | None:
        """Where the chains are and the gradient there, after lowering ε to κ; None where the model refuses it."""
        at = self.w if self.sampler.method == "sgld" else torch.addcmul(self.w, self.eps**0.5 / 2, p)
        here = self.evaluate(at, step)
        if here is None or (step in self._looks and not self.look(at, here[1], step)):
            return None
        self.losses = here[0]
        if self.sampler.kappa is not None:
            stiffness = self.sampler.nbeta * self._largest + self.sampler.localization
            self.eps = torch.minimum(self.eps, (self.sampler.kappa / stiffness).view(-1, 1, 1))
        return at, here[1]

    def _accept(self, at: Tensor, grads: Tensor, step: int) -> bool:
        """The acceptance that a plain Langevin step would have; False where the model refuses where it goes."""
        proposal = sgld_step(at, self.anchors, grads, self.noise(other=True), **self._scale, eps=self.eps)
        there = self.evaluate(proposal, step)
        if there is None:
            return False
        accepted = metropolis_acceptance(
            at, proposal, self.anchors, self.losses, there[0], grads, there[1], **self._scale, eps=self.eps
        )
        self._acceptance.append(accepted.mean(1))
        return True


class _Metropolis(_Walk):
    """Metropolis-adjusted Langevin steps, of a size adapted in the burn-in."""

    def advance(self, step: int) -> bool:
        if step == 0:
            here = self.evaluate(self.w, step)
            if here is None:
                return False
            self.losses, self._grads = here
        noise = self.noise()
        drawn = [torch.rand((), generator=g, dtype=torch.float64, device=self.w.device) for g in self._noises]
        proposal = sgld_step(self.w, self.anchors, self._grads, noise, **self._scale, eps=self.eps)
        there = self.evaluate(proposal, step)
        if there is None:
            return False
        probability = metropolis_acceptance(
            self.w, proposal, self.anchors, self.losses, there[0], self._grads, there[1], **self._scale, eps=self.eps
        ).nan_to_num(0.0)
        taken = torch.stack(drawn) < probability
        self.w = torch.where(taken.unsqueeze(-1), proposal, self.w)
        self._grads = torch.where(taken.unsqueeze(-1), there[1], self._grads)
        self.losses = torch.where(taken, there[0], self.losses)
        accepted = probability.mean(1)
        if step < self.sampler.burn_in:
            gain = (1 + step) ** -0.5
            self.eps = self.eps * ((accepted - TARGET_ACCEPTANCE) * gain).exp().to(self.eps).view(-1, 1, 1)
        else:
            self._acceptance.append(accepted)
        if step in self._looks and not self.look(self.w, self._grads, step):
            return False
        if step in self._multiplied:
            self.multiply(self.w, self._grads)
        return True
