"""All chains around all anchors as one vectorised axis."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from phasewatch.monitor.estimates.checks import ChainRecord
from phasewatch.monitor.model.weights import Weights
from phasewatch.monitor.sampling.random_streams import ChainNoise, groups_of, unflattened
from phasewatch.monitor.sampling.settings import Sampler
from phasewatch.monitor.sampling.start import ROUNDS_TO_KAPPA, Schedule, Start
from phasewatch.monitor.sampling.target import Target


class StackedChains:
    """Some of the chains of some anchors, together; each tensor has leading axes (anchor, chain).

    Args:
        target: the loss.
        starts: the anchors, with what is known of them.
        sampler: the settings, resolved.
        schedule: of all chains.
        chains: the numbers of these chains.
        seed: of the noise.
    """

    def __init__(
        self,
        target: Target,
        starts: Sequence[Start],
        sampler: Sampler,
        schedule: Schedule,
        chains: Sequence[int],
        seed: int,
    ) -> None:
        self._target = target
        self._starts = starts
        self._sampler = sampler
        self._schedule = schedule
        self._orders = schedule.orders[list(chains)]
        self._anchors = _stacked([start.anchor for start in starts])
        device = self._anchors[0].device
        self._noises = [ChainNoise(seed, chain, device) for chain in chains]
        self._which = self._orders.to(device)
        self._masks = self._stacked_masks()
        each = torch.ones(1, len(chains), dtype=self._anchors[0].dtype, device=device)
        self._eps = each.new_tensor([start.step_size for start in starts]).unsqueeze(1) * each
        self._curvature = each.new_tensor([start.around.curvature for start in starts]).unsqueeze(1) * each
        slopes = [start.gradient for start in starts]
        self._slopes = None if None in slopes else _stacked([slope for slope in slopes if slope is not None])
        self._products: list[Tensor] = []
        self._past: Weights = []
        self._middle: Weights = []
        self._noise: list[Tensor] = []
        self._w: Weights = []
        self._velocity: list[Tensor | None] = []

    def run(self) -> list[ChainRecord | None]:
        """Run them to their end: the record of each anchor's chains; None for those that diverged."""
        draws = []
        for step in range(self._sampler.burn_in + self._sampler.draws):
            losses = self._advance(step)
            if step % 16 == 0 and not losses.isfinite().all(1).any():
                return [None for _ in self._starts]
            if step in self._schedule.compared:
                draws.append(losses)
        return self._records(torch.stack(draws, dim=-1).double().cpu().numpy())

    def _advance(self, step: int) -> Tensor:
        """Take a step, and return the loss of this draw, shape (anchor, chain)."""
        if step == 0:
            self._begin(self._draw())
        losses, grads = self._evaluate(self._w, step)
        if step in self._schedule.looks:
            losses, grads = self._look(losses, grads, step)
        if self._schedule.sums:
            self._add_up(step)
        if step in self._schedule.products:
            self._multiply(grads, step)
        noise = self._draw()
        for k, grad in enumerate(grads):
            self._w[k], self._velocity[k] = self._sampler.step(
                self._w[k], self._velocity[k], self._anchors[k], grad, noise[k], _like(self._eps, grad)
            )
        return losses

    def _records(self, losses: np.ndarray) -> list[ChainRecord | None]:
        """What is left of each anchor's chains, with these losses of shape (anchor, chain, draw)."""
        drawn = self._orders[:, list(self._schedule.compared)].numpy()
        products = torch.stack(self._products, 1).cpu().numpy()
        nothing = torch.full_like(self._eps, math.nan)
        noise = torch.stack(self._noise or [nothing]).mean(0).double().cpu().numpy()
        eps, curvature = (each.double().cpu().numpy() for each in (self._eps, self._curvature))
        found: list[ChainRecord | None] = []
        for i, start in enumerate(self._starts):
            reference = start.reference[drawn]
            if not (np.isfinite(losses[i]).all() and np.isfinite(reference).all()):
                found.append(None)
                continue
            squares, work, past, along, middle = products[i].mean(0).T
            memory = middle * self._schedule.share_of_middle / eps[i]
            found.append(
                ChainRecord(losses[i], reference, eps[i], curvature[i], squares, work, along, past, memory, noise[i])
            )
        return found

    def _begin(self, noise: Weights) -> None:
        """Put the chains where they first ask for a gradient."""
        ones = torch.ones_like(self._eps)
        self._w = [
            _like(ones, z) * self._sampler.start(anchor, z, _like(self._eps, z))
            for anchor, z in zip(self._anchors, noise, strict=True)
        ]
        self._velocity = list(noise) if self._sampler.velocity_kept is not None else [None] * len(noise)
        self._first_noise = noise

    def _draw(self) -> Weights:
        """Noise for the weights that move, the same around each anchor; each of shape (1 or anchor, chain, ...)."""
        drawn: Weights = []
        for group in groups_of([anchor[0, 0].numel() for anchor in self._anchors]):
            some = [self._anchors[k][0, 0] for k in group]
            sizes = [weight.numel() for weight in some]
            noise = some[0].new_empty(1, len(self._noises), sum(sizes))
            for chain, stream in zip(noise[0], self._noises, strict=True):
                stream.into(chain, sizes)
            drawn += unflattened(noise, some)
        return [noise if mask is None else noise * mask for noise, mask in zip(drawn, self._masks, strict=True)]

    def _evaluate(self, at: Weights, step: int) -> tuple[Tensor, Weights]:
        """Losses of shape (anchor, chain), and masked gradients."""
        rows = [weight.flatten(0, 1) for weight in at]
        losses, grads = self._target.rows_and_gradients(rows, self._which[:, step].repeat(len(self._starts)))
        shaped = [grad.view(weight.shape) for grad, weight in zip(grads, at, strict=True)]
        for k, mask in enumerate(self._masks):
            if mask is not None:
                shaped[k] = shaped[k] * mask
        return losses.view(self._eps.shape), shaped

    def _look(self, losses: Tensor, grads: Weights, step: int) -> tuple[Tensor, Weights]:
        """Measure the curvature along the gradients, and lower ε to κ where that is asked for.

        The first step is then taken anew, until ε holds κ where it leads.
        """
        self._measure_curvature(grads, step)
        self._measure_noise(grads, step)
        for _ in range(ROUNDS_TO_KAPPA if step == 0 and self._hold_kappa() else 0):
            self._begin(self._first_noise)
            losses, grads = self._evaluate(self._w, step)
            self._measure_curvature(grads, step)
            self._hold_kappa()
        if step > 0:
            self._hold_kappa()
        return losses, grads

    def _hold_kappa(self) -> bool:
        kappa = self._sampler.target_kappa
        if kappa is None:
            return False
        stiffness = self._sampler.nbeta * self._curvature + self._sampler.localization
        lower = torch.minimum(self._eps, kappa / stiffness)
        changed = bool((lower < self._eps).any())
        self._eps = lower
        return changed

    def _measure_curvature(self, grads: Weights, step: int) -> None:
        """‖H·g‖/‖g‖ for each chain, g its gradient: steps that are too long turn it into the steepest direction."""
        reach = (self._sampler.nbeta * self._curvature + self._sampler.localization).clamp_min(1e-12).rsqrt()
        length = _lengths(grads).clamp_min(torch.finfo(reach.dtype).tiny)
        there = [w + _like(reach / length, grad) * grad for w, grad in zip(self._w, grads, strict=True)]
        turned = [after - before for after, before in zip(self._evaluate(there, step)[1], grads, strict=True)]
        curvature = _lengths(turned) / reach
        self._curvature = torch.maximum(self._curvature, torch.where(curvature.isfinite(), curvature, 0.0))

    def _measure_noise(self, grads: Weights, step: int) -> None:
        """The variance tr Cov of a minibatch's gradient where each chain is, by the gradient on its next minibatch."""
        if self._target.minibatches > 1 and self._sampler.burn_in <= step < self._orders.shape[1] - 1:
            other = self._evaluate(self._w, step + 1)[1]
            apart = [after - before for after, before in zip(other, grads, strict=True)]
            self._noise.append(_lengths(apart).square() / 2)

    def _add_up(self, step: int) -> None:
        """Add the chains' displacements, each times ε, to the sum of the earlier ones."""
        if step == self._schedule.middle.start:
            self._middle = [past.clone() for past in self._past]
        if step == self._schedule.middle.stop:
            self._middle = [past - before for past, before in zip(self._past, self._middle, strict=True)]
        if not self._past:
            self._past = [torch.zeros_like(w) for w in self._w]
        for past, w, anchor in zip(self._past, self._w, self._anchors, strict=True):
            past.add_((w - anchor) * _like(self._eps, w))

    def _multiply(self, grads: Weights, step: int) -> None:
        """‖∇L‖², ∇L·δ, ∇L·Σδ, ∇L(w*)·δ and ∇L·Σδ over the middle third of each chain, with δ its displacement."""
        total: Tensor | float = 0.0
        for k, grad in enumerate(grads):
            away, grad = _vectors(self._w[k] - self._anchors[k]), _vectors(grad)
            missing = torch.full_like(away[..., 0], math.nan)
            past = (grad * _vectors(self._past[k])).sum(-1) if self._past else missing
            along = missing if self._slopes is None else (away * _vectors(self._slopes[k])).sum(-1)
            square, work = grad.square().sum(-1), (grad * away).sum(-1)
            middle = missing
            if self._schedule.sums:
                late = step in self._schedule.late
                middle = (grad * _vectors(self._middle[k])).sum(-1) if late else torch.zeros_like(missing)
            total = total + torch.stack([square, work, past, along, middle], -1).double()
        assert isinstance(total, Tensor)
        self._products.append(total)

    def _stacked_masks(self) -> list[Tensor | None]:
        """A mask for each parameter that doesn't move as a whole around all anchors."""
        found: list[Tensor | None] = []
        for k, anchor in enumerate(self._anchors):
            masks = [None if start.masks is None else start.masks[k] for start in self._starts]
            whole = torch.ones(anchor.shape[2:], dtype=torch.bool, device=anchor.device)
            partial = any(mask is not None for mask in masks)
            stack = (
                torch.stack([whole if mask is None else mask.expand(whole.shape) for mask in masks]).unsqueeze(1)
                if partial
                else None
            )
            found.append(None if stack is None else stack.to(anchor.dtype))
        return found


def _stacked(anchors: Sequence[Weights]) -> Weights:
    """Each parameter of all anchors, of shape (anchor, 1, ...); that of one anchor isn't copied."""
    if len(anchors) == 1:
        return [weight[None, None] for weight in anchors[0]]
    return [torch.stack(list(weights)).unsqueeze(1) for weights in zip(*anchors, strict=True)]


def _like(numbers: Tensor, tensor: Tensor) -> Tensor:
    """Numbers of shape (anchor, chain), to be multiplied with a tensor of shape (..., chain, ...)."""
    return numbers.view(*numbers.shape, *[1] * (tensor.ndim - 2))


def _vectors(tensor: Tensor) -> Tensor:
    """A parameter's numbers as one axis, shape (anchor, chain, number)."""
    return tensor.reshape(*tensor.shape[:2], -1)


def _lengths(tensors: Weights) -> Tensor:
    """The Euclidean length of each chain's vector, shape (anchor, chain)."""
    return torch.stack([_vectors(tensor).square().sum(-1) for tensor in tensors]).sum(0).sqrt()
