"""One chain after another in the parameters of the model itself, by plain backward passes.

Beside the parameters it holds the anchor, one gradient, the velocity if the chains keep one, and the noise of one
parameter: nothing else of the model's size. It works for every model that can be trained.
"""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from phasewatch.monitor.estimates.checks import ChainRecord
from phasewatch.monitor.model.gradients import clear_gradients, gradients, square
from phasewatch.monitor.model.weights import mask_of
from phasewatch.monitor.sampling.curvature import reach_of
from phasewatch.monitor.sampling.fused import FusedStep
from phasewatch.monitor.sampling.random_streams import ChainNoise, flattened, groups_of, unflattened
from phasewatch.monitor.sampling.settings import Sampler
from phasewatch.monitor.sampling.start import ROUNDS_TO_KAPPA, Schedule, Start
from phasewatch.monitor.sampling.target import Target


def run_in_place(target: Target, start: Start, sampler: Sampler, schedule: Schedule, seed: int) -> ChainRecord | None:
    """Run the chains of an anchor to their end, one after another, and leave the parameters where the last one ends.

    Args:
        target: the loss.
        start: the anchor, with what is known of it; the parameters are there.
        sampler: the settings, resolved.
        schedule: of the chains.
        seed: of the noise.

    Returns:
        The record of the chains; None if one diverged.
    """
    records, steps = [], sampler.chains * (sampler.burn_in + sampler.draws)
    try:
        with target.many_gradients(steps, start.position.weights):
            for chain in range(sampler.chains):
                record = _Chain(target, start, sampler, schedule, seed, chain).run()
                if record is None:
                    return None
                records.append(record)
    finally:
        clear_gradients(target.parameters)
    return ChainRecord.together(records)


