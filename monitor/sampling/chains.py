"""Chains around snapshots, with noise and minibatches that depend on the seed and the chain alone."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Generator

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.estimates.checks import ChainRecord, Checks, checks_of
from phasewatch.monitor.model.gradients import clear_gradients, gradients
from phasewatch.monitor.model.isolation import repeatable
from phasewatch.monitor.model.weights import Mask, Weights
from phasewatch.monitor.sampling import curvature
from phasewatch.monitor.sampling.curvature import look_around
from phasewatch.monitor.sampling.in_place import run_in_place
from phasewatch.monitor.sampling.position import AnchorOnDevice, Keep
from phasewatch.monitor.sampling.random_streams import Stream, chain_seed, minibatch_orders
from phasewatch.monitor.sampling.settings import Sampler
from phasewatch.monitor.sampling.stacked import StackedChains
from phasewatch.monitor.sampling.start import LOOKS, Schedule, Start
from phasewatch.monitor.sampling.target import Guarded, Refused, Target
from phasewatch.monitor.sampling.ways import Way, hint, ways

WORTH_COMPILING = 2000
"""Compile the vectorised loss only for at least this many steps of all chains that run together, since compiling takes
longer than a few steps do. How the number was chosen is not recorded."""

VERSION = 3
"""Raised when a seed and a setting no longer give the numbers that they gave, so that such points aren't compared."""


@dataclass(frozen=True)
class Chains:
    """What the chains around a snapshot saw after the burn-in; NaN throughout if a loss was not finite.

    Attributes:
        losses: minibatch losses L_m(w) at the draws that are compared with the snapshot (all of them, unless the model
            is large), shape (chain, draw), float64.
        reference: L_m(w*) on the same minibatches, shape (chain, draw), float64.
        checks: what else there is to judge them by.
    """

    losses: np.ndarray
    reference: np.ndarray
    checks: Checks

    @classmethod
    def diverged(cls, sampler: Sampler) -> Self:
        """Chains that gave no estimate."""
        nothing = np.full((sampler.chains, sampler.draws), np.nan)
        return cls(nothing, nothing, Checks())


