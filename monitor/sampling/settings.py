"""How to sample around a snapshot, and the steps that do it."""

import math
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, Literal, Self, get_args

from torch import Tensor

from phasewatch.monitor.errors import PhasewatchError

Method = Literal["langevin", "sgld", "mala"]
Backend = Literal["vectorised", "devinterp"]

DEFAULT_STEP_SIZE = 1e-4
FULL_BATCH_MOMENTUM = 0.95
"""What won on deep linear networks, at trained and at the most singular points (experiments/samplers.py)."""

_LEAST = {"chains": 2, "draws": 4, "batch_size": 1}
_POSITIVE = {"step_size", "nbeta", "kappa"}
_OPTIONAL = {"step_size", "batch_size", "kappa", "momentum"}


@dataclass(frozen=True)
class SGLD:
    """How to sample around a snapshot. λ̂ depends on all of it: use one setting for a whole trajectory.

    Attributes:
        step_size: ε; 1e-4 if neither it nor `kappa` is given. Too large and the chains diverge or overshoot, too small
            and they don't get anywhere.
        localization: γ, the strength of the pull back to the snapshot.
        nbeta: nβ, the inverse temperature times the number of samples; larger looks closer to the snapshot.
        chains: independent chains, at least 2.
        draws: steps of each chain that count.
        burn_in: steps before them that don't.
        batch_size: samples in a minibatch; None for all of the data at each step.
        method: the step. "langevin" is underdamped Langevin dynamics in the BAOAB splitting, which on quadratics
            has no error of the step size; "sgld" is the published step, which makes a direction's share of λ̂ too large
            by a quarter of its κ; "mala" corrects
            every error of the step by accepting or rejecting it, adapts its step in the burn-in, and needs
            `batch_size=None`.
        momentum: share of its speed that "langevin" keeps from step to step. 0 makes it the step of Leimkuhler and
            Matthews. The more, the sooner the chains settle where curvatures differ widely, and the more of the
            minibatches' noise they take up, (1 + momentum)/(1 − momentum) times: 0.95 with all of the data at each
            step and 0 with minibatches if not given.
        kappa: κ = ε·(nβ·h + γ), h the largest curvature of the loss, instead of a step size: each snapshot
            gets the ε that this makes, lowered whenever one of its chains meets a larger curvature.
        backend: "vectorised", or "devinterp" for a second opinion by that library's optimizer, chain after chain.

    Raises:
        PhasewatchError: if a value makes no sense.
    """

    step_size: float | None = None
    localization: float = 100.0
    nbeta: float = 100.0
    chains: int = 4
    draws: int = 100
    burn_in: int = 50
    batch_size: int | None = 64
    method: Method = "langevin"
    kappa: float | None = None
    momentum: float | None = None
    backend: Backend = "vectorised"

    def __post_init__(self) -> None:
        if self.step_size is not None and self.kappa is not None:
            raise PhasewatchError(
                f"SGLD(step_size={self.step_size!r}, kappa={self.kappa!r}) says twice how large the steps are. "
                "Give one of them."
            )
        for field in fields(self):
            value: Any = getattr(self, field.name)
            if choices := get_args(field.type) if field.name in {"method", "backend"} else ():
                if value not in choices:
                    raise PhasewatchError(
                        f"SGLD({field.name}={value!r}) must be one of {', '.join(map(repr, choices))}."
                    )
            elif value is not None or field.name not in _OPTIONAL:
                object.__setattr__(self, field.name, _checked(field.name, value))
        eps = self.resolved().step_size
        if eps is not None and eps * self.localization >= 4:
            raise PhasewatchError(
                f"SGLD(step_size={eps:g}, localization={self.localization:g}): their product must be below "
                "4, or the pull back to the snapshot overshoots it further at every step. Lower one of them."
            )
        if self.kappa is not None and self.kappa >= 4:
            raise PhasewatchError(
                f"SGLD(kappa={self.kappa:g}) must be below 4, or the chains overshoot further at every step. "
                "0.25 to 1 is usual."
            )
        if self.momentum and (self.method != "langevin" or self.momentum >= 1):
            raise PhasewatchError(
                f"SGLD(momentum={self.momentum:g}, method={self.method!r}) must be below 1, and 0 with any method but "
                "'langevin'."
            )
        if self.method == "mala" and self.batch_size is not None:
            raise PhasewatchError(
                f"SGLD(method='mala', batch_size={self.batch_size}) would accept and reject by a minibatch's loss, "
                "which is not the loss that is sampled. Give batch_size=None, or leave method out."
            )
        if self.backend == "devinterp" and (self.method != "sgld" or self.kappa is not None):
            raise PhasewatchError(
                "SGLD(backend='devinterp') samples by method='sgld' with a step_size, and nothing else. "
                f"method={self.method!r}, kappa={self.kappa!r} came."
            )

    def resolved(self) -> Self:
        """These settings with the step size (unless κ is given) and the momentum that are taken where they are None."""
        eps = DEFAULT_STEP_SIZE if self.step_size is None and self.kappa is None else self.step_size
        fast = self.method == "langevin" and self.batch_size is None
        momentum = self.momentum if self.momentum is not None else FULL_BATCH_MOMENTUM if fast else 0.0
        if (eps, momentum) == (self.step_size, self.momentum):
            return self
        return replace(self, step_size=eps, momentum=momentum)

    def as_json(self) -> dict[str, Any]:
        """The settings by name, resolved."""
        return asdict(self.resolved())


