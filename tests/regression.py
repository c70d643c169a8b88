"""A regular model at the minimum of its data: λ is half its parameters."""

import torch
from torch import nn

D, N = 20, 256


def half_squared_error(model, batch):
    """Summed over the outputs, the last axis; mean over the samples."""
    x, y = batch
    return (model(x) - y).square().sum(-1).mean() / 2


def regression(noise: float = 0.5) -> tuple[nn.Linear, tuple[torch.Tensor, torch.Tensor]]:
    """A linear model of D weights at the minimiser of its N samples, in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(D, 1, generator=generator, dtype=torch.float64)
    y += noise * torch.randn(N, 1, generator=generator, dtype=torch.float64)
    model = nn.Linear(D, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y).solution.T)
    return model, (x, y)
