"""A model with a tensor of every kind that a snapshot may meet."""

import torch
from torch import nn


class AssortedModel(nn.Module):
    """Tied, frozen, of low precision, not contiguous, of whole numbers, infinite, not saved, or none at all."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.b = nn.Linear(3, 2)
        self.b.weight = self.a.weight
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.low = nn.Parameter(torch.randn(50).bfloat16())
        self.turned = nn.Parameter(torch.randn(2, 5).T)
        self.whole = nn.Parameter(torch.arange(3), requires_grad=False)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
        self.register_buffer("hidden", torch.arange(3), persistent=False)
        self.register_buffer("wide", torch.arange(2.0).expand(3, 2))
        self.register_buffer("none", None)
