"""Stochastic gradient Langevin dynamics around a snapshot, every chain at once."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Generator, Tensor

from phasewatch.monitor.errors import PhasewatchError

ACCEPTANCE_CHECKS = 8
"""Draws at which the Metropolis acceptance is worked out; each costs one more gradient."""


@dataclass(frozen=True)
class SGLD:
    """How to sample around a snapshot. λ̂ depends on all of it: use one setting for a whole trajectory.

    Attributes:
        step_size: ε. Too large and the chains diverge or overshoot; `Estimate.acceptance` near 0.9 is healthy.
        localization: γ, the strength of the pull back to the snapshot.
        nbeta: nβ, the inverse temperature times the number of samples; larger looks closer to the snapshot.
        chains: independent chains, at least 2.
        draws: steps of each chain that count.
        burn_in: steps before them that don't.
        batch_size: samples in a minibatch.

    Raises:
        PhasewatchError: if a value makes no sense.
    """

    step_size: float = 1e-4
    localization: float = 100.0
    nbeta: float = 100.0
    chains: int = 4
    draws: int = 100
    burn_in: int = 50
    batch_size: int = 64

    def __post_init__(self) -> None:
        for field in fields(self):
            value: Any = getattr(self, field.name)
            whole = field.type is int
            number = not isinstance(value, bool) and issubclass(type(value), Integral if whole else Real)
            least = {"chains": 2, "draws": 4, "batch_size": 1}.get(field.name, 0)
            strict = field.name in {"step_size", "nbeta"}
            if not number or not least <= value < math.inf or (strict and value == 0):
                kind = "a whole number" if whole else "a finite number"
                reason = " One chain has no spread to take an error from." if field.name == "chains" else ""
                raise PhasewatchError(
                    f"SGLD({field.name}={value!r}) must be {kind} "
                    f"{'above 0' if strict else f'of at least {least}'}.{reason}"
                )
            object.__setattr__(self, field.name, int(value) if whole else float(value))
        if self.step_size * self.localization >= 4:
            raise PhasewatchError(
                f"SGLD(step_size={self.step_size:g}, localization={self.localization:g}): their product must be below "
                "4, or the pull back to the snapshot overshoots it further at every step. Lower one of them."
            )

    def as_json(self) -> dict[str, Any]:
        """The settings by name."""
        return asdict(self)


def sgld_step(
    w: Tensor, anchor: Tensor, grads: Tensor, noise: Tensor, *, nbeta: float, gamma: float, eps: float
) -> Tensor:
    """One step: w − ε/2 · (nβ·∇L_m(w) + γ·(w − w*)) + √ε · noise (Welling & Teh 2011; Lau et al. 2023, eq. 15).

    Args:
        w: where the chains are, shape (chain, parameter).
        anchor: w*, shape (parameter,) or (chain, parameter).
        grads: ∇L_m(w) on each chain's minibatch, shape (chain, parameter).
        noise: standard normal, shape (chain, parameter).
        nbeta: nβ.
        gamma: γ, the localization.
        eps: ε, the step size.

    Returns:
        Where the chains go, shape (chain, parameter).
    """
    return w - eps / 2 * (nbeta * grads + gamma * (w - anchor)) + math.sqrt(eps) * noise


class Target(Protocol):
    """What is sampled: the loss as a function of flat weights and a minibatch for each chain."""

    def losses(self, weights: Tensor, batches: list[Any]) -> Tensor:
        """Losses of shape (chain,) at weights of shape (chain, parameter)."""
        ...

    def losses_and_grads(self, weights: Tensor, batches: list[Any]) -> tuple[Tensor, Tensor]:
        """Losses of shape (chain,) and their gradients of shape (chain, parameter)."""
        ...


@dataclass(frozen=True)
class Chains:
    """What the chains saw after the burn-in; NaN throughout if a loss was not finite.

    Attributes:
        losses: minibatch losses L_m(w), shape (chain, draw), float64.
        reference: L_m(w*) on the same minibatches, shape (chain, draw), float64.
        acceptance: mean Metropolis acceptance probability of the steps, each on its own minibatch.
    """

    losses: np.ndarray
    reference: np.ndarray
    acceptance: float

    @classmethod
    def nowhere(cls, sampler: SGLD) -> Self:
        """Of chains that diverged."""
        nothing = np.full((sampler.chains, sampler.draws), np.nan)
        return cls(nothing, nothing, math.nan)


def chain_seed(seed: int, chain: int, purpose: int) -> int:
    """A seed of its own for each chain and purpose, the same for every snapshot."""
    return int(np.random.SeedSequence([seed, chain, purpose]).generate_state(1, np.uint64)[0] >> 1)


def run_chains(
    target: Target,
    anchor: Tensor,
    draw_batch: Callable[[Generator], Any],
    sampler: SGLD,
    seed: int,
) -> Chains:
    """Sample around an anchor with noise and minibatches that depend on the seed and the chain alone.

    Neighbouring snapshots so share them, and the difference of their estimates is far better known than either. Each
    loss is taken on the minibatch of the step that follows it, and paired with the anchor's loss on that same
    minibatch.

    Args:
        target: the loss to sample.
        anchor: w*, shape (parameter,).
        draw_batch: draws a minibatch with a CPU generator.
        sampler: the settings.
        seed: seed of the noise and the minibatches.

    Returns:
        The paired losses. When one stops being finite the chains soon end, since there is nothing to come back to.
    """
    steps = {"nbeta": sampler.nbeta, "gamma": sampler.localization, "eps": sampler.step_size}
    data_generators = [Generator().manual_seed(chain_seed(seed, c, 0)) for c in range(sampler.chains)]
    noise_generators = [Generator(anchor.device).manual_seed(chain_seed(seed, c, 1)) for c in range(sampler.chains)]
    anchors = anchor.expand(sampler.chains, -1)
    checked = {sampler.burn_in + i * sampler.draws // ACCEPTANCE_CHECKS for i in range(ACCEPTANCE_CHECKS)}
    losses, reference, acceptance = [], [], []
    w = anchors.clone()
    for step in range(sampler.burn_in + sampler.draws):
        batches = [draw_batch(generator) for generator in data_generators]
        here = _attempt(target, w, anchors, batches)
        if here is None or (step % 16 == 0 and not here[0].isfinite().all()):
            return Chains.nowhere(sampler)
        loss, grads = here
        noise = torch.stack(
            [torch.randn(anchor.shape, generator=g, dtype=w.dtype, device=w.device) for g in noise_generators]
        )
        proposal = sgld_step(w, anchor, grads, noise, **steps)
        if step >= sampler.burn_in:
            losses.append(loss)
            reference.append(target.losses(anchors, batches))
        if step in checked:
            there = _attempt(target, proposal, anchors, batches)
            if there is None:
                return Chains.nowhere(sampler)
            acceptance.append(
                metropolis_acceptance(w, proposal, anchor, loss, there[0], grads, there[1], **steps).mean()
            )
        w = proposal
    if not torch.stack(losses + reference).isfinite().all():
        return Chains.nowhere(sampler)
    return Chains(_by_chain(losses), _by_chain(reference), torch.stack(acceptance).mean().item())


def _by_chain(values: list[Tensor]) -> np.ndarray:
    return torch.stack(values, dim=1).double().cpu().numpy()


def _attempt(target: Target, weights: Tensor, anchors: Tensor, batches: list[Any]) -> tuple[Tensor, Tensor] | None:
    """Losses and gradients, or None for weights that the model refuses though it takes the anchor's."""
    try:
        return target.losses_and_grads(weights, batches)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        target.losses(anchors, batches)  # raises too where the chains are not what is wrong
        return None