def gradients_of_a_point(sampler: Sampler, minibatches: int) -> int:
    """Gradient evaluations that a point takes at most, with a fixed step size and without parts.

    Args:
        sampler: the setting.
        minibatches: how many are kept; L(w*) is taken on each, and counts as a third.
    """
    around = min(minibatches, curvature.MINIBATCHES)
    around += 2 * curvature.ITERATIONS
    looks = len(range(0, sampler.draws, -(-sampler.draws // LOOKS))) * (2 if minibatches > 1 else 1)
    return sampler.chains * (sampler.burn_in + sampler.draws + looks) + around + math.ceil(minibatches / 3)


def run_chains(
    target: Target,
    anchors: Sequence[Weights],
    sampler: Sampler,
    seed: int,
    *,
    masks: Sequence[Mask] = (None,),
    rows: int | None = None,
) -> list[Chains]:
    """Sample around anchors.

    Neighbouring snapshots share noise and minibatches, and the difference of their estimates is far better known than
    either. Each loss is taken on the minibatch of the step that follows it, and paired with the anchor's loss on that
    same minibatch. Chains run stacked where the target is vectorised, else in place, with the same noise.

    Args:
        target: the loss to sample.
        anchors: w* of each.
        sampler: the settings.
        seed: of the noise and the minibatches.
        masks: which weights move around each anchor; from the first again where there are fewer masks than anchors.
        rows: stacked chains of all anchors that run at a time; all if None, and fewer where memory runs out.

    Returns:
        The paired losses of each anchor. Chains with a loss that isn't finite are given up, since there is nothing to
        come back to.

    Raises:
        PhasewatchError: if memory runs out with one chain at a time, and a few samples of its minibatch.
    """
    sampler = sampler.resolved()
    run = _Run(target, sampler, seed)
    wanted = len(anchors) * sampler.chains if rows is None else rows
    of_anchor = [masks[i % len(masks)] for i in range(len(anchors))]
    last: RuntimeError | None = None
    for way in ways(target, wanted):
        try:
            with repeatable() if target.parameters[0].is_cuda and not way.rows else nullcontext():
                return run.around(anchors, of_anchor, way)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            last = error.with_traceback(None)  # whose frames hold what the chains took
        if target.vector.ranks > 1:  # the others may have had the memory, and wait in the middle of a pass
            break
        for parameter in target.parameters:
            parameter.grad = None
        if target.parameters[0].is_cuda:
            for anchor in anchors:
                anchor[:] = [weight.cpu() for weight in anchor]  # the other ways take less
            torch.cuda.empty_cache()
    raise PhasewatchError(
        f"There is no memory for one chain of {target.vector.size} parameters with "
        f"{type(sampler).__name__}(batch_size={sampler.batch_size}){hint(target)}"
    ) from last


class _Run:
    """One call of `run_chains`."""

    def __init__(self, target: Target, sampler: Sampler, seed: int) -> None:
        self._target = Guarded(target)
        self._position: Keep = AnchorOnDevice
        self._sampler = sampler
        self._seed = seed
        steps = sampler.burn_in + sampler.draws
        orders = minibatch_orders(seed, sampler.chains, steps, target.minibatches, whole=target.whole)
        self._schedule = Schedule(sampler, orders, target.minibatches, target.vector.size)

    def around(self, anchors: Sequence[Weights], masks: Sequence[Mask], way: Way) -> list[Chains]:
        """Whole anchors at a time if they fit, else some chains of one at a time; with 0 rows, all in place."""
        rows, stacked = way.rows, way.rows > 0
        self._position = way.position
        self._target.settle(way.pieces, str(way))
        if not stacked:
            self._target.prepare_gradients(anchors[0])
        found: list[Chains] = []
        last: Weights | None = None
        reference = np.empty(0)
        for group in torch.arange(len(anchors)).split(max(1, rows // self._sampler.chains)):
            starts = []
            for i in group.tolist():
                self._target.set(anchors[i])
                if anchors[i] is not last:  # it is for the parts of one snapshot
                    last, reference = anchors[i], self._reference(anchors[i], rows if stacked else 0)
                starts.append(self._start(anchors[i], masks[i], reference, stacked=stacked))
            known = [start for start in starts if start is not None]
            records = iter(self._stacked(known, rows) if stacked else map(self._in_place, known))
            for start in starts:
                record = None if start is None else next(records)
                found.append(
                    Chains.diverged(self._sampler) if start is None or record is None else self._judged(record, start)
                )
        return found

    def _reference(self, anchor: Weights, rows: int) -> np.ndarray:
        """L_m(w*) on each minibatch that is needed, by the path that the chains take, so that rounding is the same.

        The parameters are at w*.
        """
        needed = list(self._schedule.references)
        if rows:
            numbers = torch.tensor(needed, device=anchor[0].device).split(rows)
            losses = torch.cat([self._target.rows(anchor, some) for some in numbers])
        else:
            losses = torch.stack([self._target.loss(number) for number in needed])
        reference = np.full(self._target.minibatches, np.nan)
        reference[needed] = losses.double().cpu().numpy()
        return reference

    def _start(self, anchor: Weights, masks: Mask, reference: np.ndarray, *, stacked: bool) -> Start | None:
        """What is known of an anchor, at which the parameters are; None where chains could walk on nothing."""
        sampler = self._sampler
        device = self._target.parameters[0].device
        generator = Generator(device).manual_seed(chain_seed(self._seed, 0, Stream.SURVEY))
        position = self._position(self._target.parameters, anchor)
        scale = {"nbeta": sampler.nbeta, "gamma": sampler.localization}
        self._target.anchor = anchor
        try:
            around = look_around(self._target, position, masks, **scale, generator=generator)
        except Refused:
            return None
        if not math.isfinite(around.curvature):
            return None
        stiffness = max(sampler.nbeta * around.curvature + sampler.localization, torch.finfo(torch.float32).tiny)
        eps = sampler.step_size if sampler.target_kappa is None else sampler.target_kappa / stiffness
        assert eps is not None
        gradient = self._gradient(anchor, masks) if stacked and self._target.minibatches == 1 else None
        return Start(anchor, position, masks, reference, around, eps, gradient)

    def _gradient(self, anchor: Weights, masks: Mask) -> Weights:
        """∇L(w*) on the only minibatch."""
        clear_gradients(self._target.parameters)
        self._target.add_gradient(0)
        grads = [grad.to(w.dtype) for grad, w in zip(gradients(self._target.parameters, masks), anchor, strict=True)]
        clear_gradients(self._target.parameters)
        return grads

    def _stacked(self, starts: list[Start], rows: int) -> list[ChainRecord | None]:
        """The records of some anchors' chains, as many at a time as fit; anchor by anchor where one is refused."""
        if not starts:
            return []
        records: list[list[ChainRecord | None]] = [[] for _ in starts]
        steps = self._sampler.burn_in + self._sampler.draws
        for chains in torch.arange(self._sampler.chains).split(min(rows, self._sampler.chains)):
            if steps * len(starts) * len(chains) >= WORTH_COMPILING:
                self._target.prepare(len(starts) * len(chains))
            self._target.anchor = starts[0].anchor
            try:
                group = StackedChains(self._target, starts, self._sampler, self._schedule, chains.tolist(), self._seed)
                found = group.run()
            except Refused:
                if len(starts) > 1:
                    return [self._stacked([start], rows)[0] for start in starts]
                found = [None]
            for so_far, record in zip(records, found, strict=True):
                so_far.append(record)
            if all(record is None for record in found):
                break
        return [None if None in of_one else ChainRecord.together([r for r in of_one if r]) for of_one in records]

    def _in_place(self, start: Start) -> ChainRecord | None:
        self._target.anchor = start.anchor
        try:
            return run_in_place(self._target, start, self._sampler, self._schedule, self._seed)
        except Refused:
            return None

    def _judged(self, record: ChainRecord, start: Start) -> Chains:
        sampler = self._sampler
        checks = checks_of(
            record,
            nbeta=sampler.nbeta,
            gamma=sampler.localization,
            kept=sampler.velocity_kept or 0.0,
            burn_in=sampler.burn_in,
            draws=sampler.draws,
            step_bias=sampler.has_step_bias,
            slope=start.around.slope,
            slope_error=start.around.slope_error,
            noise=start.around.noise,
            alone=self._target.minibatches == 1,
        )
        return Chains(record.losses, record.reference, checks)
