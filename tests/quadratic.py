"""A loss whose chains are known exactly, and what they are to be compared by."""

import math
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from phasewatch.monitor.model.gradients import Vector
from phasewatch.monitor.sampling.chains import Chains


class Quadratic:
    """L(w) = ½ Σ h·(w − centre)² + what the minibatch adds: a shift of the loss and, if `tilt`, of its gradient.

    Its weights are two tensors, so that what is summed over parameters is tried; `split` says where the first ends.
    """

    def __init__(
        self,
        curvatures: Tensor,
        centre: Tensor,
        tilt: float = 0.0,
        shifts: Tensor | None = None,
        *,
        whole: bool = True,
        vectorised: bool = True,
    ) -> None:
        self.curvatures = curvatures
        self.centre = centre
        self.tilt = tilt
        self.shifts = torch.tensor([0.75], dtype=torch.float64) if shifts is None else shifts
        self.whole = whole
        self.vectorised = vectorised
        self.calls: list[Tensor] = []
        self.parameters = [piece.requires_grad_() for piece in self.pieces(centre.detach())]
        self.vector = Vector(self.parameters)

    @property
    def minibatches(self) -> int:
        return len(self.shifts)

    def pieces(self, flat: Tensor) -> list[Tensor]:
        """Flat weights of shape (..., parameter) as the tensors that are sampled, copies."""
        split = max(1, flat.shape[-1] // 2)
        return [piece.clone() for piece in flat.split([split, flat.shape[-1] - split], dim=-1) if piece.shape[-1]]

    def set(self, weights) -> None:
        with torch.no_grad():
            for parameter, weight in zip(self.parameters, weights, strict=True):
                parameter.copy_(weight)

    def at(self, flat: Tensor, which: Tensor) -> Tensor:
        """Losses of shape (row,) at flat weights of shape (row, parameter) or (parameter,)."""
        away = flat - self.centre
        shift = self.shifts[which].to(flat)
        return (self.curvatures * away.square()).sum(-1) / 2 + shift + self.tilt * shift * away.sum(-1)

    def loss(self, number: int) -> Tensor:
        with torch.no_grad():
            return self.at(torch.cat(self.parameters), torch.tensor(number))

    def add_gradient(self, number: int, scale: float = 1.0, *, part: bool = False) -> Tensor:
        self.calls.append(torch.cat(self.parameters).detach().unsqueeze(0))
        value = self.at(torch.cat(self.parameters), torch.tensor(number))
        (scale * value).backward()
        return value.detach()

    most_pieces = 1
    share = 1.0

    def settle(self, pieces: int, way: str) -> None:
        pass

    def bytes_of_a_pass(self, pieces: int) -> int:
        return 0

    def prepare_gradients(self, anchor) -> None:
        """Nothing to do."""

    def many_gradients(self, count: int, weights):
        return nullcontext()

    def prepare(self, rows: int) -> None:
        pass

    def rows(self, weights, which: Tensor) -> Tensor:
        with torch.no_grad():
            return self.at(torch.cat(list(weights), -1), which)

    def rows_and_gradients(self, weights, which: Tensor):
        flat = torch.cat(list(weights), -1).detach().requires_grad_()
        self.calls.append(flat.detach())
        losses = self.at(flat, which)
        (grads,) = torch.autograd.grad(losses.sum(), flat)
        return losses.detach(), self.pieces(grads)


def shifts(count: int, seed: int = 0) -> Tensor:
    """Of variance 1 and mean 0 exactly, so that their minimum is the quadratic's."""
    drawn = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (drawn - drawn.mean()) / drawn.std(correction=0)


def stationary_mean(h: Tensor, *, nbeta: float, gamma: float, eps: float, sgld: bool, tilt: float = 0.0) -> float:
    """E[nβ·(L − L*)] on a quadratic, a = nβ·h + γ: the variance of SGLD is 1/(a·(1 − ε·a/4)), BAOAB has 1/a.

    Gradient noise of variance s² adds ε·(nβ·s)²/4 over a·(1 − ε·a/4) to both.
    """
    a = nbeta * h + gamma
    damped = 1 - eps * a / 4
    variance = (1 if sgld else damped) + eps * (nbeta * tilt) ** 2 / 4
    return (nbeta * h * variance / (a * damped)).sum().item() / 2


def excess_losses(chains: Chains, nbeta: float) -> np.ndarray:
    """nβ·(L(w) − L(w*)) along each chain, shape (chain,)."""
    return nbeta * (chains.losses - chains.reference).mean(axis=1)


def mean_and_error(per_chain: np.ndarray) -> tuple[float, float]:
    """The mean over chains, and its standard error."""
    return per_chain.mean(), per_chain.std(ddof=1) / math.sqrt(len(per_chain))
