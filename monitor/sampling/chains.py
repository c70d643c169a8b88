"""Chains around snapshots: all chains of all of them as one vectorised axis."""

import enum
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Generator, Tensor

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.estimates.checks import Checks
from phasewatch.monitor.estimates.uncertainty import standard_error
from phasewatch.monitor.model.minibatches import order_of_minibatches
from phasewatch.monitor.sampling.curvature import (
    ITERATIONS,
    ROUNDS,
    Refused,
    Survey,
    Target,
    attempt,
    power_step,
    reach_of,
    survey,
)
from phasewatch.monitor.sampling.settings import SGLD, metropolis_acceptance, sgld_step

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
    def nowhere(cls, sampler: SGLD) -> Self:
        """Of chains that diverged."""
        nothing = np.full((sampler.chains, sampler.draws), np.nan)
        return cls(nothing, nothing, math.nan, Checks())


class Stream(enum.IntEnum):
    """What a seed is for."""

    ORDER = 0
    NOISE = 1
    MINIBATCHES = 2
    SURVEY = 3
    PROPOSALS = 4


def chain_seed(seed: int, chain: int, stream: Stream) -> int:
    """A seed of its own for each chain and stream, the same for every snapshot."""
    return int(np.random.SeedSequence([seed, chain, stream]).generate_state(1, np.uint64)[0] >> 1)


def orders(sampler: SGLD, seed: int, target: Target) -> Tensor:
    """Which minibatch each chain takes at each step, shape (chain, step).

    Unless the minibatches are all there is, each chain has some of its own, so that the spread of the chains shows what
    the choice of minibatches adds to the error.
    """
    steps, apart = sampler.burn_in + sampler.draws, 1 if target.whole else sampler.chains
    found = []
    for chain in range(sampler.chains):
        own = torch.arange(chain % apart, target.minibatches, apart, device="cpu")
        found.append(order_of_minibatches(own, steps, Generator().manual_seed(chain_seed(seed, chain, Stream.ORDER))))
    return torch.stack(found)


