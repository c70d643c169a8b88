"""Snapshots without what training leaves as it is: adapters without their base, weights without constant buffers."""

import pytest
import torch
from torch import nn

import phasewatch as pw
from phasewatch.monitor.errors import PhasewatchError, PhasewatchWarning
from phasewatch.monitor.model.weights import SampledModel


class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.base, self.norm = nn.Linear(4, 3).requires_grad_(False), nn.BatchNorm1d(3)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x):
        return self.norm(self.base(x)) * self.scale + self.lora_A["default"](x).sum()


def tensors(*, without, renamed=True):
    kept = {n: t for n, t in Adapted().state_dict().items() if not n.startswith(without)}
    return {n.replace(".default", "") if renamed else n: torch.ones_like(t) for n, t in kept.items()}


@pytest.mark.parametrize("renamed", [True, False], ids=["as PEFT saves it", "as it is"])
def test_what_is_frozen_or_constant_is_the_probes_own_and_said_once(renamed):
    model, expected = SampledModel(Adapted()), Adapted()
    with pytest.warns(PhasewatchWarning, match=r"lack base\.bias and 2 more .*leaves as it is") as told:
        model.load(pw.Snapshot(1, tensors(without=("base", "scale"), renamed=renamed)))
    model.load(pw.Snapshot(2, tensors(without=("base", "scale"), renamed=renamed)))
    assert len(told) == 1
    assert torch.equal(model.module.base.weight, expected.base.weight)
    assert torch.equal(model.module.scale, expected.scale)
    assert (model.module.lora_A["default"].weight == 1).all()
    assert (model.module.norm.running_mean == 1).all()


@pytest.mark.parametrize("without", ["lora_A", "norm.running_mean", "norm.weight"])
def test_what_training_changes_may_not_be_missing(without):
    with pytest.raises(PhasewatchError, match=f"lacks {without}"):
        SampledModel(Adapted()).load(pw.Snapshot(1, tensors(without=(without,))))
