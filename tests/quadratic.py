"""A loss whose chains are known exactly, and what they are to be compared by."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from phasewatch.monitor.sampling.chains import Chains


@dataclass
class Quadratic:
    """L(w) = ½ Σ h·(w − centre)² + what the minibatch adds: a shift of the loss and, if `tilt`, of its gradient."""

    curvatures: Tensor
    centre: Tensor
    tilt: float = 0.0
    shifts: Tensor = field(default_factory=lambda: torch.tensor([0.75], dtype=torch.float64))
    calls: list[Tensor] = field(default_factory=list)
    whole: bool = True

    @property
    def minibatches(self) -> int:
        return len(self.shifts)

    def prepare(self, rows: int) -> None:
        pass

    def losses(self, weights: Tensor, which: Tensor) -> Tensor:
        away = weights - self.centre
        shift = self.shifts[which].to(weights)
        return (self.curvatures * away.square()).sum(-1) / 2 + shift + self.tilt * shift * away.sum(-1)

    def losses_and_grads(self, weights: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.append(weights)
        shift = self.shifts[which].to(weights).unsqueeze(-1)
        return self.losses(weights, which), self.curvatures * (weights - self.centre) + self.tilt * shift


def shifts(count: int, seed: int = 0) -> Tensor:
    """Of variance 1 and mean 0 exactly, so that their minimum is the quadratic's."""
    drawn = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (drawn - drawn.mean()) / drawn.std(correction=0)


def stationary_mean(h: Tensor, *, nbeta: float, gamma: float, eps: float, method: str, tilt: float = 0.0) -> float:
    """E[nβ·(L − L*)] on a quadratic, a = nβ·h + γ: the variance of SGLD is 1/(a·(1 − ε·a/4)), BAOAB has 1/a.

    Gradient noise of variance s² adds ε·(nβ·s)²/4 over a·(1 − ε·a/4) to both.
    """
    a = nbeta * h + gamma
    damped = 1 - eps * a / 4
    variance = (1 if method == "sgld" else damped) + eps * (nbeta * tilt) ** 2 / 4
    return (nbeta * h * variance / (a * damped)).sum().item() / 2


def excess_losses(chains: Chains, nbeta: float) -> np.ndarray:
    """nβ·(L(w) − L(w*)) along each chain, shape (chain,)."""
    return nbeta * (chains.losses - chains.reference).mean(axis=1)


def mean_and_error(per_chain: np.ndarray) -> tuple[float, float]:
    """The mean over chains, and its standard error."""
    return per_chain.mean(), per_chain.std(ddof=1) / math.sqrt(len(per_chain))