def cost_of_a_point(sampler: SGLD, minibatches: int) -> int:
    """Gradient evaluations that a point takes, at most, with a fixed step size and without parts.

    Args:
        sampler: the setting.
        minibatches: how many are kept; L(w*) is taken on each, and counts as a third.
    """
    rows = min(sampler.chains, minibatches)
    surveyed = rows * (min(ROUNDS, minibatches // rows) + ITERATIONS)
    looks = len(range(0, sampler.draws, -(-sampler.draws // LOOKS)))
    return sampler.chains * (sampler.burn_in + sampler.draws + 2 * looks) + surveyed + math.ceil(minibatches / 3)


def run_chains(
    target: Target,
    anchors: Sequence[Tensor] | Tensor,
    sampler: SGLD,
    seed: int,
    *,
    masks: Sequence[Tensor | None] | Tensor | None = None,
    rows: int | None = None,
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
        masks: which weights move around each anchor, booleans of shape (anchor, parameter), None for all; from the
            first again where there are fewer masks than anchors.
        rows: chains of all anchors that run at a time; all if None, and fewer where memory runs out.

    Returns:
        The paired losses of each anchor. Chains with a loss that isn't finite are given up, since there is nothing to
        come back to.

    Raises:
        PhasewatchError: if memory runs out with one chain at a time.
    """
    wanted = len(anchors) * sampler.chains if rows is None else rows
    sampler, masks = sampler.resolved(), (None,) if masks is None else masks
    while True:
        try:
            return list(_in_groups(target, anchors, sampler, seed, masks, wanted))
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            if wanted == 1:
                raise PhasewatchError(
                    f"There is no memory for one chain of {len(anchors[0])} parameters with "
                    f"SGLD(batch_size={sampler.batch_size}). Lower the batch_size, or give Probe(device=...) with more."
                ) from error
        wanted = max(1, wanted // 2)
        if anchors[0].is_cuda:
            torch.cuda.empty_cache()


def _in_groups(
    target: Target,
    anchors: Sequence[Tensor] | Tensor,
    sampler: SGLD,
    seed: int,
    masks: Sequence[Tensor | None] | Tensor,
    rows: int,
) -> Iterator[Chains]:
    """Whole anchors at a time if they fit, else some chains of one at a time."""
    numbers = torch.arange(target.minibatches, device=anchors[0].device)
    last = reference = anchors[0].new_empty(0)
    for group in torch.arange(len(anchors)).split(max(1, rows // sampler.chains)):
        grounds = []
        for i in group.tolist():
            if anchors[i] is not last:  # it is for the parts of one snapshot
                last = anchors[i]
                reference = torch.cat([target.losses(last, some) for some in numbers.split(rows)])
            grounds.append(_ground(target, last, masks[i % len(masks)], reference, sampler, seed, rows))
        traces: list[list[_Trace | None]] = [[] for _ in grounds]
        for chains in torch.arange(sampler.chains).split(min(rows, sampler.chains)):
            walked = iter(_walk(target, [g for g in grounds if g is not None], sampler, seed, chains.tolist()))
            for ground, found in zip(grounds, traces, strict=True):
                found.append(None if ground is None else next(walked))
            if all(found[-1] is None for found in traces):
                break
        for ground, found in zip(grounds, traces, strict=True):
            known = [trace for trace in found if trace is not None]
            if ground is None or len(known) < len(found):
                yield Chains.nowhere(sampler)
            else:
                yield _judged(known, ground, sampler, alone=target.minibatches == 1)


@dataclass(frozen=True)
class _Ground:
    """An anchor, the weights that move around it, and what is known of it before a chain is run."""

    anchor: Tensor
    mask: Tensor | None
    reference: Tensor
    survey: Survey
    step_size: float


def _ground(
    target: Target, anchor: Tensor, mask: Tensor | None, reference: Tensor, sampler: SGLD, seed: int, rows: int
) -> _Ground | None:
    """None where there is nothing that chains could walk on."""
    generator = Generator(anchor.device).manual_seed(chain_seed(seed, 0, Stream.SURVEY))
    scale = {"nbeta": sampler.nbeta, "gamma": sampler.localization}
    mask = None if mask is None else mask.to(anchor)
    try:
        found = survey(target, anchor, mask, means=sampler.chains, rows=rows, **scale, generator=generator)
    except Refused:
        return None
    if not math.isfinite(found.curvature):
        return None
    stiffness = max(sampler.nbeta * found.curvature + sampler.localization, torch.finfo(torch.float32).tiny)
    step_size = sampler.step_size if sampler.kappa is None else sampler.kappa / stiffness
    assert step_size is not None
    return _Ground(anchor, mask, reference, found, step_size)


@dataclass(frozen=True)
class _Trace:
    """What some of the chains around an anchor left behind.

    The numbers of each chain have shape (chain,): `step_size` ε; the largest `curvature` met; and means over the draws
    at which products were taken, by as many chains as PRODUCTS says, of ‖∇L‖² (`squares`), ‖δ‖² (`distances`) and
    ∇L(w*)·δ (`slid`), δ being w − w*. `pushes` is δ_c·∇L_d of shape (draw, chain, chain).
    """

    losses: np.ndarray
    reference: np.ndarray
    acceptance: np.ndarray
    step_size: np.ndarray
    curvature: np.ndarray
    squares: np.ndarray
    distances: np.ndarray
    slid: np.ndarray
    pushes: np.ndarray


def _walk(target: Target, grounds: list[_Ground], sampler: SGLD, seed: int, chains: list[int]) -> list["_Trace | None"]:
    """Run some of the chains of some anchors to their end; None for those that diverge."""
    if not grounds:
        return []
    make = _Metropolis if sampler.method == "mala" else _Langevin
    walk = make(target, grounds, sampler, seed, chains)
    steps, draws = sampler.burn_in + sampler.draws, []
    if steps * len(grounds) * len(chains) >= WORTH_PREPARING:
        target.prepare(len(grounds) * len(chains))
    try:
        for step in range(steps):
            walk.advance(step)
            if step % 16 == 0 and not walk.losses.isfinite().all(1).any():
                return [None for _ in grounds]
            if step >= sampler.burn_in:
                draws.append(walk.losses)
    except Refused:
        if len(grounds) == 1:
            return [None]
        return [_walk(target, [ground], sampler, seed, chains)[0] for ground in grounds]
    return walk.traces(torch.stack(draws, dim=-1).double().cpu().numpy(), grounds)


def _judged(traces: list[_Trace], ground: _Ground, sampler: SGLD, *, alone: bool) -> Chains:
    """All chains of an anchor, and the checks of them.

    Args:
        traces: of one part of the chains after another.
        ground: what was known before.
        sampler: the settings, resolved.
        alone: whether all steps are of one minibatch.
    """

    def of(name: str) -> np.ndarray:
        return np.concatenate([getattr(trace, name) for trace in traces])

    losses, reference = of("losses"), of("reference")
    nbeta, gamma, keep, here = sampler.nbeta, sampler.localization, sampler.momentum, ground.survey
    assert keep is not None
    pushed = np.concatenate([np.diagonal(trace.pushes, axis1=1, axis2=2).mean(0) for trace in traces])
    own, slid, eps = float(pushed.mean()), of("slid"), of("step_size")
    eps_of_pushed = np.concatenate([trace.step_size[: len(trace.slid)] for trace in traces])
    # Pairs of chains that ran apart were never multiplied.
    held, held_error = math.nan, math.nan
    if len(traces) == 1 and np.abs(traces[0].pushes).max() < 1e100:  # squares of more don't fit
        level = nbeta * float((losses - reference).mean())
        held, held_error = _held(nbeta * traces[0].pushes, level, alone=alone)
    heat = (1 + keep) / (1 - keep)
    kappa = float((eps * (nbeta * of("curvature") + gamma)).max())
    steepness = 2 * max(here.curvature, gamma / nbeta)
    longer = eps_of_pushed * (nbeta * of("squares") + gamma * pushed - nbeta * here.noise)
    checks = Checks(
        step_size=float(eps.mean()),
        curvature=float(of("curvature").max()),
        kappa=kappa,
        unsettled=_unsettled(min(kappa * heat, -math.log(keep) if keep else math.inf), sampler),
        descent=nbeta * here.slope / steepness if steepness else math.inf,
        descent_error=nbeta * here.slope_error / steepness if steepness else math.nan,
        slid=-nbeta * float(slid.mean()) / 2 if alone else math.nan,
        slid_error=nbeta * standard_error(slid) / 2 if alone else math.nan,
        overshoot=nbeta / 8 * float(longer.mean()) if sampler.method == "sgld" else math.nan,
        noise=float(eps.mean()) * nbeta**2 * here.noise / 8 * heat,
        held=held,
        held_error=held_error,
        pull=gamma * float(of("distances").mean()) / (nbeta * own) if own > 0 else math.nan,
        below=float((nbeta * (losses - reference) < -1).mean()) if alone else math.nan,
    )
    return Chains(losses, reference, float(of("acceptance").mean()), checks)


def _mask(ground: _Ground) -> Tensor:
    return torch.ones_like(ground.anchor) if ground.mask is None else ground.mask


def _stacked(vectors: list[Tensor]) -> Tensor:
    """A vector of each anchor for all of its chains, shape (anchor, 1, parameter); that of one anchor isn't copied."""
    return (vectors[0].unsqueeze(0) if len(vectors) == 1 else torch.stack(vectors)).unsqueeze(1)


class _Walk:
    """Chains on their way; leading axes are (anchor, chain)."""

    def __init__(self, target: Target, grounds: list[_Ground], sampler: SGLD, seed: int, chains: list[int]) -> None:
        self.target = target
        self.sampler = sampler
        self.anchors = anchors = _stacked([ground.anchor for ground in grounds])
        whole = all(ground.mask is None for ground in grounds)
        self.masks = None if whole else _stacked([_mask(ground) for ground in grounds])
        self.w = anchors.repeat(1, len(chains), 1)
        each = anchors.new_ones(1, len(chains))
        self.eps = (anchors.new_tensor([ground.step_size for ground in grounds]).unsqueeze(1) * each).unsqueeze(-1)
        self.orders = orders(sampler, seed, target)[chains]
        self._numbers = self.orders.to(anchors.device)
        self._noises, self._others = (
            [Generator(anchors.device).manual_seed(chain_seed(seed, chain, stream)) for chain in chains]
            for stream in (Stream.NOISE, Stream.PROPOSALS)
        )
        self._steepest = _stacked([ground.survey.direction for ground in grounds])
        self._curvature = anchors.new_tensor([ground.survey.curvature for ground in grounds]).unsqueeze(1) * each
        self._largest = self._curvature
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

    def advance(self, step: int) -> None:
        """Take a step, and leave the loss of this draw in `losses`; `Refused` where the model refuses the weights."""
        raise NotImplementedError

    def evaluate(self, at: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Losses (anchor, chain) and masked gradients."""
        which = self._numbers[:, step].repeat(len(at))
        losses, grads = attempt(self.target, self.anchors[0, 0], at.reshape(-1, at.shape[-1]), which)
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

    def look(self, at: Tensor, grads: Tensor, step: int) -> None:
        """A step of power iteration for each chain at `at`."""
        reach = reach_of(self._curvature, **self._scale).unsqueeze(-1)
        there = self.evaluate(at + reach * self._steepest, step)[1]
        self._curvature, self._steepest = power_step(there.sub_(grads).div_(reach), self._curvature, self._steepest)
        self._largest = torch.maximum(self._largest, self._curvature)

    def traces(self, losses: np.ndarray, grounds: list[_Ground]) -> list[_Trace | None]:
        """What is left of each anchor's chains, with these losses of shape (anchor, chain, draw)."""
        drawn = self.orders[:, self.sampler.burn_in :]
        products = torch.stack(self._products, 1).cpu().numpy()
        acceptance = torch.stack(self._acceptance).mean(0).cpu().numpy()
        eps, curvature = (each.double().cpu().numpy() for each in (self.eps.squeeze(-1), self._largest))
        found: list[_Trace | None] = []
        for i, ground in enumerate(grounds):
            reference = ground.reference.double().cpu().numpy()[drawn.numpy()]
            if not (np.isfinite(losses[i]).all() and np.isfinite(reference).all()):
                found.append(None)
                continue
            own = np.moveaxis(products[i, ..., -3:].mean(0), -1, 0)
            found.append(
                _Trace(losses[i], reference, acceptance[i], eps[i], curvature[i], *own, pushes=products[i, ..., :-3])
            )
        return found


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

    def advance(self, step: int) -> None:
        """Take a step; the first one anew until ε holds κ where it leads."""
        keep = self.sampler.momentum
        assert keep is not None
        noise = self.noise()
        p = noise if self._p is None else self._p.mul_(keep).add_(noise, alpha=math.sqrt(1 - keep**2))
        at, grads = self._evaluated(p, step)
        if step == 0 and self.sampler.kappa is not None and self.sampler.method != "sgld":
            for _ in range(ROUNDS_TO_KAPPA):
                at, grads = self._evaluated(p, step)
        if step in self._accepts:
            self._accept(at, grads, step)
        if step in self._multiplied:
            self.multiply(at, grads)
        if self.sampler.method == "sgld":
            self.w = sgld_step(at, self.anchors, grads, noise, **self._scale, eps=self.eps)
            return
        force = grads.mul_(-self.sampler.nbeta).add_(at - self.anchors, alpha=-self.sampler.localization)
        if keep:
            p = self._p = p.addcmul(force, self.eps**0.5)
            self.w = at.addcmul_(self.eps**0.5 / 2, p)
        else:
            self.w = at.addcmul_(self.eps**0.5 / 2, p).addcmul_(self.eps / 2, force)

    def _evaluated(self, p: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Where the chains are and the gradient there, after lowering ε to κ."""
        at = self.w if self.sampler.method == "sgld" else torch.addcmul(self.w, self.eps**0.5 / 2, p)
        self.losses, grads = self.evaluate(at, step)
        if step in self._looks:
            self.look(at, grads, step)
        if self.sampler.kappa is not None:
            # Each chain knows its curvature from below only; together they know it better.
            stiffness = self.sampler.nbeta * self._largest.amax(1) + self.sampler.localization
            self.eps = torch.minimum(self.eps, (self.sampler.kappa / stiffness).view(-1, 1, 1))
        return at, grads

    def _accept(self, at: Tensor, grads: Tensor, step: int) -> None:
        """Note the acceptance that a plain Langevin step would have."""
        proposal = sgld_step(at, self.anchors, grads, self.noise(other=True), **self._scale, eps=self.eps)
        there = self.evaluate(proposal, step)
        self._acceptance.append(
            metropolis_acceptance(
                at, proposal, self.anchors, self.losses, there[0], grads, there[1], **self._scale, eps=self.eps
            )
        )


class _Metropolis(_Walk):
    """Metropolis-adjusted Langevin steps, of a size that each chain adapts in the burn-in."""

    def advance(self, step: int) -> None:
        if step == 0:
            self.losses, self._grads = self.evaluate(self.w, step)
        noise = self.noise()
        drawn = [torch.rand((), generator=g, dtype=torch.float64, device=self.w.device) for g in self._noises]
        proposal = sgld_step(self.w, self.anchors, self._grads, noise, **self._scale, eps=self.eps)
        there = self.evaluate(proposal, step)
        probability = metropolis_acceptance(
            self.w, proposal, self.anchors, self.losses, there[0], self._grads, there[1], **self._scale, eps=self.eps
        ).nan_to_num(0.0)
        taken = torch.stack(drawn) < probability
        self.w = torch.where(taken.unsqueeze(-1), proposal, self.w)
        self._grads = torch.where(taken.unsqueeze(-1), there[1], self._grads)
        self.losses = torch.where(taken, there[0], self.losses)
        if step < self.sampler.burn_in:
            gain = (1 + step) ** -0.5
            self.eps = self.eps * ((probability - TARGET_ACCEPTANCE) * gain).exp().to(self.eps).unsqueeze(-1)
        else:
            self._acceptance.append(probability)
        if step in self._looks:
            self.look(self.w, self._grads, step)
        if step in self._multiplied:
            self.multiply(self.w, self._grads)