def _checked(name: str, value: Any) -> int | float:
    whole = name in _LEAST or name == "burn_in"
    number = not isinstance(value, bool) and issubclass(type(value), Integral if whole else Real)
    least, strict = _LEAST.get(name, 0), name in _POSITIVE
    if not number or not least <= value < math.inf or (strict and value == 0):
        kind = "a whole number" if whole else "a finite number"
        reason = " One chain has no spread to take an error from." if name == "chains" else ""
        raise PhasewatchError(
            f"SGLD({name}={value!r}) must be {kind} {'above 0' if strict else f'of at least {least}'}.{reason}"
        )
    return int(value) if whole else float(value)


def sgld_step(
    w: Tensor, anchor: Tensor, grads: Tensor, noise: Tensor, *, nbeta: float, gamma: float, eps: float | Tensor
) -> Tensor:
    """One step: w − ε/2 · (nβ·∇L_m(w) + γ·(w − w*)) + √ε · noise (Welling & Teh 2011; Lau et al. 2023, eq. 15).

    Args:
        w: where the chains are, shape (..., chain, parameter).
        anchor: w*, of a shape that broadcasts with `w`.
        grads: ∇L_m(w) on each chain's minibatch, shape (..., chain, parameter).
        noise: shape (..., chain, parameter).
        nbeta: nβ.
        gamma: γ, the localization.
        eps: ε, the step size; one, or of shape (..., 1, 1).

    Returns:
        Where the chains go, shape (..., chain, parameter).
    """
    return w - eps / 2 * (nbeta * grads + gamma * (w - anchor)) + eps**0.5 * noise


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
    eps: float | Tensor,
) -> Tensor:
    """Acceptance probability that a Langevin step would have under Metropolis-Hastings (Roberts & Tweedie 1996, MALA).

    Args:
        w: shape (..., chain, parameter).
        proposal: where the step goes, shape (..., chain, parameter).
        anchor: w*, of a shape that broadcasts with `w`.
        loss: L(w), shape (..., chain).
        proposal_loss: L(proposal) on the same minibatch, shape (..., chain).
        grads: ∇L(w), shape (..., chain, parameter).
        proposal_grads: ∇L(proposal) on the same minibatch, shape (..., chain, parameter).
        nbeta: nβ.
        gamma: γ.
        eps: ε; one, or of shape (..., 1, 1).

    Returns:
        Probabilities of shape (..., chain).
    """
    width = eps.squeeze(-1) if isinstance(eps, Tensor) else eps

    def potential(at: Tensor, loss: Tensor) -> Tensor:
        return nbeta * loss.double() + gamma / 2 * (at - anchor).double().square().sum(-1)

    def log_density(to: Tensor, start: Tensor, grads: Tensor) -> Tensor:
        drift = eps / 2 * (nbeta * grads + gamma * (start - anchor))
        return -(to - start + drift).double().square().sum(-1) / (2 * width)

    log_ratio = (
        potential(w, loss)
        - potential(proposal, proposal_loss)
        + log_density(w, proposal, proposal_grads)
        - log_density(proposal, w, grads)
    )
    return log_ratio.clamp(max=0).exp()