def metropolis_acceptance(
    w: Tensor,
    proposal: Tensor,
    anchor: Tensor,
    loss: Tensor,
    proposal_loss: Tensor,
    grads: Tensor,
    proposal_grads: Tensor,
    *,
    nbeta: float,
    gamma: float,
    eps: float,
) -> Tensor:
    """Acceptance probability that a Langevin step would have under Metropolis-Hastings (Roberts & Tweedie 1996, MALA).

    Args:
        w: shape (chain, parameter).
        proposal: where the step goes, shape (chain, parameter).
        anchor: w*, shape (parameter,).
        loss: L(w), shape (chain,).
        proposal_loss: L(proposal) on the same minibatch, shape (chain,).
        grads: ∇L(w), shape (chain, parameter).
        proposal_grads: ∇L(proposal) on the same minibatch, shape (chain, parameter).
        nbeta: nβ.
        gamma: γ.
        eps: ε.

    Returns:
        Probabilities of shape (chain,).
    """

    def potential(at: Tensor, loss: Tensor) -> Tensor:
        return nbeta * loss.double() + gamma / 2 * (at - anchor).double().square().sum(-1)

    def log_density(to: Tensor, start: Tensor, grads: Tensor) -> Tensor:
        drift = eps / 2 * (nbeta * grads + gamma * (start - anchor))
        return -(to - start + drift).double().square().sum(-1) / (2 * eps)

    log_ratio = (
        potential(w, loss)
        - potential(proposal, proposal_loss)
        + log_density(w, proposal, proposal_grads)
        - log_density(proposal, w, grads)
    )
    return log_ratio.clamp(max=0).exp()
