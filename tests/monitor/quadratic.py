"""A loss whose chains are known exactly."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


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
