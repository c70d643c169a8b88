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
from phasewatch.monitor.sampling.curvature import clear_gradients, gradients, intercepted, reach_of, square
from phasewatch.monitor.sampling.random_streams import ChainNoise, mask_of
from phasewatch.monitor.sampling.settings import Sampler
from phasewatch.monitor.sampling.start import ROUNDS_TO_KAPPA, Schedule, Start
from phasewatch.monitor.sampling.target import Target

SMALL = 2**22
"""On a GPU, parameters of fewer elements than this are moved together, up to as many elements, so that starting kernels
doesn't cost more than running them. Chosen by the bytes to move and the time of a start, not by a measurement."""


def run_in_place(target: Target, start: Start, sampler: Sampler, schedule: Schedule, seed: int) -> ChainRecord | None:
    """Run the chains of an anchor to their end, one after another, and leave the parameters at the anchor.

    Args:
        target: the loss.
        start: the anchor, with what is known of it.
        sampler: the settings, resolved.
        schedule: of the chains.
        seed: of the noise.

    Returns:
        The record of the chains; None if one diverged.
    """
    records = []
    try:
        for chain in range(sampler.chains):
            record = _Chain(target, start, sampler, schedule, seed, chain).run()
            if record is None:
                return None
            records.append(record)
    finally:
        clear_gradients(target.parameters)
        start.position.reset()
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
        self._groups = _groups(self._weights)
        self._step = _compiled_step() if self._weights[0].is_cuda else _step
        kept = sampler.velocity_kept
        self._velocity = [torch.empty_like(weight) for weight in self._weights] if kept else None

    def run(self) -> ChainRecord | None:
        """Run it to its end; None if a loss isn't finite."""
        sampler, schedule = self._sampler, self._schedule
        losses, products = [], []
        self._begin()
        for step in range(sampler.burn_in + sampler.draws):
            clear_gradients(self._target.parameters)
            loss = self._target.add_gradient(self._order[step])
            if step in schedule.looks:
                loss = self._look(loss, step)
            if step % 16 == 0 and not math.isfinite(loss):
                return None
            if step in schedule.compared:
                losses.append(loss.double())
            if step in schedule.products:
                products.append(self._products())
            self._advance()
        drawn = torch.stack(losses).cpu().numpy()
        reference = self._start.reference[[self._order[step] for step in schedule.compared]]
        if not (np.isfinite(drawn).all() and np.isfinite(reference).all()):
            return None
        squares, away, work = torch.stack(products).mean(0).cpu().numpy()
        one = [np.array([value]) for value in (self._eps, self._curvature, squares, away, work, math.nan)]
        return ChainRecord(drawn[None], reference[None], *one)

    @torch.no_grad()
    def _begin(self) -> None:
        """Put the chain where it first asks for a gradient."""
        self._noise = self._stream()
        self._last_noise = self._stream() if self._sampler.velocity_kept == 0 else None
        for k, weight in enumerate(self._weights):
            noise = self._noise.like(weight, mask_of(self._start.masks, k))
            self._position.put([k], [self._sampler.start(self._position.origin(k), noise, self._eps)])
            if self._velocity is not None:
                self._velocity[k].copy_(noise)

    @torch.no_grad()
    def _advance(self) -> None:
        """Take a step with the gradient that the parameters hold, a group of parameters at a time."""
        grads = list(gradients(self._target.parameters, self._start.masks))
        for group in self._groups:
            self._advance_group(group, [grads[k] for k in group])

    def _advance_group(self, group: Sequence[int], grads: Sequence[Tensor]) -> None:
        weights = [self._weights[k] for k in group]
        noise, velocity = self._drawn(self._noise, group), None
        if self._velocity is not None:
            velocity = _flat([self._velocity[k] for k in group])
        elif self._last_noise is not None:  # drawn again, which takes less memory than to keep it
            velocity = self._drawn(self._last_noise, group)
        anchor, grad = _flat([self._position.origin(k) for k in group]), _flat(grads).to(noise.dtype)
        eps = torch.tensor(self._eps, dtype=torch.float64)
        after, velocity = self._step(self._sampler, _flat(weights), velocity, anchor, grad, noise, eps)
        self._position.put(group, _unflattened(after, weights))
        if self._velocity is not None and velocity is not None:
            kept = [self._velocity[k] for k in group]
            torch._foreach_copy_(kept, _unflattened(velocity, kept))  # pyright: ignore[reportPrivateImportUsage]

    def _drawn(self, stream: ChainNoise, group: Sequence[int]) -> Tensor:
        """The noise of a group of parameters as one vector, drawn a parameter at a time."""
        weights = [self._weights[k] for k in group]
        flat = weights[0].new_empty(sum(weight.numel() for weight in weights))
        for k, piece in zip(group, flat.split([weight.numel() for weight in weights]), strict=True):
            mask = mask_of(self._start.masks, k)
            stream.into(piece.view(self._weights[k].shape), mask)
        return flat

    def _look(self, loss: Tensor, step: int) -> Tensor:
        """Measure the curvature along the gradient, and lower ε to κ where that is asked for.

        The first step is then taken anew, until ε holds κ where it leads.
        """
        self._measure_curvature(step)
        for _ in range(ROUNDS_TO_KAPPA if self._hold_kappa() and step == 0 else 0):
            self._begin()
            clear_gradients(self._target.parameters)
            loss = self._target.add_gradient(self._order[step])
            self._measure_curvature(step)
            self._hold_kappa()
        return loss

    def _hold_kappa(self) -> bool:
        kappa, before = self._sampler.target_kappa, self._eps
        if kappa is not None:
            self._eps = min(before, kappa / (self._sampler.nbeta * self._curvature + self._sampler.localization))
        return self._eps < before

    def _measure_curvature(self, step: int) -> None:
        """‖H·g‖/‖g‖, g the gradient, which lies along the steepest direction where steps are too long."""
        masks, parameters = self._start.masks, self._target.parameters
        scale = {"nbeta": self._sampler.nbeta, "gamma": self._sampler.localization}
        reach, length = reach_of(self._curvature, **scale), self._length()
        if not length or not math.isfinite(length):
            return
        turned: list[Tensor] = []

        def see(grad: Tensor, held: Tensor | None) -> None:
            turned.append(square(grad if held is None else grad - held))

        self._move(reach / length)
        with intercepted(parameters, masks, see, add=False):
            self._target.add_gradient(self._order[step])
        self._move(-reach / length)
        curvature = math.sqrt(float(torch.stack(turned).sum())) / reach if turned else 0.0
        if math.isfinite(curvature):
            self._curvature = max(self._curvature, curvature)

    def _length(self) -> float:
        grads = gradients(self._target.parameters, self._start.masks)
        return float(torch.stack([square(grad) for grad in grads]).sum().sqrt())

    @torch.no_grad()
    def _move(self, distance: float) -> None:
        """Move the weights along the gradient."""
        for k, grad in enumerate(gradients(self._target.parameters, None)):
            weight = self._weights[k]
            self._position.put([k], [weight.add(grad.to(weight.dtype), alpha=distance)])

    @torch.no_grad()
    def _products(self) -> Tensor:
        """‖∇L‖², ‖w − w*‖² and ∇L·(w − w*), shape (3,)."""
        total = torch.zeros(3, dtype=torch.float64, device=self._weights[0].device)
        for k, grad in enumerate(gradients(self._target.parameters, self._start.masks)):
            grad, away = grad.to(self._weights[k].dtype), self._weights[k] - self._position.origin(k)
            total += torch.stack([square(grad), square(away), torch.dot(away.flatten(), grad.flatten()).double()])
        return total

    def _stream(self) -> ChainNoise:
        return ChainNoise(self._seed, self._number, self._weights[0].device)


def _groups(weights: Sequence[Tensor]) -> list[list[int]]:
    """The numbers of the parameters that are moved together: on a CPU each alone."""
    groups: list[list[int]] = []
    room = 0
    for k, weight in enumerate(weights):
        if weight.numel() > room or not weight.is_cuda:
            groups.append([])
            room = SMALL
        groups[-1].append(k)
        room -= weight.numel()
    return groups


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """Several tensors as one vector; a single one isn't copied if it needn't be."""
    return tensors[0].reshape(-1) if len(tensors) == 1 else torch.cat([tensor.reshape(-1) for tensor in tensors])


def _unflattened(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    pieces = flat.split([tensor.numel() for tensor in like])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, like, strict=True)]


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