class _Chain:
    """One chain on its way."""

    def __init__(
        self, target: Target, start: Start, sampler: Sampler, schedule: Schedule, seed: int, chain: int
    ) -> None:
        self._target = target
        self._start = start
        self._sampler = sampler
        self._schedule = schedule
        self._order: list[int] = schedule.orders[chain].tolist()
        self._seed = seed
        self._number = chain
        self._eps = start.step_size
        self._curvature = start.around.curvature
        self._position = start.position
        self._weights = start.position.weights
        self._vector = target.vector
        self._groups = groups_of(self._vector.sizes)
        kept = sampler.velocity_kept
        self._velocity = [torch.empty_like(weight) for weight in self._weights] if kept else None
        self._past = [torch.zeros_like(weight) for weight in self._weights] if schedule.sums else None
        self._middle: list[Tensor] = []
        self._scatter: list[float] = []
        self._fused = None
        if FusedStep.fits(self._position, self._vector):
            self._fused = FusedStep(sampler, self._position, self._vector, self._velocity, start.masks, seed, chain)

    def run(self) -> ChainRecord | None:
        """Run it to its end; None if a loss isn't finite."""
        sampler, schedule = self._sampler, self._schedule
        losses, products = [], []
        self._begin()
        for step in range(sampler.burn_in + sampler.draws):
            clear_gradients(self._target.parameters)
            loss = self._look(step) if step in schedule.looks else self._target.add_gradient(self._order[step])
            if step % 16 == 0 and not math.isfinite(loss):
                return None
            if step in schedule.compared:
                losses.append(loss.double())
            if self._past is not None:
                self._add_up(step)
            if step in schedule.products:
                products.append(self._products(step))
            self._advance()
        drawn = torch.stack(losses).cpu().numpy()
        reference = self._start.reference[[self._order[step] for step in schedule.compared]]
        if not (np.isfinite(drawn).all() and np.isfinite(reference).all()):
            return None
        squares, work, past, middle = torch.stack(products).mean(0).cpu().numpy()
        memory = middle * schedule.share_of_middle / self._eps
        noise = float(np.mean(self._scatter)) if self._scatter else math.nan
        seen = self._eps, self._curvature, squares, work, math.nan, past, memory, noise
        return ChainRecord(drawn[None], reference[None], *(np.array([value]) for value in seen))

    @torch.no_grad()
    def _begin(self) -> None:
        """Put the chain where it first asks for a gradient."""
        if self._fused is not None:
            self._fused.begin(self._eps)
            return
        self._noise = self._stream()
        self._last_noise = self._stream() if self._sampler.velocity_kept == 0 else None
        for group in self._groups:
            weights = [self._weights[k] for k in group]
            for k, noise in zip(group, unflattened(self._drawn(self._noise, group), weights), strict=True):
                self._position.put([k], [self._sampler.start(self._position.origin(k), noise, self._eps)])
                if self._velocity is not None:
                    self._velocity[k].copy_(noise)

    @torch.no_grad()
    def _advance(self) -> None:
        """Take a step with the gradient that the parameters hold, a group of parameters at a time."""
        grads = list(gradients(self._target.parameters, self._start.masks))
        if self._fused is not None:
            self._fused.advance(self._eps, grads)
            return
        for group in self._groups:
            self._advance_group(group, [grads[k] for k in group])

    def _advance_group(self, group: Sequence[int], grads: Sequence[Tensor]) -> None:
        noise, last = self._drawn(self._noise, group), None
        if self._last_noise is not None:  # drawn again, which takes less memory than to keep it
            last = self._drawn(self._last_noise, group)
        if noise.is_cuda:
            self._advance_together(group, grads, noise, last)
            return
        sizes = [self._weights[k].numel() for k in group]
        lasts = [None] * len(group) if last is None else last.split(sizes)
        for k, grad, z, velocity in zip(group, grads, noise.split(sizes), lasts, strict=True):
            self._advance_together([k], [grad], z, velocity)

    def _advance_together(
        self, group: Sequence[int], grads: Sequence[Tensor], noise: Tensor, velocity: Tensor | None
    ) -> None:
        """Move some parameters as one vector."""
        if self._velocity is not None:
            velocity = flattened([self._velocity[k] for k in group])
        anchor, grad = flattened([self._position.origin(k) for k in group]), flattened(grads).to(noise.dtype)
        weights, eps = [self._weights[k] for k in group], torch.tensor(self._eps, dtype=torch.float64)
        step = _compiled_step() if noise.is_cuda else _step
        after, velocity = step(self._sampler, flattened(weights), velocity, anchor, grad, noise, eps)
        self._position.put(group, unflattened(after, weights))
        if self._velocity is not None and velocity is not None:
            kept = [self._velocity[k] for k in group]
            torch._foreach_copy_(kept, unflattened(velocity, kept))  # pyright: ignore[reportPrivateImportUsage]

    def _drawn(self, stream: ChainNoise, group: Sequence[int]) -> Tensor:
        """The noise of a group of parameters as one vector, 0 where the masks are False."""
        weights, sizes = [self._weights[k] for k in group], [self._vector.sizes[k] for k in group]
        flat = self._vector.part(group, stream.into(weights[0].new_empty(sum(sizes)), sizes))
        if self._start.masks is not None:
            for k, piece in zip(group, unflattened(flat, weights), strict=True):
                if (mask := mask_of(self._start.masks, k)) is not None:
                    piece.mul_(mask)
        return flat

    def _look(self, step: int) -> Tensor:
        """Add the gradient, measure the curvature along it, and lower ε to κ where that is asked for.

        The first step is then taken anew, until ε holds κ where it leads.
        """
        loss = self._measure_curvature(step)
        for _ in range(ROUNDS_TO_KAPPA if self._hold_kappa() and step == 0 else 0):
            self._begin()
            clear_gradients(self._target.parameters)
            loss = self._measure_curvature(step)
            self._hold_kappa()
        return loss

    def _hold_kappa(self) -> bool:
        kappa, before = self._sampler.target_kappa, self._eps
        if kappa is not None:
            self._eps = min(before, kappa / (self._sampler.nbeta * self._curvature + self._sampler.localization))
        return self._eps < before

    def _measure_curvature(self, step: int) -> Tensor:
        """‖H·g‖/‖g‖, g the gradient, which lies along the steepest direction where steps are too long.

        Where there's no room for a pass beside a gradient, g is that of a part of the minibatch.

        Returns:
            The loss, whose gradient the parameters hold.
        """
        number, whole = self._order[step], self._target.share == 1
        loss = self._target.add_gradient(number, part=not whole)
        self._turn(number)
        self._measure_noise(step)
        if whole:
            return loss
        clear_gradients(self._target.parameters)
        return self._target.add_gradient(number)

    def _turn(self, number: int) -> None:
        """Compare the gradient that is held with the one a little further along it."""
        masks = self._start.masks
        scale = {"nbeta": self._sampler.nbeta, "gamma": self._sampler.localization}
        reach, length = reach_of(self._curvature, **scale), self._length()
        if not length or not math.isfinite(length):
            return
        turned: list[Tensor] = []
        device, dtype = self._weights[0].device, self._weights[0].dtype

        def see(grad: Tensor, held: Tensor | None) -> None:
            turned.append(square(grad.to(dtype) if held is None else grad.to(dtype) - held))

        self._move(reach / length)
        with self._vector.intercepted(masks, see, add=False):
            self._target.add_gradient(number, part=True)
        self._move(-reach / length)
        total = torch.stack(turned).sum() if turned else torch.zeros((), dtype=torch.float64, device=device)
        curvature = math.sqrt(float(self._vector.total(total))) / reach
        if math.isfinite(curvature):
            self._curvature = max(self._curvature, curvature)

    def _measure_noise(self, step: int) -> None:
        """The variance tr Cov of a minibatch's gradient where the chain is, by the gradient on its next minibatch."""
        last = len(self._order) - 1
        if self._past is None or self._target.minibatches == 1 or not self._sampler.burn_in <= step < last:
            return
        parameters, masks = self._target.parameters, self._start.masks
        before = [grad.clone() for grad in gradients(parameters, masks)]
        clear_gradients(parameters)
        self._target.add_gradient(self._order[step + 1])
        dtype = self._weights[0].dtype
        apart = [grad.to(dtype) - other for grad, other in zip(gradients(parameters, masks), before, strict=True)]
        squares = [square(each) for each in self._vector.counted(apart)]
        zero = torch.zeros((), dtype=torch.float64, device=self._weights[0].device)  # a rank may count no parameter
        total = torch.stack(squares).sum() if squares else zero
        self._scatter.append(float(self._vector.total(total)) / 2)
        for parameter, grad in zip(parameters, before, strict=True):
            parameter.grad = grad

    def _length(self) -> float:
        return self._vector.norm(list(gradients(self._target.parameters, self._start.masks)))

    @torch.no_grad()
    def _move(self, distance: float) -> None:
        """Move the weights along the gradient."""
        grads = list(gradients(self._target.parameters, None))
        for group in self._groups:
            weights = [self._weights[k] for k in group]
            along = [grads[k].to(weight.dtype) for k, weight in zip(group, weights, strict=True)]
            self._position.put(group, torch._foreach_add(weights, along, alpha=distance))  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def _add_up(self, step: int) -> None:
        """Add the displacement, times ε, to the sum of the earlier ones."""
        assert self._past is not None
        if step == self._schedule.middle.start:
            self._middle = [past.clone() for past in self._past]
        if step == self._schedule.middle.stop:
            for middle, past in zip(self._middle, self._past, strict=True):
                torch.sub(past, middle, out=middle)
        for k, (past, weight) in enumerate(zip(self._past, self._weights, strict=True)):
            past.add_(weight - self._position.origin(k), alpha=self._eps)

    @torch.no_grad()
    def _products(self, step: int) -> Tensor:
        """‖∇L‖², ∇L·δ, ∇L·Σδ and ∇L·Σδ over the chain's middle third, with δ the displacement, shape (4,)."""
        device, grads = self._weights[0].device, list(gradients(self._target.parameters, self._start.masks))
        squares, along, past, middle = [], [], [], []
        for k in self._vector.counted(range(len(grads))):
            weight = self._weights[k]
            away, slope = (weight - self._position.origin(k)).flatten(), grads[k].flatten().to(weight.dtype)
            squares.append(square(slope))
            along.append(torch.dot(away, slope))
            if self._past is not None:
                past.append(torch.dot(self._past[k].flatten(), slope))
            if step in self._schedule.late and self._past is not None:
                middle.append(torch.dot(self._middle[k].flatten(), slope))
        missing = math.nan if self._past is None else 0.0
        first = torch.tensor([0.0, 0.0, missing, missing], device=device)
        sums = [
            torch.stack([zero, *some]).double().sum()
            for zero, some in zip(first, [squares, along, past, middle], strict=True)
        ]
        return self._vector.total(torch.stack(sums))

    def _stream(self) -> ChainNoise:
        return ChainNoise(self._seed, self._number, self._weights[0].device)


def _step(
    sampler: Sampler, w: Tensor, velocity: Tensor | None, anchor: Tensor, grad: Tensor, noise: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor | None]:
    return sampler.step(w, velocity, anchor, grad, noise, eps)


@functools.cache
def _compiled_step() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """A sampler's step as one kernel, in place of a dozen that each read and write its vectors.

    It is compiled once for each kind of sampler, for vectors of any length and settings of any value.
    """
    return torch.compile(_step, dynamic=True)
