"""The papers' settings of docs/calibrate.md give on quadratics what those settings define."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import phasewatch as pw

PAGE = Path(__file__).parents[3] / "docs" / "calibrate.md"
SETTINGS = re.findall(r"\| `(pw\.SGLD\(.*?\))` \|", PAGE.read_text("utf-8"))
H = torch.logspace(-1, 1, 60, dtype=torch.float64)


class Bowl(nn.Module):
    """At the minimum of a quadratic."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros_like(H))


def loss(model, batch):
    return (H * model.w.square()).sum() / 2 + 0 * batch.sum()


def defined(sampler: pw.SGLD) -> float:
    """The expectation of λ̂: each direction's variance by its own recursion from 0, averaged over the draws."""
    assert sampler.step_size is not None
    a = sampler.nbeta * H + sampler.localization
    variance, seen = torch.zeros_like(H), torch.zeros_like(H)
    for step in range(sampler.burn_in + sampler.draws):
        if step >= sampler.burn_in:
            seen += variance / sampler.draws
        variance = (1 - sampler.step_size * a / 2) ** 2 * variance + sampler.step_size
    return float((sampler.nbeta * H * seen).sum() / 2)


def test_the_page_lists_them():
    assert len(SETTINGS) >= 6


@pytest.mark.parametrize("text", SETTINGS)
def test_chains_give_what_the_settings_define(text):
    sampler = eval(text, {"pw": pw})
    sampler = replace(sampler, chains=20, draws=min(sampler.draws, 400), burn_in=min(sampler.burn_in, 200))
    found = pw.estimate_llc(Bowl(), loss, torch.zeros(2048, 1, dtype=torch.float64), sampler=sampler)
    assert abs(found.value - defined(sampler)) < 4 * found.error
    assert found.error < 0.05 * found.value
